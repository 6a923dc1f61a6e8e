"""Train UniAD on the student's tokens of normal parts (all products together, no labels), and measure it on another seed.

Departures from the paper, all for a short training: narrower, whitened tokens, a higher rate with warm-up and cosine decay. The
residual is normalised, so that one threshold serves smooth and coarse products alike; three ways are measured side by side:
`plain` (none), `location` (constants per location and channel from held-out normal parts), and `context` (a linear layer beside the
output layer predicts, from the same hidden state, how large each channel's residual normally is here; fitted on held-out normal parts
with everything else frozen).
"""

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

import features
from uniad import UniAd, jitter


def hidden(net, x, batch=64):
    net.eval()
    with torch.no_grad():
        return torch.cat([net.hidden(x[k : k + batch]) for k in range(0, len(x), batch)])


def fit_spread(h, r, steps=400, batch=4096):
    """Linear layer [dim -> C] for the log of the residual's standard deviation: Gaussian likelihood of held-out residuals `r`."""
    h, r = h.flatten(0, 1), r.flatten(0, 1)
    layer = torch.nn.Linear(h.shape[1], r.shape[1])
    torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(r.square().mean(0).sqrt().log())
    opt = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        pick = torch.randint(len(h), (batch,))
        s = layer(h[pick])
        # a Student-like log(1 + z^2) would be robuster; the Gaussian punishes what the threshold will punish
        loss = (s + 0.5 * r[pick].square() * torch.exp(-2 * s)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return layer.requires_grad_(False)


def residual_statistics(r, floor):
    """Shift and scale [T, C] such that (r + shift) * scale is about standard on normal parts. `floor`: share of the channel's
    mean deviation below which a location's own is not trusted."""
    mean, std = r.mean(0), r.std(0)
    typical = r.square().mean((0, 1)).sqrt()
    return -mean, 1 / torch.maximum(std, floor * typical)


def score(maps, rule):
    """maps [N,14,14] -> [N]. `rule`: ("pooled_max", window px) or ("top_mean", share)."""
    if rule[0] == "pooled_max":
        up = F.interpolate(maps[:, None], size=(features.SIZE,) * 2, mode="bilinear", align_corners=True)
        return F.avg_pool2d(up, rule[1], 1).flatten(1).max(1).values
    flat = maps.flatten(1).sort(descending=True).values
    return flat[:, : max(1, round(rule[1] * flat.shape[1]))].mean(1)


def pixel_auroc(maps, masks, every=7):
    """On every `every`-th pixel in each direction of the upsampled map."""
    up = F.interpolate(maps[:, None], size=(features.SIZE,) * 2, mode="bilinear", align_corners=True)[:, 0]
    return roc_auc_score(masks[:, ::every, ::every].ravel(), up[:, ::every, ::every].numpy().ravel())


RULES = [("pooled_max", 8), ("pooled_max", 16), ("top_mean", 0.005), ("top_mean", 0.01), ("top_mean", 0.02), ("top_mean", 0.05)]


def report(name, maps, data):
    bad = data["defect"] != ""
    out = {"pixel": round(pixel_auroc(maps, data["mask"]), 4)}
    for rule in RULES:
        out["%s %g" % rule] = round(roc_auc_score(bad, score(maps, rule).numpy()), 4)
    print(name, json.dumps(out), flush=True)
    return out


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--student", required=True)
    p.add_argument("--train", required=True, help="CACHE.npz of normal parts")
    p.add_argument("--held-out", required=True, help="CACHE.npz of other normal parts: residual statistics")
    p.add_argument("--val", required=True, help="CACHE.npz with defects")
    p.add_argument("--out", required=True)
    p.add_argument("--resume")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--jitter", type=float, default=20.0)
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--floor", type=float, default=0.5)
    p.add_argument("--eval-every", type=int, default=500)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)

    student = features.load_student(a.student)
    data = {k: dict(np.load(getattr(a, k))) for k in ("train", "held_out", "val")}
    began = time.time()
    x = {k: features.tokens(student, v["x"]) for k, v in data.items()}
    print({k: tuple(v.shape) for k, v in x.items()}, "features", round(time.time() - began), "s", flush=True)
    mean, std = x["train"].mean((0, 1)), x["train"].std((0, 1))
    x = {k: (v - mean) / std for k, v in x.items()}

    net = UniAd(x["train"].shape[-1], (14, 14), a.dim, 8, a.hidden, a.layers, a.layers, 7, a.dropout)
    if a.resume:
        net.load_state_dict(torch.load(a.resume)["net"])
    opt = torch.optim.AdamW(net.parameters(), lr=a.lr, weight_decay=1e-4)

    def evaluate(step):
        h, hv = hidden(net, x["held_out"]), hidden(net, x["val"])
        with torch.no_grad():
            r, v = net.out(h) - x["held_out"], net.out(hv) - x["val"]
        shift, scale = residual_statistics(r, a.floor)
        spread = fit_spread(h, r)
        print("held-out mse", round(float(r.square().mean()), 4), {c: round(float(r[torch.from_numpy(data["held_out"]["category"] == c)].square().mean()), 4) for c in np.unique(data["held_out"]["category"])})
        report("plain   ", v.norm(dim=-1).unflatten(1, (14, 14)), data["val"])
        report("location", ((v + shift) * scale).norm(dim=-1).unflatten(1, (14, 14)), data["val"])
        report("context ", (v * torch.exp(-spread(hv))).norm(dim=-1).unflatten(1, (14, 14)), data["val"])
        torch.save({"net": net.state_dict(), "config": net.config, "mean": mean, "std": std, "shift": shift, "scale": scale, "spread": spread.state_dict(), "step": step, "args": vars(a)}, a.out)

    began, running = time.time(), None
    for step in range(1, a.steps + 1):
        net.train()
        lr = a.lr * min(1.0, step / a.warmup) * (0.5 + 0.5 * np.cos(np.pi * step / a.steps))
        for group in opt.param_groups:
            group["lr"] = lr
        b = x["train"][torch.randint(len(x["train"]), (a.batch,))]
        loss = (net(jitter(b, a.jitter)) - b).square().mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        running = loss.item() if running is None else running * 0.97 + loss.item() * 0.03
        if step % 50 == 0:
            print(json.dumps({"step": step, "lr": round(float(lr), 6), "mse": round(running, 4), "s": round(time.time() - began)}), flush=True)
        if step % a.eval_every == 0 or step == a.steps:
            evaluate(step)


if __name__ == "__main__":
    main()
