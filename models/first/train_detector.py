"""Train the detector on pictures of normal parts, damaged by `pseudo.py`. No real or simulated defect is ever shown to it."""

import argparse
import json
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

import pseudo
from detector import Detector
from spec import HEIGHT, MEAN, STD, STRIDE, WIDTH

# Focal loss: well-judged cells, nearly all of them, fade out.
GAMMA = 1.5


class Batches(torch.utils.data.IterableDataset):
    """(damaged pictures uint8, change per cell in grey levels) for ever."""

    def __init__(self, a):
        self.a = a

    def __iter__(self):
        torch.set_num_threads(1)
        g = torch.Generator().manual_seed(self.a.seed)
        x, maker = torch.from_numpy(np.load(self.a.train)["x"]), pseudo.Pseudo(self.a.seed + 1)
        while True:
            b = x[torch.randint(len(x), (self.a.batch,), generator=g)].float()
            # a little more variety of light and noise than 1500 parts show
            gain = 1 + 0.05 * torch.randn(len(b), 1, 1, 1, generator=g)
            b = (b * gain + 3 * torch.randn(len(b), 3, 1, 1, generator=g)).clamp(0, 255)
            b, change = maker.damage(b)
            b = b + torch.randn(b.shape, generator=g) * torch.rand(len(b), 1, 1, 1, generator=g) * 1.5
            yield b.clamp(0, 255).round().byte(), F.max_pool2d(change, STRIDE)


def loss_of(logits, change):
    positive = change > pseudo.VISIBLE
    judged = positive | (change < pseudo.VISIBLE / 2)
    p = torch.sigmoid(logits)
    cell = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
    focal = torch.where(positive, 1 - p, p) ** GAMMA * cell * judged
    cells = focal.sum() / positive.sum().clamp(min=20)
    # what counts in the end is each picture's highest value: soft maximum against "anything wrong?"
    top = torch.logsumexp(logits.flatten(1) * 2, 1) / 2
    any_bad = (change > pseudo.VISIBLE).flatten(1).any(1)
    picture = F.binary_cross_entropy_with_logits(top, any_bad.float())
    return cells, picture


def maps_of(net, x, batch=16):
    net.eval()
    out = []
    with torch.no_grad():
        for k in range(0, len(x), batch):
            b = (torch.from_numpy(x[k : k + batch]).float() - MEAN) / STD
            out.append(net.anomaly_map(b.contiguous(memory_format=torch.channels_last))[:, 0])
    return torch.cat(out)


def score(maps, rule):
    """maps [N,*GRID] -> [N]. `rule`: ("pooled_max", window px) or ("top_mean", share): `cull`'s score rules."""
    if rule[0] == "pooled_max":
        up = F.interpolate(maps[:, None], size=(HEIGHT, WIDTH), mode="bilinear", align_corners=True)
        return F.avg_pool2d(up, rule[1], 1).flatten(1).max(1).values
    flat = maps.flatten(1).sort(descending=True).values
    return flat[:, : max(1, round(rule[1] * flat.shape[1]))].mean(1)


def pixel_auroc(maps, masks, every=5):
    """On every `every`-th pixel in each direction of the upsampled map."""
    up = F.interpolate(maps[:, None], size=(HEIGHT, WIDTH), mode="bilinear", align_corners=True)[:, 0]
    return roc_auc_score(masks[:, ::every, ::every].ravel(), up[:, ::every, ::every].numpy().ravel())


RULES = [("pooled_max", 1), ("pooled_max", 4), ("pooled_max", 8), ("pooled_max", 16), ("top_mean", 0.003), ("top_mean", 0.006), ("top_mean", 0.012)]


def report(maps, data, rules=RULES):
    bad = data["defect"] != ""
    for rule in rules:
        s = score(maps, rule).numpy()
        limit = np.quantile(s[~bad], 0.995)
        each = {str(c): round(roc_auc_score(bad[q], s[q]), 3) for c in np.unique(data["category"]) for q in [data["category"] == c]}
        print("%s %g: image AUROC %.4f, recall at 0.5 %% false rejects %.3f" % (*rule, roc_auc_score(bad, s), (s[bad] > limit).mean()), each, flush=True)
    print("pixel AUROC %.4f" % pixel_auroc(maps, data["mask"]), flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--student", help="distilled backbone to start from")
    p.add_argument("--resume")
    p.add_argument("--train", required=True, help="CACHE.npz of normal parts")
    p.add_argument("--val", required=True, help="CACHE.npz with defects: measured, never trained on")
    p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=900)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=50)
    p.add_argument("--cooldown", type=int, default=300)
    p.add_argument("--eval-every", type=int, default=300)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--freeze", type=int, default=0, help="leave the stem and this many blocks alone: half the time of a step")
    p.add_argument("--stop-file", default="", help="when this file appears, the cool-down starts at once (the log says where)")
    a = p.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)
    net = Detector().to(memory_format=torch.channels_last)
    if a.student:
        net.backbone.load_state_dict(torch.load(a.student)["net"])
    state = torch.load(a.resume) if a.resume else {}
    if state:
        net.load_state_dict(state["net"])
    for head in net.backbone.heads:  # not used here
        head.requires_grad_(False)
    used = [q for q in net.parameters() if q.requires_grad]
    opt = torch.optim.AdamW(
        [{"params": [q for q in used if q.ndim == 4], "weight_decay": 0.02}, {"params": [q for q in used if q.ndim != 4], "weight_decay": 0.0}], lr=a.lr
    )
    if state:
        opt.load_state_dict(state["opt"])
    loader = iter(torch.utils.data.DataLoader(Batches(a), batch_size=None, num_workers=1, prefetch_factor=4))
    val = dict(np.load(a.val))
    began, running, steps, step = time.time(), None, a.steps, 0
    while step < steps:
        step += 1
        if a.stop_file and os.path.exists(a.stop_file) and steps > step + a.cooldown:
            steps = step + a.cooldown
            print("cool-down: ends at step", steps, flush=True)
        x, change = next(loader)
        lr = a.lr * min(1.0, step / a.warmup, (steps - step + 1) / max(1, a.cooldown))
        for group in opt.param_groups:
            group["lr"] = lr
        net.train()
        if a.freeze:  # their batch norm stays as it is, too
            net.backbone.stem.eval()
            net.backbone.blocks[: a.freeze].eval()
        x = ((x.float() - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        cells, picture = loss_of(net(x, a.freeze), change)
        opt.zero_grad()
        (cells + 0.5 * picture).backward()
        torch.nn.utils.clip_grad_norm_(used, 2.0)
        opt.step()
        now = np.array([float(cells.detach()), float(picture.detach())])
        running = now if running is None else running * 0.96 + now * 0.04
        if step % 25 == 0:
            print(json.dumps({"step": step, "lr": round(lr, 6), "loss": [round(float(v), 4) for v in running], "s": round(time.time() - began)}), flush=True)
        if step % 50 == 0 or step >= steps:
            torch.save({"net": net.state_dict(), "opt": opt.state_dict(), "step": step, "args": vars(a)}, a.out)
        if step % a.eval_every == 0 or step >= steps:
            report(maps_of(net, val["x"]), val)


if __name__ == "__main__":
    main()
