#!/usr/bin/env python3
"""`cull-trainer import-backbone` against the networks themselves.

For EfficientNet-B0 to B4 of torchvision, timm (plain and tf_) and lukemelas, with random weights and random batch norm statistics: saves the weights in
every format that they are published in, imports each file, runs the ONNX file with onnxruntime and compares all four outputs with the original network.

    python -m venv V && V/bin/pip install torch torchvision timm efficientnet_pytorch onnxruntime safetensors
    cargo build --release --workspace --bin cull-trainer
    V/bin/python trainer/tests/import/verify.py target/release/cull-trainer [b0 b4 ...]

Exits with 1 when an output differs by more than 1e-4 of the largest value of that output. Needs no published file and no network.
"""

import collections
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import onnxruntime
import torch
from safetensors.torch import save_file

# Threads that spin for each other make minutes of seconds on a busy machine.
torch.set_num_threads(1)

TOLERANCE = 1e-4
# 200 is odd at stride 8.
SIDES = [224, 200]
# Last block of stages 1, 2, 3 and 5, counted over the whole network: strides 2, 4, 8, 16.
STAGES = [1, 2, 3, 5]


def randomise(model, seed):
    """Random weights; batch norm statistics near those of real activations, as training leaves them. Some channels are faint: there the epsilon decides.
    Variances are somewhat larger than the activations': a deep random network that normalises fully is chaotic and multiplies rounding by 1e5, in any
    framework."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = torch.randn(module.weight.shape) / module.weight[0].numel() ** 0.5
            if module.bias is None:
                module.weight.data *= 10 ** (1.5 * torch.rand(module.out_channels, 1, 1, 1) - 1.5)
            else:
                module.bias.data = 0.5 * torch.randn(module.bias.shape)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.num_features)
            module.bias.data = 0.2 * torch.randn(module.num_features)
            module.momentum = 1.0  # the statistics of the one batch below
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 96, 96))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += 0.3 * module.running_var.sqrt() * torch.randn(module.num_features)
            module.running_var *= 1 + 2 * torch.rand(module.num_features)
    return model.eval()


def torchvision_net(b):
    import torchvision

    model = getattr(torchvision.models, f"efficientnet_{b}")(weights=None)
    return model, lambda: [model.features[stage] for stage in STAGES]


def timm_net(b, prefix=""):
    import timm

    model = timm.create_model(f"{prefix}efficientnet_{b}", pretrained=False)
    return model, lambda: [model.blocks[stage - 1] for stage in STAGES]


def lukemelas_net(b, image_size):
    from efficientnet_pytorch import EfficientNet

    override = {} if image_size is None else {"image_size": image_size}
    model = EfficientNet.from_name(f"efficientnet-{b}", **override)
    ends = []
    strides_seen = 0
    # A stage ends where the next block changes its width; stages 1, 2, 3 and 5 are the ones wanted.
    outs = [block._block_args.output_filters for block in model._blocks]
    for i, out in enumerate(outs):
        if i + 1 == len(outs) or outs[i + 1] != out:
            strides_seen += 1
            if strides_seen in STAGES:
                ends.append(model._blocks[i])
    return model, lambda: ends


def reference(model, hooks, x):
    """Outputs of the wanted blocks."""
    found = []
    handles = [module.register_forward_hook(lambda _m, _i, out: found.append(out.detach().numpy())) for module in hooks()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def main():
    binary = Path(sys.argv[1])
    archs = sys.argv[2:] or ["b0", "b1", "b2", "b3", "b4"]
    worst = 0.0
    files = 0
    print(f"{'largest difference from the network in float64':<60} ours     PyTorch's own float32")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def compare(label, model, hooks, file, arguments):
            nonlocal worst, files
            onnx = folder / "out.onnx"
            command = [binary, "import-backbone", "--weights", file, "--out", onnx, *arguments]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{label}: {done.stderr.strip()}")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
            names = [o.name for o in session.get_outputs()]
            assert names == ["f2", "f4", "f8", "f16"], names
            errors, own = [], []
            for side in SIDES:
                if "tf" in label and side != 224:
                    continue  # padded for the side given at import, 224 by default
                x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
                ours = session.run(None, {"input": x.numpy()})
                rounded = reference(model, hooks, x)
                theirs = reference(model.double(), hooks, x.double())
                model.float()
                for a, b, c in zip(ours, theirs, rounded):
                    assert a.shape == b.shape, (label, a.shape, b.shape)
                    errors.append(float(numpy.abs(a - b).max() / numpy.abs(b).max()))
                    own.append(float(numpy.abs(c - b).max() / numpy.abs(b).max()))
            channels = "+".join(str(t.shape[1]) for t in theirs)
            files += 1
            worst = max(worst, *errors)
            verdict = "ok" if max(errors) <= TOLERANCE else "DIFFERS"
            print(f"{label:<44} {channels:<15} {max(errors):.1e}  {max(own):.1e}  {verdict}", flush=True)

        for b in archs:
            seed = int(b[1])
            model, hooks = torchvision_net(b)
            state = randomise(model, seed).state_dict()
            torch.save(state, folder / "efficientnet.pth")
            compare(f"torchvision {b} .pth (zip)", model, hooks, folder / "efficientnet.pth", [])
            torch.save(state, folder / "efficientnet_old.pth", _use_new_zipfile_serialization=False)
            compare(f"torchvision {b} .pth (old)", model, hooks, folder / "efficientnet_old.pth", ["--arch", f"efficientnet-{b}"])
            save_file({k: v.contiguous() for k, v in state.items()}, folder / "tv.safetensors")
            compare(f"torchvision {b} .safetensors", model, hooks, folder / "tv.safetensors", [])

            model, hooks = timm_net(b)
            state = randomise(model, seed + 10).state_dict()
            save_file({k: v.contiguous() for k, v in state.items()}, folder / f"efficientnet_{b}.safetensors")
            compare(f"timm {b} .safetensors", model, hooks, folder / f"efficientnet_{b}.safetensors", [])

            model, hooks = timm_net(b, "tf_")
            state = randomise(model, seed + 20).state_dict()
            save_file({k: v.contiguous() for k, v in state.items()}, folder / f"tf_efficientnet_{b}.safetensors")
            compare(f"timm tf_ {b} .safetensors", model, hooks, folder / f"tf_efficientnet_{b}.safetensors", [])
            # A training checkpoint of a network on several GPUs, old format.
            wrapped = {"epoch": 7, "state_dict": collections.OrderedDict((f"module.{k}", v) for k, v in state.items())}
            torch.save(wrapped, folder / "any.pth", _use_new_zipfile_serialization=False)
            compare(f"timm tf_ {b} .pth (checkpoint, old)", model, hooks, folder / "any.pth", ["--source", "timm-tf"])

            model, hooks = lukemelas_net(b, None)
            state = randomise(model, seed + 30).state_dict()
            torch.save(state, folder / "lukemelas.pth", _use_new_zipfile_serialization=False)
            compare(f"lukemelas {b} .pth (old)", model, hooks, folder / "lukemelas.pth", [])
            model, hooks = lukemelas_net(b, 224)
            model.load_state_dict(state)
            model.eval()
            torch.save(state, folder / "lukemelas.pth")
            compare(f"lukemelas {b} .pth (zip), padded for 224", model, hooks, folder / "lukemelas.pth", ["--padding", "224"])
    print(f"{files} files, largest difference {worst:.1e} (allowed {TOLERANCE:.0e})")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
