"""Small versions of every family, exported in each precision, run, and built for an engine."""

import importlib.util

import numpy as np
import pytest
import torch

from capt_deploy.backends.onnxruntime import OnnxRuntime
from capt_deploy.backends.tensorrt.engine import build_engine
from capt_train.clip.loading import load_backbone
from export.graph.lower import DTYPES
from export.graph.onnx_graph import BF16_OPSET, OPSET, trace
from export.graph.visual import VisualClassifier
from export.precision.emulation import write_widened
from export.precision.quantize import quantize
from export.source.fold import FoldedHead
from tests.families import FAMILIES

# int8 may move the logits by a fifth of their spread here, so that most layers of these towers
# are quantised, small as they are.
COSINE = {"fp32": 1 - 1e-6, "fp16": 0.9999, "bf16": 0.995, "int8": 0.97}
BUILDS = importlib.util.find_spec("tensorrt_rtx") is not None


def some_pixels(size, count):
    draw = torch.Generator().manual_seed(count)
    small = torch.randint(0, 256, (count, 4, 4, 3), dtype=torch.uint8, generator=draw)
    rows, columns = size[0] // 4, size[1] // 4
    return small.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)


@torch.no_grad()
def settle(visual, images):
    """Give batch norms statistics of images: those of the start make all features alike."""
    for module in visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain mean
    visual.train()
    visual(images)
    visual.eval()


@pytest.mark.parametrize("precision", COSINE)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_runs_and_builds(name, precision, family_dir, tmp_path):
    backbone = load_backbone(f"local-dir:{family_dir(name)}", None, torch.device("cpu"))
    size = backbone.preprocess.size
    settle(backbone.model.visual, backbone.normalise(some_pixels(size, 16)))
    pixels = some_pixels(size, 6)
    expected = backbone.image_embeddings(pixels).numpy()
    torch.manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(5, expected.shape[1]), dim=1)
    network = VisualClassifier(backbone, FoldedHead(20 * rows, torch.zeros(5))).eval()
    if precision == "int8":
        quantize(network, some_pixels(size, 16), target=0.2)
    with torch.no_grad():
        network.lower(DTYPES[precision])
    graph = trace(network, *size, precision, BF16_OPSET if precision == "bf16" else OPSET)
    path = tmp_path / "model.onnx"
    graph.write(path)
    if precision == "bf16":
        write_widened(path, tmp_path / "wide.onnx")
        backend = OnnxRuntime(tmp_path / "wide.onnx", "emulated", tmp_path)
    else:
        backend = OnnxRuntime(path, precision)
    found = backend.run(pixels.numpy())
    assert float((found.embedding * expected).sum(axis=1).min()) >= COSINE[precision]
    wanted = found.embedding @ (20 * rows.numpy().T)
    np.testing.assert_allclose(found.logits, wanted, atol=1e-3)
    if BUILDS:
        assert len(build_engine(path.read_bytes(), sm=89)) > 1000
