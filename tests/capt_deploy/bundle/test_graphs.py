from pathlib import Path

import numpy as np
import pytest

from capt_deploy.bundle.graphs import read_metadata
from capt_deploy.bundle.manifest import METADATA_KEY, Manifest

ONNX = (Path(__file__).parents[2] / "golden" / "tiny.capt" / "model.onnx").read_bytes()


def test_it_reads_what_the_graph_carries() -> None:
    manifest = Manifest.from_json(read_metadata(ONNX) or "", "model.onnx")
    assert manifest.class_names == ("blue sky", "green leaf", "grey stone", "red ball")
    assert manifest.tuned == (True, True, False, False)
    assert manifest.preprocess.size == (16, 16)


def test_it_reads_what_the_onnx_library_reads() -> None:
    onnx = pytest.importorskip("onnx", reason="the onnx library is the oracle")
    model = onnx.load_from_string(ONNX)
    wanted = {entry.key: entry.value for entry in model.metadata_props}[METADATA_KEY]
    assert read_metadata(ONNX) == wanted
    onnx.helper.set_model_props(model, {"author": "x" * 300, METADATA_KEY: "é{}", "z": ""})
    assert read_metadata(model.SerializeToString()) == "é{}"
    onnx.helper.set_model_props(model, {"author": "someone"})
    assert read_metadata(model.SerializeToString()) is None


@pytest.mark.parametrize("data", [b"", b"not a graph at all", b"\xff" * 50, ONNX[:1000]])
def test_what_is_no_onnx_file_has_no_manifest(data: bytes) -> None:
    assert read_metadata(data) is None


def test_damaged_files_give_text_or_nothing_but_never_crash() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(ONNX)
        for place in random.integers(0, len(data), 20):
            data[place] = random.integers(0, 256)
        found = read_metadata(bytes(data[: random.integers(0, len(data))]))
        assert found is None or isinstance(found, str)
