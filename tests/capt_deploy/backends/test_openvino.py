import threading
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends.base import Backend, DeviceTimed
from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.backends.options import RuntimeOptions
from capt_deploy.backends.spec import OPENVINO
from capt_deploy.core.errors import BackendError

pytest.importorskip("openvino", reason="the extra openvino is not installed")
from capt_deploy.backends.openvino import OpenVino

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_it_says_what_onnx_runtime_says():
    backend = OPENVINO.open(ONNX, "fp32")
    assert (backend.name, backend.device) == ("openvino", "cpu")
    assert isinstance(backend, Backend) and not isinstance(backend, DeviceTimed)
    expected = OnnxRuntime(ONNX, "fp32").run(pixels(5))
    for one, other in zip(backend.run(pixels(5)), expected, strict=True):
        # float32 as the graph says, although this processor may prefer bfloat16
        np.testing.assert_allclose(one, other, atol=1e-4)
        assert one.dtype == np.float32


def test_outputs_outlive_the_next_run():
    backend = OpenVino(ONNX, "fp32")
    first = backend.run(pixels(2))
    kept = first.logits.copy()
    backend.run(pixels(2, seed=1))
    np.testing.assert_array_equal(first.logits, kept)


def test_a_large_batch_is_split_and_says_the_same():
    whole = OpenVino(ONNX, "fp32").run(pixels(11))
    parts = OpenVino(ONNX, "fp32", options=RuntimeOptions(batches=(1, 2, 4))).run(pixels(11))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_threads_may_run_it_at_once():
    backend, images = OpenVino(ONNX, "fp32"), [pixels(3, seed) for seed in range(8)]
    expected = [backend.run(part).logits for part in images]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(
            target=lambda row=row: found.update({row: backend.run(images[row]).logits})
        )
        for row in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(8):
        np.testing.assert_array_equal(found[row], expected[row])


def test_a_damaged_graph_is_a_typed_error():
    with pytest.raises(BackendError, match="openvino cannot compile the graph"):
        OpenVino(ONNX[:1000], "fp32")


def test_pixels_of_another_shape_are_a_typed_error():
    with pytest.raises(BackendError, match=r"expected uint8 pixels \(batch, 16, 16, 3\)"):
        OpenVino(ONNX, "fp32").run(np.zeros((1, 8, 16, 3), np.uint8))


def test_a_closed_backend_runs_nothing_and_can_be_closed_again():
    backend = OpenVino(ONNX, "fp32")
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.run(pixels(1))


def graph_with_weights_beside(folder):
    onnx = pytest.importorskip("onnx", reason="needed to make such a graph")
    model = onnx.load_from_string(ONNX)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


def test_weights_of_a_second_file_are_read_from_their_folder(tmp_path):
    path = graph_with_weights_beside(tmp_path)
    found = OpenVino(path.read_bytes(), "fp32", tmp_path).run(pixels(3))
    np.testing.assert_allclose(found.logits, OpenVino(ONNX, "fp32").run(pixels(3)).logits)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "weights"}


def test_weights_beside_the_current_folder_are_not_read(tmp_path, monkeypatch):
    path = graph_with_weights_beside(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match="cannot compile the graph"):
        OpenVino(path.read_bytes(), "fp32")
