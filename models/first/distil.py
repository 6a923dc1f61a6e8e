"""Distil CullNet from a teacher's feature maps (an ONNX file with outputs f2, f4, f8, f16).

The learning rate is warm-up, constant, then linear to zero over the last `--cooldown` steps, so that a run can be continued from a
checkpoint at the constant rate and cooled down whenever time is up. The same arguments give the same batches.
"""

import argparse
import json
import time

import numpy as np
import onnxruntime as ort
import torch

from cullnet import TEACHER_CHANNELS, CullNet, multiply_adds
from synth import Synth, load_images

OUTPUTS = ["f2", "f4", "f8", "f16"]
# The deep map is the hardest to reproduce and carries most of what UniAD sees; the others come cheap.
STAGE_WEIGHT = (0.5, 0.7, 1.0, 2.0)


class Batches(torch.utils.data.IterableDataset):
    """(uint8 pictures, four float16 teacher maps) for ever; one worker process, one thread."""

    def __init__(self, args):
        self.args = args

    def __iter__(self):
        torch.set_num_threads(1)
        a = self.args
        pools, weights = [load_images(a.images, a.cache)], [1.0]
        for spec in a.extra:
            cache, weight = spec.split("=")
            pools.append(torch.from_numpy(np.load(cache)["x"]))
            weights.append(float(weight))
        synth = Synth(pools, weights, a.seed)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        teacher = ort.InferenceSession(a.teacher, options)
        while True:
            x = synth.batch(a.batch * 4, a.size)
            maps = teacher.run(OUTPUTS, {"input": ((x - 127) / 128).numpy()})
            maps = [torch.from_numpy(m.astype(np.float16)) for m in maps]
            # Making a picture and asking the teacher costs as much as a training step: each picture is used `--replay` times.
            for _ in range(a.replay):
                for pick in torch.randperm(len(x), generator=synth.g).split(a.batch):
                    yield x[pick].byte(), [m[pick] for m in maps]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--images", required=True)
    p.add_argument("--cache", default="/tmp/first_images.npy")
    p.add_argument("--extra", nargs="*", default=[], help="further pictures, made by simulate.py: CACHE.npz=WEIGHT")
    p.add_argument("--teacher", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--resume")
    p.add_argument("--steps", type=int, required=True)
    p.add_argument("--cooldown", type=int, default=0)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--replay", type=int, default=2)
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)

    net = CullNet().to(memory_format=torch.channels_last)
    loader = iter(torch.utils.data.DataLoader(Batches(a), batch_size=None, num_workers=1, prefetch_factor=6))
    if a.resume:
        state = torch.load(a.resume)
        net.load_state_dict(state["net"])
        mean, std = state["mean"], state["std"]
    else:  # the teacher's channel statistics over the first pictures; the student regresses (f - mean) / std
        first = [next(loader)[1] for _ in range(32)]
        flat = [torch.cat([b[k].float().permute(1, 0, 2, 3).flatten(1) for b in first], 1) for k in range(4)]
        mean, std = [f.mean(1) for f in flat], [f.std(1).clamp(min=1e-3) for f in flat]
    decay = [q for q in net.parameters() if q.ndim == 4]
    rest = [q for q in net.parameters() if q.ndim != 4]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}], lr=a.lr)
    if a.resume and "opt" in state:
        opt.load_state_dict(state["opt"])

    def save(step):
        torch.save({"net": net.state_dict(), "mean": mean, "std": std, "opt": opt.state_dict(), "step": step}, a.out)

    print("multiply-adds", multiply_adds(), flush=True)
    began, running = time.time(), None
    for step in range(1, a.steps + 1):
        x, maps = next(loader)
        lr = a.lr * min(1.0, step / a.warmup)
        if a.cooldown:
            lr = min(lr, a.lr * (a.steps - step + 1) / a.cooldown)
        for group in opt.param_groups:
            group["lr"] = lr
        ys = net(((x.float() - 127) / 128).contiguous(memory_format=torch.channels_last))
        losses = [
            (y - (t.float() - m[:, None, None]) / s[:, None, None]).square().mean() for y, t, m, s in zip(ys, maps, mean, std)
        ]
        opt.zero_grad()
        sum(w * l for w, l in zip(STAGE_WEIGHT, losses)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        now = np.array([float(l.detach()) for l in losses])
        running = now if running is None else running * 0.97 + now * 0.03
        if step % 50 == 0 or step == a.steps:
            print(json.dumps({"step": step, "lr": round(lr, 6), "mse": [round(float(v), 4) for v in running], "s": round(time.time() - began)}), flush=True)
        if step % 100 == 0 or step == a.steps:
            save(step)


if __name__ == "__main__":
    main()
