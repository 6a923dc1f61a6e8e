"""UniAD as standard ONNX (opset 17, batch 1), with random or given weights, alone or behind a backbone.

The same graph goes to every engine that is compared. It is written node by node, so that it holds the plain pattern
MatMul, Add(mask), Softmax, MatMul for each head-split attention and MatMul + Add for each linear, whatever an exporter's version
would make of it. Needs numpy and onnx; `--check` needs onnxruntime, `--weights` needs safetensors.

    export_uniad.py --out uniad_paper.onnx                                # features [1,272,14,14] -> anomaly_map, paper size
    export_uniad.py --out uniad_stem.onnx --stem                          # picture [1,3,14,14] -> anomaly_map, paper size
    export_uniad.py --out lite0_uniad.onnx --backbone FEATURES.onnx       # picture [1,3,224,224] -> anomaly_map
    export_uniad.py --out golden.onnx --weights GOLDEN.safetensors        # sizes from the .json beside it
"""

import argparse
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
# Added to the scores of forbidden pairs: finite, so that no engine meets inf - inf; exp() of it is zero all the same.
FORBIDDEN = -1e9


class Graph:
    """Collects nodes and initialisers; every method returns the name of its output tensor."""

    def __init__(self):
        self.nodes, self.inits, self.count = [], {}, 0

    def const(self, array, name=None):
        array = np.ascontiguousarray(array)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
        name = name or f"c{len(self.inits)}"
        self.inits.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def add(self, op, *inputs, out=None, **attributes):
        self.count += 1
        out = out or f"{op.lower()}_{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=out + "_node", **attributes))
        return out

    def linear(self, x, weight, bias, name):
        """x [T, in], weight [out, in] as PyTorch keeps it."""
        y = self.add("MatMul", x, self.const(weight.T, name + ".weight"))
        return self.add("Add", y, self.const(bias, name + ".bias"))

    def reshape(self, x, *shape):
        return self.add("Reshape", x, self.const(np.array(shape), "shape_" + "_".join(map(str, shape))))

    def model(self, inputs, outputs, meta=None):
        """`inputs`, `outputs`: {name: shape}, all float32."""
        value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        graph = helper.make_graph(
            self.nodes, "cull", [value(*i) for i in inputs.items()], [value(*o) for o in outputs.items()], list(self.inits.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="cull")
        model.ir_version = 8  # what opset 17 shipped with; older engines refuse newer ones
        for key, text in (meta or {}).items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, text
        onnx.checker.check_model(model, full_check=True)
        return model


def neighbour_mask(rows, cols, neighbour):
    """[T, T] bool, true = may not attend."""
    r, c = np.repeat(np.arange(rows), cols), np.tile(np.arange(cols), rows)
    near = neighbour // 2
    return (abs(r[:, None] - r) <= near) & (abs(c[:, None] - c) <= near) & (neighbour > 0)


def features_to_tokens(g, maps, grid):
    """Feature maps [1,C,H,W] -> tokens [T, sum of C]: bilinear resize with align corners, concatenate, channels last."""
    rows, cols = grid
    small = []
    for name, channels, size in maps:
        if tuple(size) != tuple(grid):
            name = g.add(
                "Resize", name, "", "", g.const(np.array([1, channels, rows, cols])), mode="linear", coordinate_transformation_mode="align_corners"
            )
        small.append(name)
    x = g.add("Concat", *small, axis=1) if len(small) > 1 else small[0]
    total = sum(m[1] for m in maps)
    return g.add("Transpose", g.reshape(x, total, rows * cols), perm=[1, 0])


def uniad(g, tokens, w, config):
    """Tokens [T, C] -> (reconstruction [T, C], hidden state [T, dim] it was made from). `w`: golden-style names to arrays."""
    rows, cols = config["grid"]
    count, dim, heads = rows * cols, config["dim"], config["heads"]
    each = dim // heads
    mask = g.const(np.where(neighbour_mask(rows, cols, config["neighbour"]), FORBIDDEN, 0.0)[None], "mask") if config["neighbour"] else None
    position = np.concatenate([np.tile(w["col"][None], (rows, 1, 1)), np.tile(w["row"][:, None], (1, cols, 1))], -1).reshape(count, dim)
    pos = g.const(position, "position")

    def attention(q, k, v, p):
        scale = each**-0.5  # folded into the query projection
        parts = []
        for x, letter, factor, perm in ((q, "q", scale, [1, 0, 2]), (k, "k", 1.0, [1, 2, 0]), (v, "v", 1.0, [1, 0, 2])):
            y = g.linear(x, w[f"{p}.{letter}.weight"] * factor, w[f"{p}.{letter}.bias"] * factor, f"{p}.{letter}")
            parts.append(g.add("Transpose", g.reshape(y, count, heads, each), perm=perm))
        scores = g.add("MatMul", parts[0], parts[1])
        if mask:
            scores = g.add("Add", scores, mask)
        y = g.add("MatMul", g.add("Softmax", scores, axis=-1), parts[2])
        y = g.reshape(g.add("Transpose", y, perm=[1, 0, 2]), count, dim)
        return g.linear(y, w[p + ".o.weight"], w[p + ".o.bias"], p + ".o")

    def norm(x, p):
        return g.add("LayerNormalization", x, g.const(w[p + ".weight"], p + ".weight"), g.const(w[p + ".bias"], p + ".bias"), axis=-1, epsilon=1e-5)

    def ffn(x, p):
        y = g.add("Relu", g.linear(x, w[p + ".up.weight"], w[p + ".up.bias"], p + ".up"))
        return g.linear(y, w[p + ".down.weight"], w[p + ".down.bias"], p + ".down")

    x = g.linear(tokens, w["inp.weight"], w["inp.bias"], "inp")
    for i in range(config["enc"]):
        p = f"encoder.{i}"
        q = g.add("Add", x, pos)
        x = norm(g.add("Add", x, attention(q, q, x, p + ".attn")), p + ".norm1")
        x = norm(g.add("Add", x, ffn(x, p + ".ffn")), p + ".norm2")
    memory, out = x, x
    memory_pos = g.add("Add", memory, pos)
    for i in range(config["dec"]):
        p = f"decoder.{i}"
        query = g.const(w[p + ".query"], p + ".query")
        t = norm(g.add("Add", query, attention(g.add("Add", query, pos), memory_pos, memory, p + ".attn1")), p + ".norm1")
        out_pos = g.add("Add", out, pos)
        t = norm(g.add("Add", t, attention(g.add("Add", t, pos), out_pos, out, p + ".attn2")), p + ".norm2")
        out = norm(g.add("Add", t, ffn(t, p + ".ffn")), p + ".norm3")
    hidden = norm(out, "norm")
    return g.linear(hidden, w["out.weight"], w["out.bias"], "out"), hidden


def anomaly_map(g, reconstruction, tokens, grid, shift=None, scale=None):
    """L2 norm over channels of the residual as `anomaly_map` [1,1,rows,cols]; optionally of (residual + shift) * scale, both names of
    tensors that broadcast to [T, C]."""
    r = g.add("Sub", reconstruction, tokens)
    if shift is not None:
        r = g.add("Add", r, shift)
    if scale is not None:
        r = g.add("Mul", r, scale)
    total = g.add("ReduceSum", g.add("Mul", r, r), g.const(np.array([1]), "axis_1"), keepdims=0)
    return g.add("Reshape", g.add("Sqrt", total), g.const(np.array([1, 1, *grid]), "map_shape"), out="anomaly_map")


def random_weights(config, seed):
    """Xavier-uniform linears, N(0,1) queries, U(0,1) positions, as the paper initialises."""
    rng, w = np.random.default_rng(seed), {}
    c, d, h = config["channels"], config["dim"], config["hidden"]
    rows, cols = config["grid"]

    def linear(name, out, inp):
        bound = (6 / (out + inp)) ** 0.5
        w[name + ".weight"] = rng.uniform(-bound, bound, (out, inp)).astype(np.float32)
        w[name + ".bias"] = np.zeros(out, np.float32)

    def norm(name):
        w[name + ".weight"], w[name + ".bias"] = np.ones(d, np.float32), np.zeros(d, np.float32)

    linear("inp", d, c)
    linear("out", c, d)
    norm("norm")
    w["col"], w["row"] = rng.random((cols, d // 2), np.float32), rng.random((rows, d // 2), np.float32)
    for kind, attentions, layers in (("encoder", ["attn"], config["enc"]), ("decoder", ["attn1", "attn2"], config["dec"])):
        for i in range(layers):
            p = f"{kind}.{i}"
            for a in attentions:
                for letter in "qkvo":
                    linear(f"{p}.{a}.{letter}", d, d)
            linear(p + ".ffn.up", h, d)
            linear(p + ".ffn.down", d, h)
            for k in range(len(attentions) + 1):
                norm(f"{p}.norm{k + 1}")
            if kind == "decoder":
                w[p + ".query"] = rng.standard_normal((rows * cols, d)).astype(np.float32)
    return w


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", required=True)
    p.add_argument("--backbone", help="ONNX file with outputs f2, f4, f8, f16 for `input` [1,3,224,224]")
    p.add_argument("--stem", action="store_true", help="picture [1,3,14,14] and a 1x1 convolution to the features: what a bundle can hold")
    p.add_argument("--weights", help="safetensors with golden-style names")
    p.add_argument("--channels", type=int, default=272)
    p.add_argument("--dim", type=int, default=256)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--enc", type=int, default=4)
    p.add_argument("--dec", type=int, default=4)
    p.add_argument("--neighbour", type=int, default=7)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--check", action="store_true", help="run once in onnxruntime")
    a = p.parse_args()
    config = dict(channels=a.channels, grid=[14, 14], dim=a.dim, heads=a.heads, hidden=a.hidden, enc=a.enc, dec=a.dec, neighbour=a.neighbour)
    g, size = Graph(), 224
    if a.weights:
        from safetensors.numpy import load_file

        stored = load_file(a.weights)
        config.update({k: v for k, v in json.load(open(a.weights.replace(".safetensors", ".json"))).items() if k in config})
        w = {k[7:]: v for k, v in stored.items() if k.startswith("weight.")}
    if a.backbone:
        b = onnx.load(a.backbone)
        shapes = {}
        b.graph.input[0].type.tensor_type.shape.CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size]).type.tensor_type.shape)
        for v in b.graph.output:
            v.type.tensor_type.ClearField("shape")
        for v in onnx.shape_inference.infer_shapes(b).graph.output:
            shapes[v.name] = [d.dim_value for d in v.type.tensor_type.shape.dim]
        g.nodes, g.inits = list(b.graph.node), {t.name: t for t in b.graph.initializer}
        maps = [(n, shapes[n][1], shapes[n][2:]) for n in ("f2", "f4", "f8", "f16")]
        config["channels"] = sum(m[1] for m in maps)
        inputs = {"input": [1, 3, size, size]}
    else:
        maps = [("input", config["channels"], config["grid"])]
        inputs = {"input": [1, config["channels"], *config["grid"]]}
    if a.stem:
        stem = np.random.default_rng(a.seed + 1).standard_normal((config["channels"], 3, 1, 1)).astype(np.float32)
        maps = [(g.add("Conv", "input", g.const(stem, "stem.weight"), kernel_shape=[1, 1]), config["channels"], config["grid"])]
        inputs = {"input": [1, 3, *config["grid"]]}
    if not a.weights:
        w = random_weights(config, a.seed)
    tokens = features_to_tokens(g, maps, config["grid"])
    y, _ = uniad(g, tokens, w, config)
    anomaly_map(g, y, tokens, config["grid"])
    model = g.model(inputs, {"anomaly_map": [1, 1, *config["grid"]]})
    onnx.save(model, a.out)
    print(a.out, config, f"{sum(v.size for v in w.values()) / 1e6:.2f} M parameters in the transformer")
    if a.check:
        import onnxruntime as ort

        x = np.random.default_rng(1).standard_normal(list(inputs.values())[0]).astype(np.float32)
        if a.weights:
            x = stored["input"][:1].transpose(0, 2, 1).reshape(x.shape)
        out = ort.InferenceSession(a.out).run(None, {"input": x})[0]
        print("map", out.shape, "min", out.min(), "max", out.max())
        if a.weights:
            truth = np.sqrt(((stored["reconstruction"][0] - stored["input"][0]) ** 2).sum(-1)).reshape(out.shape)
            print("worst difference to the reference", abs(out - truth).max())


if __name__ == "__main__":
    main()
