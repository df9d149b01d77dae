from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from capt_deploy.core.errors import RunError
from capt_train.data.validation import Validation

EMBEDDINGS, LABELS = torch.randn(5, 8), torch.tensor([0, 3, 3, 1, 0])
LOGITS = torch.randn(5, 3)


def test_it_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "validation.safetensors"
    # views into something larger are written as what they show
    wide = torch.cat([EMBEDDINGS, EMBEDDINGS], dim=1)
    Validation(wide[:, :8], LABELS).save(path)
    found = Validation.load(path)
    assert found is not None
    assert torch.equal(found.embeddings, EMBEDDINGS)
    assert torch.equal(found.labels, LABELS)
    assert [file.name for file in tmp_path.iterdir()] == ["validation.safetensors"]


def test_out_of_fold_logits_are_kept_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "validation.safetensors"
    Validation(EMBEDDINGS, LABELS, LOGITS).save(path)
    loaded = Validation.load(path)
    assert loaded is not None and loaded.logits is not None
    assert torch.equal(loaded.logits, LOGITS)
    assert loaded.fits(8, [0, 1, 3])
    assert not loaded.fits(8, [0, 1, 2, 3])
    assert not loaded.fits(8, [0, 1, 2])
    assert Validation(EMBEDDINGS, LABELS).fits(8, [0, 1, 2, 3])


def test_a_run_without_has_none(tmp_path: Path) -> None:
    assert Validation.load(tmp_path / "validation.safetensors") is None


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 100])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "validation.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"damaged .*restore it, or delete it"):
        Validation.load(path)
    Validation(EMBEDDINGS, LABELS).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RunError, match="damaged"):
        Validation.load(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"embeddings": EMBEDDINGS},
        {"labels": LABELS},
        {"embeddings": EMBEDDINGS, "labels": LABELS[:4]},
        {"embeddings": EMBEDDINGS, "labels": LABELS.float()},
        {"embeddings": EMBEDDINGS, "labels": LABELS - 1},
        {"embeddings": EMBEDDINGS, "labels": LABELS[:, None]},
        {"embeddings": EMBEDDINGS[:, 0].contiguous(), "labels": LABELS},
        {"embeddings": EMBEDDINGS.half(), "labels": LABELS},
        {"embeddings": EMBEDDINGS * float("nan"), "labels": LABELS},
        {"embeddings": EMBEDDINGS, "labels": LABELS, "logits": LOGITS[:4]},
        {"embeddings": EMBEDDINGS, "labels": LABELS, "logits": LOGITS * float("nan")},
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "validation.safetensors"
    save_file(tensors, path)
    with pytest.raises(RunError, match=r"validation.safetensors: .*restore it, or delete it"):
        Validation.load(path)
