"""Try a backend in another process, which may crash or hang without harm.

python -m capt_deploy.doctor.probe onnxruntime-cpu [BUNDLE]
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from capt_deploy.backends.base import Outputs

GRAPH = Path(__file__).with_name("probe.onnx")  # made by tests/capt_deploy/doctor/test_probe.py
SIDE = 8  # pixels, height and width of its images
TO_LOGITS = ((0.02, 0.0), (0.0, 0.02), (-0.01, 0.01))  # from the mean colour, 0-255
_MARK = "capt-doctor: "  # marks the result among what libraries print
_SECONDS, _SECONDS_OF_BUNDLE = 120.0, 600.0  # an engine may have to be built
_TOLERANCE = 0.02  # of logits of a few units; GPUs multiply float32 with fewer digits


@dataclass(frozen=True)
class ProbeResult:
    """Whether a backend works."""

    device: str | None  # None if it does not work
    reason: str | None  # why it does not work
    seconds: float


def probe_backend(
    name: str, bundle: Path | None = None, seconds: float | None = None
) -> ProbeResult:
    """Let a backend classify in another process and return whether it works; never raises.

    Args:
        name: of a backend in `capt_deploy.backends.spec.BACKENDS`.
        bundle: the bundle to run; by default a tiny graph with known outputs.
        seconds: time limit.
    """
    words = [sys.executable, "-m", __name__, name, *([] if bundle is None else [str(bundle)])]
    limit = seconds or (_SECONDS if bundle is None else _SECONDS_OF_BUNDLE)
    start = time.monotonic()
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return ProbeResult(None, f"did not answer within {limit:.0f} s", time.monotonic() - start)
    except OSError as cause:
        return ProbeResult(None, f"cannot be tried: {cause}", time.monotonic() - start)
    device, reason = _answer(done)
    return ProbeResult(device, reason, time.monotonic() - start)


def _answer(done: subprocess.CompletedProcess[str]) -> tuple[str | None, str | None]:
    marked = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode == 0 and marked:
        result = json.loads(marked[-1].removeprefix(_MARK))
        return result["device"], result["reason"]
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return None, f"its process ended with {_ending(done.returncode)}" + (f": {last}" * bool(last))


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def main() -> None:
    """Try the backend that the command line names, and print the result."""
    name, *rest = sys.argv[1:]
    device = reason = None
    try:
        device = _run_bundle(name, Path(rest[0])) if rest else _run_graph(name)
    except Exception as error:  # libraries for GPUs raise whatever they like
        reason = str(error) or type(error).__name__
    print(f"{_MARK}{json.dumps({'device': device, 'reason': reason})}")


def expected_outputs(images: "NDArray[np.uint8]") -> "Outputs":
    """Return the outputs of `probe.onnx` for (batch, 8, 8, 3) images, computed with numpy.

    The graph takes and returns what the graphs of bundles do. The embedding is the mean colour.
    """
    import numpy as np

    from capt_deploy.backends.base import Outputs
    from capt_deploy.metrics.calibration import softmax

    means = images.astype(np.float32).mean(axis=(1, 2))
    logits = means @ np.array(TO_LOGITS, dtype=np.float32)
    return Outputs(logits, softmax(logits).astype(np.float32), means / np.float32(255))


def _run_graph(name: str) -> str:
    import numpy as np

    from capt_deploy.backends.base import Outputs
    from capt_deploy.backends.options import RuntimeOptions
    from capt_deploy.backends.spec import find_backends

    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    images[0] = 255
    with tempfile.TemporaryDirectory() as folder:
        options = RuntimeOptions(batches=(1, 2, 4), cache_folder=Path(folder))
        (spec,) = find_backends(name)
        backend = spec.open(GRAPH.read_bytes(), "fp32", None, options)
        try:
            outputs = backend.run(images)
        finally:
            backend.close()
    pairs = zip(Outputs._fields, expected_outputs(images), outputs, strict=True)
    for field, expected, actual in pairs:
        if not np.allclose(expected, actual, rtol=0, atol=_TOLERANCE):
            raise RuntimeError(
                f"it runs, but returns wrong {field}: expected {expected[0]}, came {actual[0]}"
            )
    return backend.device


def _run_bundle(name: str, bundle: Path) -> str:
    import numpy as np

    from capt_deploy.serving.classifier import Classifier

    with Classifier.load(bundle, name) as classifier:
        height, width = classifier.manifest.preprocess.size
        outputs = classifier.backend.run(np.zeros((1, height, width, 3), np.uint8))
        if not np.isfinite(outputs.logits).all():
            raise RuntimeError("it runs, but its logits are not finite")
        return classifier.backend.device


if __name__ == "__main__":
    main()
