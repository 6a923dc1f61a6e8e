"""Our executor against onnxruntime and OpenVINO on the same ONNX files, in one run: float and int8, one and two threads.

Each contender is a process of its own, pinned to the first one or two CPUs, that waits while another one runs; rounds alternate over the
contenders, so that load on the machine hits all alike. Printed are the median and the shortest wall time of an inference, and its processor
time (the shortest round's and the median of rounds), which a busy machine distorts least; the ratios are made of `--by` (default: the shortest
processor time). With them the share of the machine's matrix-product peak that each kind of our steps reaches. Each peer gets its best int8: static QDQ files made here (signed and unsigned activations, per-channel weights, with and
without the products of two computed matrices), the dynamic form for onnxruntime; what is fastest in a first look goes into the comparison.
What is measured is time, so calibration data is noise. Needs numpy, onnx, onnxruntime, openvino.

    compare.py --cull target/release/cull --work /tmp/peers --model default=models/default.onnx \
        --backbone efficientnet_lite0_features.onnx --json peers.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WARM_UP = 3
# Seconds one contender runs before it is the next one's turn, and the least number of inferences in that time.
TURN_S = 0.4
LEAST = 3


# ---------------------------------------------------------------- workers


def serve(make):
    """Answer each line on stdin (seconds to run) with one JSON line: wall times and processor time of the process, in ms an inference."""
    run = make()
    for _ in range(WARM_UP):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, wall = float(line), []
        cpu, begin = time.process_time(), time.perf_counter()
        while time.perf_counter() - begin < seconds or len(wall) < LEAST:
            started = time.perf_counter()
            run()
            wall.append((time.perf_counter() - started) * 1e3)
        print(json.dumps({"wall": wall, "cpu": (time.process_time() - cpu) * 1e3 / len(wall)}), flush=True)


def noise(shape, seed=0):
    import numpy as np

    return np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)


def onnxruntime_worker(path, threads):
    def make():
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: noise(session.get_inputs()[0].shape)}
        return lambda: session.run(None, feed)

    serve(make)


def openvino_worker(path, threads):
    def make():
        import openvino as ov

        # float32 is what the float comparison is about: no silent bf16.
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        model = ov.Core().compile_model(path, "CPU", hints)
        request = model.create_infer_request()
        tensor = ov.Tensor(noise(list(model.inputs[0].shape)))
        return lambda: request.infer({0: tensor})

    serve(make)


# Set by --realtime.
REALTIME = False


def settle(cpus):
    """In a child before it becomes a contender: its CPUs, and on a busy machine nothing that interrupts it."""
    os.sched_setaffinity(0, cpus)
    if REALTIME:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


class Worker:
    def __init__(self, engine, path, threads, cpus):
        self.engine, self.threads, self.path, self.cpus = engine, threads, str(path), cpus
        self.process, self.wall, self.cpu, self.extra = None, [], [], {}

    def start(self):
        command = [sys.executable, __file__, "--worker", self.engine, self.path, str(self.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=lambda: settle(self.cpus)
        )
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{self.engine} cannot run {self.path}")

    def turn(self):
        if not self.process:
            self.start()
        self.process.stdin.write(f"{TURN_S}\n")
        self.process.stdin.flush()
        self.note(json.loads(self.process.stdout.readline()))

    def note(self, answer):
        self.wall += answer["wall"]
        self.cpu.append(answer["cpu"])

    def stop(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def figures(self):
        # Ours does not say the processor time of several threads on one frame.
        wall, cpu = sorted(self.wall), sorted(ms for ms in self.cpu if ms is not None) or [float("nan")]
        return {"wall_median": wall[len(wall) // 2], "wall_best": wall[0], "cpu_median": cpu[len(cpu) // 2], "cpu_best": cpu[0], "inferences": len(wall)}


class Cull(Worker):
    """Ours: `cull bench` measures itself; one process a turn (loading is not counted)."""

    def __init__(self, binary, path, threads, cpus):
        super().__init__("cull", path, threads, cpus)
        self.binary = binary

    def turn(self):
        command = [self.binary, "bench", "--model", self.path, "--json", "--seconds", str(TURN_S), "--threads", str(self.threads)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=lambda: settle(self.cpus)).stdout
        report = json.loads(out)
        latency = report["latency_ms"]
        # The median of a turn stands for it, the shortest beside it.
        self.note({"wall": [latency["min"], latency["p50"], latency["p50"]], "cpu": latency["cpu"]})
        self.extra = {"preprocess_ms": report["preprocess_ms"], "engine": report["model"]["engine"]}


# ---------------------------------------------------------------- models


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def bundle(cull, graph, out, name):
    """A graph without metadata to a bundle: neutral values, since only its time is measured."""
    import onnx

    model = onnx.load(graph)
    dims = lambda value: [d.dim_value for d in value.type.tensor_type.shape.dim]
    (_, _, height, width), (_, _, rows, cols) = dims(model.graph.input[0]), dims(model.graph.output[0])
    meta = {
        "name": name,
        "preprocess": {"width_px": width, "height_px": height, "mean": [127.5] * 3, "std": [127.5] * 3},
        "grid": [rows, cols],
        "score": {"pooled_max": {"window_px": 1}},
        "calibration": {"normal_scores": [i / 10 for i in range(50)]},
        "trained_on": ["nothing"],
        "notes": "random weights: for measuring time",
    }
    out.with_suffix(".json").write_text(json.dumps(meta))
    run(cull, "model", "pack", "--onnx", graph, "--meta", out.with_suffix(".json"), "--out", out)


def float_graph(path, work, name):
    """The path itself, or, for an 8-bit bundle as `cull model quantize` writes it, that of the same graph with its weights in float and without
    metadata (its digest would not fit any more): each contender then makes its own int8 from the same numbers."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    quantized = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    if not quantized:
        return path
    for node in quantized:
        weights, scale, *zero = (numpy_helper.to_array(constants[part]).astype(np.float32) for part in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        spread = lambda values: values.reshape([-1 if i == axis else 1 for i in range(weights.ndim)]) if values.ndim else values
        weights = (weights - (spread(zero[0]) if zero else 0)) * spread(scale)
        graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
        graph.node.remove(node)
    used = {value for node in graph.node for value in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    del model.metadata_props[:]
    graph.name = graph.name or name
    out = work / f"{name}.float.onnx"
    onnx.checker.check_model(model)
    onnx.save(model, out)
    return out


def peer_int8(path, work, name, wanted=None):
    """QDQ and dynamic int8 files of a float graph: {label: path}; all forms, or those in `wanted`."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = work / f"{name}.prepared.onnx"
    if not prepared.exists():
        model = onnx.load(path)
        del model.metadata_props[:]
        onnx.save(model, prepared)
        quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
        # It makes Gemm of a product and a sum with a [1, outputs] constant; onnxruntime 1.32's quantizer wants such a bias as [outputs].
        model = onnx.load(prepared)
        biases = {node.input[2] for node in model.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
        for tensor in model.graph.initializer:
            if tensor.name in biases and len(tensor.dims) == 2 and tensor.dims[0] == 1:
                del tensor.dims[0]
        onnx.save(model, prepared)
    model = onnx.load(prepared)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    constants = {tensor.name for tensor in model.graph.initializer}
    computed = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in constants]

    class Noise(CalibrationDataReader):
        def __init__(self):
            self.left = [{model.graph.input[0].name: noise(shape, seed)} for seed in range(4)]

        def get_next(self):
            return self.left.pop() if self.left else None

    made = {}
    variants = [("s8s8", QuantType.QInt8, []), ("u8s8", QuantType.QUInt8, [])]
    if computed:
        variants += [("s8s8, attention in float", QuantType.QInt8, computed), ("u8s8, attention in float", QuantType.QUInt8, computed)]
    for label, activations, left_out in variants:
        if wanted and label not in wanted:
            continue
        out = work / f"{name}.{label.replace(', ', '-').replace(' ', '-')}.onnx"
        if not out.exists():
            quantize_static(
                str(prepared), str(out), Noise(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=activations,
                weight_type=QuantType.QInt8, nodes_to_exclude=left_out,
            )  # fmt: skip
        made[label] = out
    if not wanted or "dynamic" in wanted:
        out = work / f"{name}.dynamic.onnx"
        if not out.exists():
            quantize_dynamic(str(prepared), str(out), per_channel=True, weight_type=QuantType.QInt8)
        made["dynamic"] = out
    return made


# ---------------------------------------------------------------- peak


def peak():
    """Multiply-adds a second, in G, of a large float32 matrix product of this Python's BLAS on the first CPU: the machine's practical peak."""
    import numpy as np

    side, best = 1024, float("inf")
    a, b = noise((side, side)), noise((side, side), 1)
    for _ in range(24):
        # Processor time: on a busy machine a product of 15 ms is hardly ever left alone.
        started = time.process_time()
        np.matmul(a, b)
        best = min(best, time.process_time() - started)
    return side**3 / best / 1e9


def by_layer(cull, path, peak_gmacs):
    """Share of the peak by kind of step. Integers are held against four times the float peak: one VNNI instruction does the work of four FMA."""
    command = [cull, "bench", "--model", str(path), "--seconds", "0.2", "--explain"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=lambda: settle({0})).stderr.splitlines()
    shares = {}
    for line in lines:
        # "best us, %, G mul/s, kind x count": the summary at the end; kinds without products have one number less.
        left, _, count = line.rpartition(" x ")
        parts = left.split()
        if count.isdigit() and len(parts) >= 4 and parts[2].replace(".", "", 1).isdigit():
            kind, speed = " ".join(parts[3:]), float(parts[2])
            shares[kind] = speed / (peak_gmacs * (4 if "int8" in kind else 1))
    return shares


# ---------------------------------------------------------------- comparison


def best_int8(engine, files, cpus):
    """The int8 file on which a peer is fastest with one thread, by a short look at each."""
    times = {}
    for label, path in files.items():
        if engine == "openvino" and label == "dynamic":
            continue
        worker = Worker(engine, path, 1, cpus)
        try:
            for _ in range(3):
                worker.turn()
            times[label] = worker.figures()["cpu_best"]
        except (RuntimeError, json.JSONDecodeError, BrokenPipeError) as problem:
            print(f"  {engine} {label}: {problem}", file=sys.stderr)
        worker.stop()
    label = min(times, key=times.get)
    print(f"  {engine} int8: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()), file=sys.stderr)
    return label


def compare(a, name, path, rounds):
    work = Path(a.work)
    import onnx

    path = float_graph(path, work, name)
    packed = any(entry.key == "cull" for entry in onnx.load(path).metadata_props)
    ours = Path(path)
    if not packed:
        ours = work / f"{name}.cull.onnx"
        bundle(a.cull, path, ours, name)
    ours8 = work / f"{name}.cull8.onnx"
    run(a.cull, "model", "quantize", ours, "--out", ours8)
    one, both = {0}, {0, 1}
    # Peers read our bundles, too: metadata apart they are plain ONNX.
    # Which file a peer likes best does not change from run to run.
    known = work / f"{name}.best.json"
    if known.exists():
        best = json.loads(known.read_text())
        files8 = peer_int8(path, work, name, set(best.values()))
    else:
        files8 = peer_int8(path, work, name)
        best = {engine: best_int8(engine, files8, one) for engine in ("onnxruntime", "openvino")}
        known.write_text(json.dumps(best))
    contenders = {}
    for threads, cpus in [(1, one), (2, both)][: a.threads]:
        contenders["cull", "float", threads] = Cull(a.cull, ours, threads, cpus)
        contenders["cull", "int8", threads] = Cull(a.cull, ours8, threads, cpus)
        for engine in ("onnxruntime", "openvino"):
            contenders[engine, "float", threads] = Worker(engine, path, threads, cpus)
            contenders[engine, "int8", threads] = Worker(engine, files8[best[engine]], threads, cpus)
    for _ in range(rounds):
        for worker in contenders.values():
            worker.turn()
    for worker in contenders.values():
        worker.stop()
    figures = {key: worker.figures() for key, worker in contenders.items()}
    print(f"\n{name} ({contenders['cull', 'int8', 1].extra['engine']}); int8 of onnxruntime: {best['onnxruntime']}, of OpenVINO: {best['openvino']}; ms")
    print(f"{'':<24}{'threads':>8}{'wall median':>13}{'wall best':>11}{'cpu median':>12}{'cpu best':>10}")
    for (engine, precision, threads), f in figures.items():
        print(f"{engine + ' ' + precision:<24}{threads:>8}{f['wall_median']:13.2f}{f['wall_best']:11.2f}{f['cpu_median']:12.2f}{f['cpu_best']:10.2f}")
    of = lambda engine, precision, threads=1: figures[engine, precision, threads][a.by if threads == 1 else "wall_best"]
    extra = contenders["cull", "int8", 1].extra
    ratios = {
        "float_vs_openvino": of("cull", "float") / of("openvino", "float"),
        "int8_vs_best_peer": of("cull", "int8") / min(of("openvino", "int8"), of("onnxruntime", "int8")),
        "int8_vs_float": of("cull", "int8") / of("cull", "float"),
        "preprocess_share": extra["preprocess_ms"]["yuyv_1280x720"] / of("cull", "int8"),
    }
    if a.threads > 1:
        ratios["float_vs_openvino_2_threads"] = of("cull", "float", 2) / of("openvino", "float", 2)
        ratios["int8_vs_best_peer_2_threads"] = of("cull", "int8", 2) / min(of("openvino", "int8", 2), of("onnxruntime", "int8", 2))
    print("  ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    layers = {precision: by_layer(a.cull, file, a.peak) for precision, file in (("float", ours), ("int8", ours8))}
    for precision, shares in layers.items():
        print(f"share of peak, {precision}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    return {"ratios": ratios, "share_of_peak": layers, "ms": {" ".join(map(str, key)): f for key, f in figures.items()}, "peer_int8": best, "engine": extra["engine"]}


def main():
    if sys.argv[1:2] == ["--worker"]:
        engine, path, threads = sys.argv[2:5]
        return {"onnxruntime": onnxruntime_worker, "openvino": openvino_worker}[engine](path, int(threads))
    if sys.argv[1:] == ["--peak"]:
        return print(peak())
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--cull", required=True, help="our binary, built in release mode")
    p.add_argument("--work", required=True, help="folder for the files that are made; kept, so that a second run is quicker")
    p.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a bundle to compare with, in float or in 8 bit")
    p.add_argument("--backbone", help="features of EfficientNet-Lite0 (ONNX): also compare it with UniAD 4+4 behind it, random weights")
    p.add_argument("--paper", action="store_true", help="also UniAD alone in the paper's size (272 channels), behind one 1x1 convolution")
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--threads", type=int, choices=(1, 2), default=2, help="2: one frame on two threads as well")
    p.add_argument("--by", choices=("cpu_best", "cpu_median", "wall_best", "wall_median"), default="cpu_best", help="what one-thread ratios are made of")
    p.add_argument("--json", help="all figures go into this file")
    p.add_argument("--realtime", action="store_true", help="contenders run under SCHED_FIFO (needs root): for a busy machine, which has to wait meanwhile")
    a = p.parse_args()
    global REALTIME
    REALTIME = a.realtime
    work = Path(a.work)
    work.mkdir(parents=True, exist_ok=True)
    models = dict(entry.split("=", 1) for entry in a.model)
    made = [("lite0_uniad", ["--backbone", a.backbone])] if a.backbone else []
    made += [("uniad_paper", ["--stem"])] if a.paper else []
    for name, options in made:
        models[name] = str(work / f"{name}.onnx")
        run(sys.executable, HERE / "export_uniad.py", "--out", models[name], *options)
    load = os.getloadavg()
    a.peak = float(subprocess.run([sys.executable, __file__, "--peak"], capture_output=True, text=True, check=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, preexec_fn=lambda: settle({0})).stdout)
    print(f"load average at the start: {load[0]:.1f}; float32 matrix product: {a.peak:.1f} G multiply-adds/s on one thread")
    report = {"load_average": load, "peak_gmacs": a.peak, "models": {name: compare(a, name, path, a.rounds) for name, path in models.items()}}
    report["load_average_end"] = os.getloadavg()
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    if a.json:
        # The ratios of the worst model at the top: what a goal is held against.
        worst = {key: max(m["ratios"][key] for m in report["models"].values()) for key in next(iter(report["models"].values()))["ratios"]}
        Path(a.json).write_text(json.dumps(worst | report, indent=1))


if __name__ == "__main__":
    main()
