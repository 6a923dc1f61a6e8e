"""UniAD as the paper has it, over a grid of feature tokens; parameter names as in shared/golden.

`python uniad.py GOLDEN.safetensors` compares reconstruction, loss and gradients with reference vectors.
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


def neighbour_mask(rows, cols, neighbour):
    """[T,T] bool, true = may not attend: both offsets within `neighbour // 2`, itself included. None if `neighbour` is 0."""
    if neighbour == 0:
        return None
    r = torch.arange(rows).repeat_interleave(cols)
    c = torch.arange(cols).repeat(rows)
    near = neighbour // 2
    return ((r[:, None] - r[None]).abs() <= near) & ((c[:, None] - c[None]).abs() <= near)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        for name in "qkvo":
            layer = nn.Linear(dim, dim)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            setattr(self, name, layer)

    def forward(self, q, k, v, mask):
        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(split(self.q(q)), split(self.k(k)), split(self.v(v)), attn_mask=mask)
        return self.o(y.transpose(1, 2).flatten(2))


class Ffn(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.attn, self.ffn = Attention(dim, heads), Ffn(dim, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, pos, mask, drop):
        q = x + pos
        x = self.norm1(x + drop(self.attn(q, q, x, mask)))
        return self.norm2(x + drop(self.ffn(x)))


class DecoderLayer(nn.Module):
    def __init__(self, dim, heads, hidden, tokens):
        super().__init__()
        self.attn1, self.attn2, self.ffn = Attention(dim, heads), Attention(dim, heads), Ffn(dim, hidden)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(tokens, dim))

    def forward(self, out, memory, pos, mask, drop):
        t = self.query.expand(memory.shape[0], -1, -1)
        t = self.norm1(t + drop(self.attn1(t + pos, memory + pos, memory, mask)))
        t = self.norm2(t + drop(self.attn2(t + pos, out + pos, out, mask)))
        return self.norm3(t + drop(self.ffn(t)))


class UniAd(nn.Module):
    """`forward([N,T,C])` -> reconstruction [N,T,C]."""

    def __init__(self, channels, grid=(14, 14), dim=256, heads=8, hidden=1024, enc=4, dec=4, neighbour=7, dropout=0.1):
        super().__init__()
        rows, cols = grid
        self.config = dict(channels=channels, grid=list(grid), dim=dim, heads=heads, hidden=hidden, enc=enc, dec=dec, neighbour=neighbour)
        self.grid, self.heads = grid, heads
        self.inp, self.out = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.col, self.row = nn.Parameter(torch.rand(cols, dim // 2)), nn.Parameter(torch.rand(rows, dim // 2))
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(enc))
        self.decoder = nn.ModuleList(DecoderLayer(dim, heads, hidden, rows * cols) for _ in range(dec))
        self.norm = nn.LayerNorm(dim)
        for layer in (self.inp, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.drop = nn.Dropout(dropout)
        forbidden = neighbour_mask(rows, cols, neighbour)
        mask = torch.zeros(rows * cols, rows * cols)
        if forbidden is not None:
            mask = mask.masked_fill(forbidden, -1e9)
        self.register_buffer("mask", mask, persistent=False)

    def position(self):
        """[T, dim] = [column half | row half]."""
        rows, cols = self.grid
        return torch.cat([self.col[None].expand(rows, -1, -1), self.row[:, None].expand(-1, cols, -1)], -1).flatten(0, 1)

    def hidden(self, tokens):
        """The state after the last norm, [N,T,dim]: what the output layer reads."""
        pos = self.position()
        x = self.inp(tokens)
        for layer in self.encoder:
            x = layer(x, pos, self.mask, self.drop)
        memory, out = x, x
        for layer in self.decoder:
            out = layer(out, memory, pos, self.mask, self.drop)
        return self.norm(out)

    def forward(self, tokens):
        return self.out(self.hidden(tokens))


def jitter(tokens, scale=20.0):
    """The paper's feature jittering, on every picture of the batch."""
    return tokens + torch.randn_like(tokens) * (tokens.norm(dim=-1, keepdim=True) / tokens.shape[-1] * scale)


def check(path):
    import json

    from safetensors.torch import load_file

    g, c = load_file(path), json.load(open(path.replace(".safetensors", ".json")))
    net = UniAd(c["channels"], tuple(c["grid"]), c["dim"], c["heads"], c["hidden"], c["enc"], c["dec"], c["neighbour"], 0.0)
    net.load_state_dict({k[7:]: v for k, v in g.items() if k.startswith("weight.")})
    y = net(g["input"])
    loss = (y - g["input"]).square().mean()
    loss.backward()
    # a key bias shifts all scores of a row alike, so its gradient is zero but for rounding: not compared
    worst = max(
        float((p.grad - g["grad." + n]).norm() / g["grad." + n].norm()) for n, p in net.named_parameters() if not n.endswith("k.bias")
    )
    apart = float((y.detach() - g["reconstruction"]).abs().max()), float(abs(loss.detach() - g["loss"][0]))
    print(path.split("/")[-1], "reconstruction, loss:", apart, "gradients, relative:", worst)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        check(path)
