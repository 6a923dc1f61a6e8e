#!/usr/bin/env python3
"""Training steps of UniAD: cull-trainer next to PyTorch on the same CPU, in turns, with one thread and with two.

    cargo build --release --workspace --example train_steps
    python -m venv V && V/bin/pip install torch safetensors numpy
    V/bin/python trainer/tests/speed/compare.py target/release/examples/train_steps [SHARED]

Both do the paper's step: jitter, forward with dropout, MSE, backward, clipping at 0.1, AdamW. With SHARED (the folder that holds golden/) the PyTorch model
is first checked against the reference vectors, so that both sides compute the same thing. What counts is processor time: wall time on a loaded
machine says more about the load. "peak" is the share of the rate that PyTorch's own matrix product of 1024 x 1024 reaches in the same minute, on one
thread, counting the multiplications that the step takes without any folding (10.2 GFLOP a sample for the paper's model).
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROUNDS = 3
THREADS = (1, 2)
STEPS = 4
# (label, dim, hidden, layers, batch, channels)
SIZES = [("paper: dim 256, batch 8, B4", 256, 1024, 4, 8, 272), ("dim 128, batch 16, Lite0", 128, 512, 4, 16, 192)]


class Uniad(torch.nn.Module):
    """The paper's model for a square neighbour mask, written for speed: one product a projection, fused attention and optimiser."""

    def __init__(self, channels, dim, hidden, layers, heads=8, grid=(14, 14), neighbour=7, dropout=0.1):
        super().__init__()
        self.grid, self.heads, self.p = grid, heads, dropout
        rows, cols = grid
        t = rows * cols
        r, c = torch.arange(t) // cols, torch.arange(t) % cols
        near = ((r[:, None] - r).abs() <= neighbour // 2) & ((c[:, None] - c).abs() <= neighbour // 2)
        self.register_buffer("mask", torch.zeros(t, t).masked_fill(near, float("-inf")))
        lin, norm = torch.nn.Linear, torch.nn.LayerNorm
        self.inp, self.out, self.norm = lin(channels, dim), lin(dim, channels), norm(dim)
        self.col, self.row = torch.nn.Parameter(torch.rand(cols, dim // 2)), torch.nn.Parameter(torch.rand(rows, dim // 2))

        def attention():
            return torch.nn.ModuleDict({n: lin(dim, dim) for n in "qkvo"})

        def ffn():
            return torch.nn.ModuleDict({"up": lin(dim, hidden), "down": lin(hidden, dim)})

        self.encoder = torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn": attention(), "ffn": ffn(), "norm1": norm(dim), "norm2": norm(dim)}) for _ in range(layers)
        )
        self.decoder = torch.nn.ModuleList(
            torch.nn.ModuleDict({"attn1": attention(), "attn2": attention(), "ffn": ffn(), "norm1": norm(dim), "norm2": norm(dim), "norm3": norm(dim)})
            for _ in range(layers)
        )
        self.queries = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(t, dim)) for _ in range(layers))

    def attend(self, w, q, k, v):
        def split(x):
            return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

        q, k, v = split(w["q"](q)), split(w["k"](k)), split(w["v"](v))
        q = q.expand(k.shape[0], -1, -1, -1)
        p = self.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=p)
        return w["o"](x.transpose(1, 2).flatten(2))

    def drop(self, x):
        return F.dropout(x, self.p, self.training)

    def feed(self, w, x):
        return w["down"](self.drop(F.relu(w["up"](x))))

    def forward(self, tokens):
        rows, cols = self.grid
        pos = torch.cat([self.col.repeat(rows, 1), self.row.repeat_interleave(cols, 0)], 1)
        x = self.inp(tokens)
        for l in self.encoder:
            xp = x + pos
            x = l["norm1"](x + self.drop(self.attend(l["attn"], xp, xp, x)))
            x = l["norm2"](x + self.drop(self.feed(l["ffn"], x)))
        memory, out = x, x
        for l, query in zip(self.decoder, self.queries):
            query = query[None]
            y = l["norm1"](query + self.drop(self.attend(l["attn1"], query + pos, memory + pos, memory)))
            y = l["norm2"](y + self.drop(self.attend(l["attn2"], y + pos, out + pos, out)))
            out = l["norm3"](y + self.drop(self.feed(l["ffn"], y)))
        return self.out(self.norm(out))


