from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capt_deploy.backends.base import Outputs
from capt_deploy.bundle.read import REFERENCE, open_bundle
from capt_deploy.core.errors import BundleError, DataError
from capt_deploy.core.files import sha256_file
from capt_deploy.verify.reference import PATTERNS, ReferenceOutputs, draw_patterns


def answers(count: int) -> Outputs:
    random = np.random.default_rng(count)
    shapes = ((count, 4), (count, 4), (count, 32))
    return Outputs(*(random.normal(size=shape).astype(np.float32) for shape in shapes))


def test_patterns_are_the_same_everywhere_and_differ_from_each_other() -> None:
    drawn = draw_patterns((20, 30))
    assert drawn.shape == (PATTERNS, 20, 30, 3) and drawn.dtype == np.uint8
    assert np.array_equal(drawn, draw_patterns((20, 30)))
    assert len(np.unique(drawn.reshape(PATTERNS, -1), axis=0)) == PATTERNS
    # by hand: number 2, row 5, column 7, green
    along = 3 * 128 * 7 // 30 + (1 * 2 + 2) * 96 * 5 // 20
    assert drawn[2, 5, 7, 1] == abs((along + 61 * 1 * 3) % 510 - 255)


def test_images_are_found_by_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, content in (("deep/moved.jpg", b"one"), ("other.png", b"two"), ("x", b"three")):
        (tmp_path / name).write_bytes(content)
    digests = tuple(sha256_file(tmp_path / name) for name in ("other.png", "deep/moved.jpg"))
    reference = ReferenceOutputs((*digests, "0" * 64), np.array([0, 1, 2]), answers(3), answers(8))
    found = reference.find(tmp_path)
    assert list(found.items()) == [(0, tmp_path / "other.png"), (1, tmp_path / "deep/moved.jpg")]
    gone = ReferenceOutputs(("0" * 64,), np.array([0]), answers(1), answers(8))
    with pytest.raises(DataError, match="none of the 1 images"):
        gone.find(tmp_path)


def test_a_bundle_of_before_has_nothing_to_check_against(golden: Path) -> None:
    with pytest.raises(BundleError, match="export it again"):
        ReferenceOutputs.from_bundle(open_bundle(golden))


def test_what_is_saved_is_read_again(with_reference: Callable[[bytes], Path]) -> None:
    reference = ReferenceOutputs(("a" * 64, "b" * 64), np.array([1, -1]), answers(2), answers(8))
    found = ReferenceOutputs.from_bundle(open_bundle(with_reference(reference.save())))
    assert found.sha256 == reference.sha256
    assert np.array_equal(found.labels, reference.labels)
    for kind in ("images", "patterns"):
        for name in ("logits", "probabilities", "embedding"):
            own = getattr(getattr(found, kind), name)
            assert np.array_equal(own, getattr(getattr(reference, kind), name))


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_one_is_refused(
    with_reference: Callable[[bytes], Path], content: bytes | None
) -> None:
    if content is None:  # names more images than it answers
        content = ReferenceOutputs(("a" * 64,), np.array([1, 2]), answers(2), answers(8)).save()
    bundle = with_reference(content)
    with pytest.raises(BundleError, match=REFERENCE):
        ReferenceOutputs.from_bundle(open_bundle(bundle))
