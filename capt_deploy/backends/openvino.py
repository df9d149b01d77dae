"""OpenVINO on the CPU. The only file that imports `openvino`.

It has kernels of bfloat16 and int8 for processors that multiply these, such as x86 with AVX-512
BF16, VNNI or AMX.
"""

import os
import secrets
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from capt_deploy.backends.base import (
    Outputs,
    Pixels,
    check_pixels,
    run_in_parts,
    typed_errors,
)
from capt_deploy.backends.options import DEFAULT_OPTIONS, RuntimeOptions
from capt_deploy.core.errors import BackendError, UnavailableError
from capt_deploy.core.install import install_hint
from capt_deploy.core.machine import usable_cores
from capt_deploy.core.process import Process, never_free_in_copies


class OpenVino:
    """A compiled graph. Thread-safe: runs of several threads follow each other."""

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        onnx: bytes,
        precision: str,
        weights_folder: Path | None = None,
        options: RuntimeOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Compile a graph; `threads` and the largest of `batches` count of the options.

        Args:
            onnx: the graph.
            precision: of the graph, which computes in its own types whatever it is.
            weights_folder: folder of weights that are not in the graph's own file.
            options: how to use the machine.

        Raises:
            UnavailableError: OpenVINO is not installed.
            BackendError: the graph cannot be compiled.
        """
        try:
            import openvino
        except Exception as cause:  # a library that does not fit this machine fails in many ways
            raise UnavailableError(
                f"backend openvino: the package is missing or does not load ({cause}); "
                f"{install_hint('openvino')}"
            ) from cause
        self._process = Process()
        self._largest = options.batches[-1]
        self._running = Lock()
        with typed_errors("openvino", "compile the graph"):
            core = openvino.Core()
            compiled = core.compile_model(
                _read(core, onnx, weights_folder),
                "CPU",
                {
                    # By default it computes in bfloat16 what the graph says is float32.
                    "INFERENCE_PRECISION_HINT": "f32",
                    "INFERENCE_NUM_THREADS": options.threads or usable_cores(),
                    "NUM_STREAMS": 1,
                    # Several processes would bind their threads to the same cores.
                    "ENABLE_CPU_PINNING": False,
                },
            )
            self._request: Any = compiled.create_infer_request()
            self._pixels = tuple(
                size.get_length() for size in [*compiled.input().partial_shape][1:]
            )
        never_free_in_copies(self._request)

    def run(self, images: Pixels) -> Outputs:
        """Run (batch, height, width, 3) pixels; see `Backend.run`."""
        self._process.check()
        check_pixels(images, self._pixels)
        return run_in_parts(self._run, images, self._largest)

    def _run(self, images: Pixels) -> Outputs:
        with self._running:
            request = self._request
            if request is None:
                raise BackendError("backend openvino is closed; load the classifier again")
            with typed_errors("openvino", "run the graph"):
                request.infer({"images": images})
                # The tensors are the request's own, and the next run overwrites them.
                return Outputs(*(request.get_tensor(name).data.copy() for name in Outputs._fields))

    def close(self) -> None:
        """Free the graph once the current run has ended."""
        if self._process.is_this:
            with self._running:
                self._request = None


def _read(core: Any, onnx: bytes, weights_folder: Path | None) -> Any:
    """Return OpenVINO's form of a graph.

    It reads external weights beside the graph's file: those of a graph in memory in the current
    folder, where files have nothing to do with the bundle. The folder of weights is a private copy.
    """
    with TemporaryDirectory() as empty:
        graph = (weights_folder or Path(empty)) / f"{secrets.token_hex(8)}.onnx"
        try:
            graph.write_bytes(onnx)
            return core.read_model(os.fspath(graph))
        finally:
            graph.unlink(missing_ok=True)