def check(shared):
    from safetensors.torch import load_file

    j = json.loads((shared / "golden/uniad_tiny.json").read_text())
    v = load_file(shared / "golden/uniad_tiny.safetensors")
    model = Uniad(j["channels"], j["dim"], j["hidden"], j["enc"], j["heads"], tuple(j["grid"]), j["neighbour"], 0.0)
    state = {}
    for name in model.state_dict():
        golden = name
        if name.startswith("queries."):
            golden = f"decoder.{name.split('.')[1]}.query"
        state[name] = v[f"weight.{golden}"] if f"weight.{golden}" in v else model.state_dict()[name]
    missing = [n for n in state if n != "mask" and not n.startswith("queries.") and f"weight.{n}" not in v]
    assert not missing, missing
    model.load_state_dict(state)
    with torch.no_grad():
        error = float((model.eval()(v["input"]) - v["reconstruction"]).norm() / v["reconstruction"].norm())
    assert error < 1e-5, error
    print(f"the PyTorch model is the reference's: reconstruction differs by {error:.1e}")


def processor_seconds():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def gflop(dim, hidden, layers, channels, tokens=196):
    """Of one sample, forward and backward."""
    linear = tokens * (2 * channels * dim + layers * (12 * dim * dim + 4 * dim * hidden))
    attention = 3 * layers * 2 * tokens * tokens * dim
    return 6 * (linear + attention) / 1e9


def peak():
    """GFLOP/s of processor time of a matrix product on one thread: the best of a few."""
    torch.set_num_threads(1)
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best = 0.0
    for _ in range(5):
        start = processor_seconds()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * 1024**3 / 1e9 / max(processor_seconds() - start, 1e-9))
    return best


def torch_seconds(threads, dim, hidden, layers, batch, channels):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = Uniad(channels, dim, hidden, layers).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    features = torch.rand(2 * batch, 196, channels) * 2 - 1
    for step in range(STEPS + 1):
        if step == 1:
            start, cpu = time.perf_counter(), processor_seconds()
        clean = features[(step % 2) * batch :][:batch]
        noise = torch.randn_like(clean) * (clean.norm(dim=2, keepdim=True) / channels * 20)
        loss = F.mse_loss(model(clean + noise), clean)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimiser.step()
        loss.item()
    return (time.perf_counter() - start) / STEPS, (processor_seconds() - cpu) / STEPS


def our_seconds(binary, threads, dim, hidden, layers, batch, channels):
    arguments = {"threads": threads, "dim": dim, "hidden": hidden, "layers": layers, "batch": batch, "channels": channels, "steps": STEPS}
    command = [binary] + [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    return figures["wall_s"], figures["processor_s"]


def main():
    binary = sys.argv[1]
    if len(sys.argv) > 2:
        check(Path(sys.argv[2]))
    print(f"torch {torch.__version__}, {ROUNDS} rounds of {STEPS} steps in turns; load {os.getloadavg()[0]:.1f}")
    print(f"{'':<33}       {'ours':>21} {'PyTorch':>21}   ours / PyTorch   ours")
    print(f"{'ms a sample':<33}threads{'wall':>10}{'CPU':>10}{'wall':>12}{'CPU':>10}   {'wall':>7}{'CPU':>7}   share of peak")
    for label, *size in SIZES:
        for threads in THREADS:
            ours, theirs, rates = [], [], []
            for _ in range(ROUNDS):
                rates.append(peak())
                ours.append(our_seconds(binary, threads, *size))
                theirs.append(torch_seconds(threads, *size))
            dim, hidden, layers, batch, channels = size
            a_sample = 1e3 / batch
            (ow, oc), (tw, tc) = ([statistics.median(column) * a_sample for column in zip(*rows)] for rows in (ours, theirs))
            share = gflop(dim, hidden, layers, channels) / (oc / 1e3) / statistics.median(rates)
            print(
                f"{label:<33}{threads:>7}{ow:>10.1f}{oc:>10.1f}{tw:>12.1f}{tc:>10.1f}   {ow / tw:>7.2f}{oc / tc:>7.2f}"
                f"   {share:.0%} of {statistics.median(rates):.0f} GFLOP/s",
                flush=True,
            )


main()
