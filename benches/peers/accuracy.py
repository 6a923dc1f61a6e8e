"""What int8 costs in accuracy, static against dynamic: image AUROC of one bundle over a folder of products in MVTec-AD layout, in onnxruntime.

Compared are the float file, the file of `cull model quantize` (8-bit weights; its activations are float here, and quantized row by row while it
runs in cull: `cull eval` has those figures), and static QDQ files: convolutions with one scale and zero point for each activation tensor,
calibrated on normal training pictures. All see the same pixels. Needs numpy, Pillow, onnx, onnxruntime, scikit-learn, torch.

    accuracy.py --cull target/release/cull --bundle model.onnx --data data/industrial --work /tmp/accuracy
"""

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from sklearn.metrics import roc_auc_score

PICTURES = {".png", ".jpg", ".jpeg", ".bmp"}


def pictures(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)


def is_pooling(node):
    at = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    return at.get("kernel_shape") == at.get("strides") and at.get("kernel_shape") != [1, 1]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--cull", required=True)
    p.add_argument("--bundle", required=True, help="in float")
    p.add_argument("--data", required=True, type=Path)
    p.add_argument("--work", required=True, type=Path)
    p.add_argument("--calibrate", type=int, default=12, help="normal pictures of each product")
    p.add_argument("--only", help="of the static files those with this word in their label")
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    model = onnx.load(a.bundle)
    meta = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "cull"))
    pre, window = meta["preprocess"], meta["score"]["pooled_max"]["window_px"]
    size = (pre["width_px"], pre["height_px"])
    mean, std = (np.array(pre[key], np.float32) for key in ("mean", "std"))

    def tensor(path):
        pixels = np.asarray(Image.open(path).convert("RGB").resize(size, Image.BILINEAR), np.float32)
        return ((pixels - mean) / std).transpose(2, 0, 1)[None]

    name = model.graph.input[0].name
    products = sorted(folder for folder in a.data.iterdir() if (folder / "test").is_dir())
    normal = [path for folder in products for path in pictures(folder / "train" / "good")[:: max(1, len(pictures(folder / "train" / "good")) // a.calibrate)][: a.calibrate]]

    class Normal(CalibrationDataReader):
        def __init__(self):
            self.left = iter(normal)

        def get_next(self):
            path = next(self.left, None)
            return {name: tensor(path)} if path else None

    weights = a.work / "weights8.onnx"
    subprocess.run([a.cull, "model", "quantize", a.bundle, "--out", weights], check=True, capture_output=True)
    prepared = a.work / "prepared.onnx"
    quant_pre_process(a.bundle, str(prepared), skip_symbolic_shape=True)
    files = {"float": a.bundle, "weights": str(weights)}
    # Windows that do not overlap are pooling, the head's business. `inputs`: as in cull nothing but the inputs of convolutions is quantized.
    pooling = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv" and is_pooling(node)]
    inputs = {"OpTypesToExcludeOutputQuantization": ["Conv"]}
    minmax, percentile = CalibrationMethod.MinMax, CalibrationMethod.Percentile
    for label, method, extra in (
        ("static minmax", minmax, {}), ("static percentile", percentile, {}),
        ("inputs minmax", minmax, inputs), ("inputs percentile", percentile, inputs),
    ):  # fmt: skip
        if a.only and a.only not in label:
            continue
        files[label] = str(a.work / f"{label.replace(' ', '-')}.onnx")
        quantize_static(
            str(prepared), files[label], Normal(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, op_types_to_quantize=["Conv"], calibrate_method=method, nodes_to_exclude=pooling, extra_options=extra,
        )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {label: ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for label, path in files.items()}

    def score(session, x):
        side = torch.nn.functional.interpolate(torch.from_numpy(session.run(None, {name: x})[0]), size=size[::-1], mode="bilinear", align_corners=False)
        return float(torch.nn.functional.avg_pool2d(side, window, stride=1).max())

    torch.set_num_threads(1)
    table = {label: [] for label in files}
    for folder in products:
        tests = [(path, path.relative_to(folder / "test").parts[0] != "good") for path in pictures(folder / "test")]
        scores = {label: [] for label in files}
        for path, _ in tests:
            x = tensor(path)
            for label, session in sessions.items():
                scores[label].append(score(session, x))
        for label in files:
            table[label].append(100 * roc_auc_score([bad for _, bad in tests], scores[label]))
    print(f"{'image AUROC':<18}" + "".join(f"{folder.name:>15}" for folder in products) + f"{'mean':>8}")
    for label, values in table.items():
        print(f"{label:<18}" + "".join(f"{value:15.1f}" for value in values) + f"{np.mean(values):8.1f}")
    print(f"{len(normal)} normal pictures for the calibration")


if __name__ == "__main__":
    main()
