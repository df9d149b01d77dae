"""Compare int8 by capt, by ONNX Runtime's quantizer and by NVIDIA ModelOpt, judged by the gate.

    python -m benchmarks.int8 RUN… --modelopt /venv/bin/python

All calibrate on the same training images of a finished RUN, symmetric, with scales for each output.
"fewer layers" leaves out those whose inputs ONNX Runtime's debugger finds worst, until the gate
passes. ModelOpt needs its own environment, for its pins clash.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime import quantization as ort
from onnxruntime.quantization import qdq_loss_debug as debug

from benchmarks.record import describe, write_result
from capt_deploy.backends.base import Outputs
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.core.console import Command, table
from capt_deploy.verify.check import run_on_files
from capt_deploy.verify.gate import compare_outputs
from capt_train.run.folder import load_run
from export.precision.trace import calibration_pixels, trace_precision
from export.proof.verify import run_torch_model, temperature_factor
from export.source.model import source_from_run

OPERATORS = ["MatMul", "Gemm", "Conv"]
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
MODELOPT = """
import sys, numpy, modelopt.onnx.quantization as quantization
graph, pixels, method, out, *left_out = sys.argv[1:]
quantization.quantize(graph, calibration_data={"images": numpy.load(pixels)}, output_path=out,
    calibration_method=method, calibration_eps=["cpu"], log_level="ERROR", disable_mha_qdq=True,
    op_types_to_quantize=["MatMul", "Gemm", "Conv"], nodes_to_exclude=[f"^{n}$" for n in left_out])
"""


class Images(ort.CalibrationDataReader):  # type: ignore[misc]
    """Batches of pixels for ONNX Runtime."""

    def __init__(self, pixels: Any) -> None:
        self._batches = iter(np.array_split(pixels, -(-len(pixels) // 16)))

    def get_next(self) -> dict[str, Any] | None:
        return next(({"images": batch} for batch in self._batches), None)


def rows(run: Path, modelopt: str | None, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the gate's figures of a run's int8 graphs, by each method."""
    source = source_from_run(load_run(run))
    inputs, pixels = run_torch_model(source, 256), calibration_pixels(source).numpy()
    path, float32, probe = (folder / f"{name}.onnx" for name in ("int8", "fp32", "probe"))
    np.save(folder / "pixels.npy", pixels)

    def judged(method: str, note: str = "all layers") -> dict[str, Any]:
        files = [photo.path for photo in inputs.photos]
        backend, preprocess = OnnxRuntime(path, "int8"), source.learner.backbone.preprocess
        outputs = run_on_files(backend, preprocess, files, method)
        logits = outputs.logits / temperature_factor(inputs.expected, outputs)
        probabilities = source.calibration.probabilities(logits).astype(np.float32)
        outputs = Outputs(logits, probabilities, outputs.embedding)
        cosine = float((outputs.embedding * inputs.expected.embedding).sum(axis=1).mean())
        size = sum(numpy_helper.to_array(t).nbytes for t in onnx.load(path).graph.initializer)
        gate = compare_outputs("int8", inputs.expected, outputs, inputs.labels).to_dict()
        row = {"run": run.name, "method": method, "int8": note, "weight_bytes": size}
        return row | {"mean_cosine": cosine, "gate": gate}

    def quantised(method: str, *left_out: str) -> None:
        excluded = {"OpTypesToExcludeOutputQuantization": OPERATORS}
        ort.quantize_static(
            *(float32, path, Images(pixels)),
            **{"op_types_to_quantize": OPERATORS, "extra_options": SYMMETRIC | excluded},
            **{"activation_type": ort.QuantType.QInt8, "weight_type": ort.QuantType.QInt8},
            **{"per_channel": True, "calibrate_method": ort.CalibrationMethod[method]},
            nodes_to_exclude=[*fixed, *left_out],
        )

    traced, _ = trace_precision(source, "int8", 20, inputs.patterns)
    traced.graph.write(path)
    yield judged("capt", f"{traced.to_dict()['int8']['work']:.0%} of the multiply-adds")
    trace_precision(source, "fp32", 20, inputs.patterns)[0].graph.write(float32)
    graph = onnx.load(float32).graph
    weights = {tensor.name for tensor in graph.initializer} - {"weight", "visual.proj"}
    nodes = [node for node in graph.node if node.op_type in OPERATORS]
    inner = [node for node in nodes if weights & {*node.input}][1:]  # the first reads pixels
    fixed = [node.name for node in nodes if node not in inner]
    for method in ("Percentile", "Entropy", "MinMax"):
        quantised(method)
        yield judged(f"ONNX Runtime, {method}")
    activations = []
    for quantised_or_not in (path, float32):
        debug.modify_model_output_intermediate_tensors(str(quantised_or_not), str(probe))
        activations.append(debug.collect_activations(str(probe), Images(pixels[:16])))
    errors = debug.compute_activation_error(debug.create_activation_matching(*activations))
    quality = {name: error["qdq_err"] for name, error in errors.items()}  # in dB; more is better
    worst = [n.name for n in sorted(inner, key=lambda n: quality.get(n.input[0], np.inf))]
    for count in range(0, len(worst), max(1, len(worst) // 10)):
        quantised("MinMax", *worst[:count])
        row = judged("ONNX Runtime, fewer layers", f"{len(worst) - count} of {len(worst)} layers")
        if row["gate"]["passed"]:
            break
    yield row
    for method in ("max", "entropy") if modelopt else ():
        words = [modelopt, "-c", MODELOPT, float32, folder / "pixels.npy", method, path, *fixed]
        subprocess.run([str(word) for word in words], check=True, capture_output=True)
        yield judged(f"ModelOpt, {method}")


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--modelopt", help="Python interpreter with nvidia-modelopt[onnx].")
def main(runs: tuple[Path, ...], modelopt: str | None) -> None:
    """Export each RUN in int8 by each method; print the gate's figures and record them."""
    results = []
    for run in runs:
        with tempfile.TemporaryDirectory() as folder:
            results += list(rows(run, modelopt, Path(folder)))
    write_result("int8", {"measured": describe(), "rows": results})
    figures = ("top1_agreement", "mean_logit_difference", "embedding_cosine", "ece_difference")
    lines = [
        [
            *(row["run"], row["method"], row["int8"], f"{row['weight_bytes'] / 1e6:.1f} MB"),
            *(f"{row['mean_cosine']:.5f}", *(f"{row['gate'][name]:.4f}" for name in figures)),
            "passed" if row["gate"]["passed"] else "FAILED",
        ]
        for row in results
    ]
    click.echo(table(["run", "method", "int8", "weights", "mean cosine", *figures, "gate"], lines))


if __name__ == "__main__":
    main()
