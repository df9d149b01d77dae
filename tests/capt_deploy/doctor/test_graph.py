import numpy as np
import pytest

from capt_deploy.backends import Outputs, create
from capt_deploy.doctor.graph import SIDE, expected_outputs, make_graph


def test_a_backend_says_of_the_graph_what_numpy_says():
    images = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    outputs = create("onnxruntime-cpu", make_graph(), "fp32").run(images)
    for name, own, wanted in zip(Outputs._fields, outputs, expected_outputs(images), strict=True):
        np.testing.assert_allclose(own, wanted, atol=1e-4, err_msg=name)


def test_images_differ_in_what_is_said_of_them():
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    images[1, ..., 0] = 255
    first, second = expected_outputs(images).probabilities
    assert first.argmax() == second.argmax() == 0
    assert first[0] == 0.5 and second[0] > 0.99
    np.testing.assert_allclose(expected_outputs(images).embedding[1], [1, 0, 0], atol=1e-6)


def test_onnx_itself_takes_the_file():
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(make_graph()), full_check=True)


def test_tensorrt_can_build_it():
    pytest.importorskip("tensorrt_rtx")
    from capt_deploy.backends.tensorrt.engine import build_engine

    assert len(build_engine(make_graph(), sm=89)) > 10_000
