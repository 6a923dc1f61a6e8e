"""The fallback and the yardstick: a mixture of diagonal Gaussians over the student's tokens, all products and locations together.

-log likelihood of the best component, as one MatMul over [x, x^2]: min_k sum_c (x_c - m_kc)^2 / s_kc^2 + 2 log s_kc. Minutes of
transformer training become seconds; UniAD has to beat it to be worth its time.
"""

import torch


def fit(x, components=256, rounds=12, sample=60000, floor=0.1, seed=1):
    """x [N, C] whitened tokens -> means [K, C], variances [K, C]; hard-assignment EM from random tokens."""
    g = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=g)[:sample]]
    means = x[torch.randperm(len(x), generator=g)[:components]].clone()
    var = torch.ones_like(means)
    for i in range(rounds):
        k = energy(x, means, var if i > 4 else torch.ones_like(var)).min(1).indices
        one = torch.nn.functional.one_hot(k, components).float()
        n = one.sum(0)[:, None]
        means = torch.where(n > 0, one.T @ x / n.clamp(min=1), x[torch.randint(len(x), (components,), generator=g)])
        # shrunk towards the global spread: components with few tokens know their own spread badly
        var = (one.T @ (x * x) - n * means * means).clamp(min=0)
        var = (var + 20 * floor) / (n + 20) + floor * 0.2
    return means, var


def energy(x, means, var):
    """[N, C] -> [N, K]."""
    w = torch.cat([-2 * means / var, 1 / var], 1)
    return torch.cat([x, x * x], 1) @ w.T + (means * means / var + var.log()).sum(1)


def maps(x, means, var):
    """[N, T, C] -> [N, 14, 14]: square root of the energy above the lowest possible one (so that it is a length, as UniAD's is)."""
    low = var.log().sum(1).min()
    e = torch.cat([energy(b, means, var).min(1).values for b in x.flatten(0, 1).split(8192)])
    return (e - low).clamp(min=0).sqrt().view(len(x), 14, 14)
