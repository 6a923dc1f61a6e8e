"""Student + UniAD -> one standard ONNX graph, checked against PyTorch in onnxruntime."""

import argparse
import os
import sys

import numpy as np
import onnx
import onnxruntime as ort
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../benches/peers"))
import export_uniad as eu
import features
from cullnet import BLOCKS
from uniad import UniAd

GRID = [14, 14]


def convolution(g, x, layer, name):
    """A ConvBn with its batch norm folded in, and its ReLU6."""
    weight, bias = (t.detach().numpy() for t in layer.folded())
    before, after = layer.pads
    x = g.add(
        "Conv", x, g.const(weight, name + ".weight"), g.const(bias, name + ".bias"),
        kernel_shape=list(weight.shape[2:]), strides=list(layer.conv.stride), pads=[before, before, after, after], group=layer.conv.groups,
    )
    return x if layer.linear else g.add("Clip", x, g.const(np.float32(0), "zero"), g.const(np.float32(6), "six"))


def backbone(g, net, mean, std):
    """`input` -> tokens [196, C], whitened; returns their name."""
    x, side, maps, offset = convolution(g, "input", net.stem, "stem"), features.SIZE // 2, [], 0
    for i, (block, (cout, _, _, stride, tap)) in enumerate(zip(net.blocks, BLOCKS)):
        y = convolution(g, x, block.expand, f"block{i}.expand") if block.expand is not None else x
        y = convolution(g, convolution(g, y, block.depthwise, f"block{i}.depthwise"), block.project, f"block{i}.project")
        x = g.add("Add", x, y) if block.residual else y
        side //= stride
        if tap:
            head, small = net.heads[len(maps)], x
            if [side, side] != GRID:
                sizes = g.const(np.array([1, cout, *GRID]))
                small = g.add("Resize", x, "", "", sizes, mode="linear", coordinate_transformation_mode="align_corners")
            n = head.out_channels
            m, s = mean[offset : offset + n].numpy(), std[offset : offset + n].numpy()
            weight = head.weight.detach().numpy() / s[:, None, None, None]
            bias = (head.bias.detach().numpy() - m) / s
            k = f"head{len(maps)}"
            maps.append((g.add("Conv", small, g.const(weight, k + ".weight"), g.const(bias, k + ".bias"), kernel_shape=[1, 1]), n, GRID))
            offset += n
    return eu.features_to_tokens(g, maps, GRID)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--student", required=True)
    p.add_argument("--uniad", required=True)
    p.add_argument("--residual", choices=["plain", "location", "context"], default="context")
    p.add_argument("--check", required=True, help="CACHE.npz with pictures")
    p.add_argument("--out", required=True)
    a = p.parse_args()
    torch.set_num_threads(1)
    student, state = features.load_student(a.student), torch.load(a.uniad, weights_only=False)
    net = UniAd(**{**state["config"], "grid": tuple(state["config"]["grid"]), "dropout": 0.0})
    net.load_state_dict(state["net"])
    net.eval()
    g = eu.Graph()
    tokens = backbone(g, student, state["mean"], state["std"])
    weights = {k: v.detach().numpy() for k, v in net.state_dict().items()}
    y, hidden = eu.uniad(g, tokens, weights, state["config"])
    if a.residual == "location":
        eu.anomaly_map(g, y, tokens, GRID, g.const(state["shift"].numpy(), "residual.shift"), g.const(state["scale"].numpy(), "residual.scale"))
    elif a.residual == "context":  # exp(-(W h + b)): the minus goes into the weights
        w, b = -state["spread"]["weight"].numpy(), -state["spread"]["bias"].numpy()
        eu.anomaly_map(g, y, tokens, GRID, scale=g.add("Exp", g.linear(hidden, w, b, "spread")))
    else:
        eu.anomaly_map(g, y, tokens, GRID)
    onnx.save(g.model({"input": [1, 3, features.SIZE, features.SIZE]}, {"anomaly_map": [1, 1, *GRID]}), a.out)

    session = ort.InferenceSession(a.out)
    x = np.load(a.check)["x"][:8]
    with torch.no_grad():
        t = (features.tokens(student, x) - state["mean"]) / state["std"]
        r = net(t) - t
        if a.residual == "location":
            r = (r + state["shift"]) * state["scale"]
        elif a.residual == "context":
            r = r * torch.exp(-torch.nn.functional.linear(net.hidden(t), state["spread"]["weight"], state["spread"]["bias"]))
        want = r.norm(dim=-1).view(-1, *GRID).numpy()
    got = np.concatenate([session.run(None, {"input": ((v.astype(np.float32) - 127) / 128)[None]})[0][0] for v in x])
    worst = np.abs(got - want).max() / np.abs(want).max()
    print(f"{a.out}: {os.path.getsize(a.out) / 1e6:.2f} MB; worst difference to PyTorch, relative to the largest value: {worst:.2e}")
    assert worst < 1e-4


if __name__ == "__main__":
    main()
