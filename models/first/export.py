"""Detector -> one standard ONNX graph with batch norm folded, checked against PyTorch in onnxruntime; and its calibration.

Writes GRAPH.onnx and META.json for `cull model pack`. The calibration scores are those of held-out normal parts of another seed.
"""

import argparse
import json
import os
import sys

import numpy as np
import onnx
import onnxruntime as ort
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../benches/peers"))
import export_uniad as eu
from cullnet import BLOCKS
from detector import FUSE, SHIFT, Detector
from spec import GRID, HEIGHT, MEAN, STD, WIDTH
from train_detector import report, score


def convolution(g, x, layer, name):
    """A ConvBn with its batch norm folded in, and its ReLU6."""
    weight, bias = (t.detach().numpy() for t in layer.folded())
    before, after = layer.pads
    x = g.add(
        "Conv", x, g.const(weight, name + ".weight"), g.const(bias, name + ".bias"),
        kernel_shape=list(weight.shape[2:]), strides=list(layer.conv.stride), pads=[before, before, after, after], group=layer.conv.groups,
    )  # fmt: skip
    return x if layer.linear else g.add("Clip", x, g.const(np.float32(0), "zero"), g.const(np.float32(6), "six"))


def build(net):
    """The graph: `input` [1,3,HEIGHT,WIDTH] normalised -> `anomaly_map` [1,1,*GRID]."""
    g = eu.Graph()
    x, taps = convolution(g, "input", net.backbone.stem, "stem"), []
    for i, (block, (_, _, _, _, tap)) in enumerate(zip(net.backbone.blocks, BLOCKS)):
        y = convolution(g, x, block.expand, f"block{i}.expand") if block.expand is not None else x
        y = convolution(g, convolution(g, y, block.depthwise, f"block{i}.depthwise"), block.project, f"block{i}.project")
        x = g.add("Add", x, y) if block.residual else y
        if tap:
            taps.append(x)
    maps = []
    for i, (layer, tap, (_, channels, how)) in enumerate(zip(net.fuse, taps, FUSE)):
        y = convolution(g, tap, layer, f"fuse{i}")
        if how and how[0] == "max":
            y = g.add("MaxPool", y, kernel_shape=[how[1]] * 2, strides=[how[1]] * 2)
        elif how:
            sizes = g.const(np.array([1, channels, *GRID]))
            y = g.add("Resize", y, "", "", sizes, mode="linear", coordinate_transformation_mode="align_corners")
        maps.append(y)
    y = convolution(g, g.add("Concat", *maps, axis=1), net.mix1, "mix1")
    y = convolution(g, g.add("Add", convolution(g, y, net.depthwise, "mix.depthwise"), y), net.mix2, "mix2")
    # softplus(logit + SHIFT), the shift in the bias
    bias = net.out.bias.detach().numpy() + SHIFT
    y = g.add("Conv", y, g.const(net.out.weight.detach().numpy(), "out.weight"), g.const(bias, "out.bias"), kernel_shape=[1, 1])
    g.add("Softplus", y, out="anomaly_map")
    return g.model({"input": [1, 3, HEIGHT, WIDTH]}, {"anomaly_map": [1, 1, *GRID]})


def run_all(session, x):
    """uint8 [N,3,HEIGHT,WIDTH] -> maps [N,*GRID], through the exported graph."""
    return torch.from_numpy(
        np.concatenate([session.run(None, {"input": ((v.astype(np.float32) - np.float32(MEAN)) / np.float32(STD))[None]})[0][0] for v in x])
    )


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--detector", required=True)
    p.add_argument("--normal", required=True, help="CACHE.npz of held-out normal parts: calibration")
    p.add_argument("--test", help="CACHE.npz with defects: reported")
    p.add_argument("--rule", default="pooled_max:8", help="pooled_max:WINDOW_PX or top_mean:SHARE")
    p.add_argument("--notes", default="")
    p.add_argument("--name", default="cull-first-line")
    p.add_argument("--out", required=True, help="writes OUT.onnx and OUT.json")
    a = p.parse_args()
    torch.set_num_threads(1)
    net = Detector()
    net.load_state_dict(torch.load(a.detector)["net"])
    net.eval()
    onnx.save(build(net), a.out + ".onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(a.out + ".onnx", options)

    normal = dict(np.load(a.normal))
    maps = run_all(session, normal["x"])
    with torch.no_grad():
        want = net.anomaly_map((torch.from_numpy(normal["x"][:8]).float() - MEAN) / STD)[:, 0]
    worst = float((maps[:8] - want).abs().max() / want.abs().max())
    print(f"{a.out}.onnx: {os.path.getsize(a.out + '.onnx') / 1e6:.2f} MB; worst difference to PyTorch, relative to the largest value: {worst:.1e}")
    assert worst < 1e-4
    kind, value = a.rule.split(":")
    rule = (kind, int(value) if kind == "pooled_max" else float(value))
    scores = sorted(float(s) for s in score(maps, rule))
    meta = {
        "format": 1,
        "name": a.name,
        "created": "",
        "preprocess": {"width_px": WIDTH, "height_px": HEIGHT, "mean": [MEAN] * 3, "std": [STD] * 3},
        "grid": list(GRID),
        "score": {kind: {"window_px": rule[1]} if kind == "pooled_max" else {"share": rule[1]}},
        "calibration": {"normal_scores": scores},
        "trained_on": ["simulated line, normal parts only: " + ", ".join(sorted({str(c) for c in normal["category"]}))],
        "notes": a.notes,
    }
    del meta["created"]
    json.dump(meta, open(a.out + ".json", "w"))
    print("calibration:", len(scores), "scores, median %.3f, 99.5 %% %.3f, highest %.3f" % (np.median(scores), np.quantile(scores, 0.995), scores[-1]))
    if a.test:
        test = dict(np.load(a.test))
        maps = run_all(session, test["x"])
        report(maps, test, [rule])
        np.savez(a.out + "_test.npz", maps=maps.numpy(), score=score(maps, rule).numpy(), calibration=np.array(scores))


if __name__ == "__main__":
    main()
