"""Pictures in MVTec-AD layout -> the student's tokens, cached in one .npz: the only place where the Python side preprocesses.

PIL's BILINEAR resize (antialiased) to 224x224, then (pixel - 127) / 128: `cull`'s own definition of preprocessing.
"""

import argparse
import glob
import os

import numpy as np
import torch
from PIL import Image

from cullnet import CullNet

SIZE, MEAN, STD = 224, 127.0, 128.0


def load_student(path):
    net = CullNet()
    net.load_state_dict(torch.load(path)["net"])
    return net.eval().to(memory_format=torch.channels_last)


def scan(folder):
    """[(path, category, split, defect or '', mask path or '')]; `folder` is one category or a folder of categories."""
    categories = [folder] if os.path.isdir(os.path.join(folder, "train")) or os.path.isdir(os.path.join(folder, "test")) else sorted(glob.glob(folder + "/*/"))
    items = []
    for c in categories:
        c = c.rstrip("/")
        for path in sorted(glob.glob(c + "/t*/*/*")):
            split, kind, name = path.split("/")[-3:]
            mask = f"{c}/ground_truth/{kind}/{os.path.splitext(name)[0]}_mask.png"
            items.append((path, os.path.basename(c), split, "" if kind == "good" else kind, mask if os.path.exists(mask) else ""))
    return items


def picture(path):
    """uint8 [3, SIZE, SIZE]."""
    return np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.BILINEAR)).transpose(2, 0, 1)


def mask(path):
    """bool [SIZE, SIZE]: nearest neighbour."""
    return np.asarray(Image.open(path).convert("L").resize((SIZE, SIZE), Image.NEAREST)) > 127 if path else np.zeros((SIZE, SIZE), bool)


def load(folder, cache, good_only=False):
    """dict of arrays: `x` uint8 [N,3,S,S], `mask` bool [N,S,S], `category`, `split`, `defect`, `path`."""
    if os.path.exists(cache):
        return dict(np.load(cache))
    items = [i for i in scan(folder) if not (good_only and i[3])]
    data = {
        "x": np.stack([picture(i[0]) for i in items]),
        "mask": np.stack([mask(i[4]) for i in items]),
        "path": np.array([i[0] for i in items]),
        "category": np.array([i[1] for i in items]),
        "split": np.array([i[2] for i in items]),
        "defect": np.array([i[3] for i in items]),
    }
    np.savez(cache, **data)
    return data


def tokens(net, x, batch=32):
    """uint8 [N,3,S,S] -> float32 [N,196,192]."""
    out = []
    for k in range(0, len(x), batch):
        b = (torch.from_numpy(x[k : k + batch]).float() - MEAN) / STD
        out.append(net.tokens(b.contiguous(memory_format=torch.channels_last)))
    return torch.cat(out)
