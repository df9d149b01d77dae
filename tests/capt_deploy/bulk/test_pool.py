"""One engine for each GPU that a backend can use, else for each core."""

import subprocess
import sys

import pytest

from capt_deploy.backends.spec import find_backends
from capt_deploy.bulk.pool import choose_engines
from capt_deploy.core.errors import BackendError

GPUS, CORES = {"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0}


@pytest.mark.parametrize(
    ("backend", "nodes", "expected"),
    [
        ("auto", [CORES], (4, 1, 0)),
        ("auto", [CORES, CORES], (8, 1, 0)),
        ("auto", [GPUS, CORES], (2, 8, 1)),
        ("auto", [GPUS, {"CPU": 4.0, "GPU": 1.0}], (3, 4, 1)),
        ("tensorrt", [GPUS], (2, 8, 1)),
        ("onnxruntime-cpu", [GPUS, CORES], (20, 1, 0)),
    ],
)
def test_engines_fit_the_machines(
    backend: str, nodes: list[dict[str, float]], expected: tuple[int, int, int]
) -> None:
    assert choose_engines(find_backends(backend), nodes) == expected


def test_a_backend_that_needs_a_gpu_is_refused_without_one() -> None:
    with pytest.raises(BackendError, match="backend tensorrt: expected a GPU"):
        choose_engines(find_backends("tensorrt"), [CORES])


def test_ray_is_imported_only_when_it_runs() -> None:
    code = "import sys, capt_deploy.bulk.job; print({'ray', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
