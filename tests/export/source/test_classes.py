"""METHOD 7 and 9 written out for classes that come after the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from capt_deploy.core.errors import ConfigError, DataError, ModelError
from capt_deploy.serving.classifier import Classifier
from capt_train.run.folder import TunedModel, load_run
from export.source.classes import read_class_list, with_classes
from export.source.model import source_from_run
from export.writer import ExportOptions, export
from tests.export.conftest import by_hand

NEW = ("tabby cat", "old tractor")


@torch.no_grad()
def test_new_classes_get_the_learned_prompts_and_the_weights_outside(
    text_model: TunedModel,
) -> None:
    source = source_from_run(text_model)
    names = ("tabby cat", "red ball", "blue sky", "old tractor")
    other = with_classes(source, [text_model], names)
    assert other.class_names == names
    assert other.tuned == (False, False, True, False)
    of = {name: text_model.class_rows.rows[row] for row, name in enumerate(text_model.class_names)}
    of |= {name: by_hand(text_model, name) for name in NEW}
    for name, row in zip(names, other.rows.rows, strict=True):
        torch.testing.assert_close(row, of[name], atol=1e-6, rtol=0)
    # a class that the run knows, but was not tuned on, says the same as a new one of that name
    torch.testing.assert_close(of["red ball"], by_hand(text_model, "red ball"), atol=1e-6, rtol=0)
    (tuned_alike,) = with_classes(source, [text_model], ["tabby cat", "blue sky"]).rows.rows[1:]
    assert not torch.allclose(tuned_alike, by_hand(text_model, "blue sky"), atol=1e-3)


def test_zero_shot_rows_are_the_hand_written_ones(text_model: TunedModel) -> None:
    other = with_classes(source_from_run(text_model), [text_model], ["red ball", *NEW])
    expected = text_model.backbone.class_embeddings(
        other.class_names, text_model.config.prompt.templates
    )
    assert other.zero_shot_head is not None
    torch.testing.assert_close(other.hand_written, expected, atol=1e-6, rtol=0)


def test_images_and_pairs_follow_their_classes(text_model: TunedModel) -> None:
    source = source_from_run(text_model)
    other = with_classes(source, [text_model], ["tabby cat", "green leaf"])
    for kind in ("gate", "training"):
        before, after = getattr(source.photos, kind), getattr(other.photos, kind)
        assert [photo.path for photo in after] == [photo.path for photo in before]
        # of the tuned classes 0 and 1 only "green leaf" is left, as number 1
        assert {photo.label for photo in before} == {0, 1}
        assert [photo.label for photo in after] == [{0: -1, 1: 1}[p.label] for p in before]
    assert len(source.pairs) == 1
    assert other.pairs == ()
    turned = with_classes(source, [text_model], ["green leaf", "x", "blue sky"])
    assert turned.pairs == source.pairs


def test_a_run_that_tunes_its_images_too_has_no_zero_shot_rows(tuned_run: Path) -> None:
    model = load_run(tuned_run)
    other = with_classes(source_from_run(model), [model], ["red ball", *NEW])
    assert other.zero_shot_head is None
    assert other.learner.visual is not None
    assert other.rows.rows.shape == (3, 32)


def test_prompts_of_their_own_for_each_class_give_new_ones_their_mean(
    text_run: Callable[..., Path],
) -> None:
    model = load_run(text_run(prompt_class_specific=True, prompt_count=1))
    (prompt,) = model.learner.prompts
    with torch.no_grad():
        prompt.context += torch.randn(prompt.context.shape)
        tokens = model.backbone.tokenize(["a a a a tabby cat."])
        mean = model.backbone.text.encode(tokens, prompt.context.mean(dim=0), prompt.deeper)
        other = with_classes(source_from_run(model), [model], NEW)
        hand_written = model.backbone.class_embeddings(NEW, model.config.prompt.templates)
        weights = model.fitted.mixture.outside
        expected = weights[0] * hand_written[0] + weights[1] * model.learner.transform(mean)[0][0]
    torch.testing.assert_close(other.rows.rows[0], expected, atol=1e-6, rtol=0)


def test_a_bundle_of_other_classes_passes_the_gate(text_model: TunedModel, tmp_path: Path) -> None:
    source = with_classes(source_from_run(text_model), [text_model], ["red ball", "tabby cat"])
    out = export(source, tmp_path / "x.capt", ExportOptions())
    classifier = Classifier.load(out)
    assert classifier.class_names == ("red ball", "tabby cat")
    photo = source.photos.gate[0].path
    assert classifier(photo).label in classifier.class_names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["red ball"], "at least two, came 1"),
        ([], "at least two, came 0"),
        (["red ball", "tabby", "tabby"], "'tabby' is there already"),
        (["red ball", "Tabby_cat", "tabby  cat"], "'tabby cat' is there already, as 'Tabby_cat'"),
        (["red ball", "  "], "place 2 is empty"),
        (["red_ball", "tabby"], "'red_ball' is not a class of the run, but 'red ball' is"),
        ("red ball", "a list of texts"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(
    text_model: TunedModel, names: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_classes(source_from_run(text_model), [text_model], names)


def test_a_name_that_is_too_long_for_the_prompts_is_named(text_model: TunedModel) -> None:
    with pytest.raises(ModelError, match=r"too long for the model's 16 tokens: .*very very"):
        with_classes(source_from_run(text_model), [text_model], ["red ball", "very " * 12 + "old"])


def test_lists_are_read_from_text_and_json(tmp_path: Path) -> None:
    lines, listed = tmp_path / "names.txt", tmp_path / "names.json"
    lines.write_bytes("\ufefftabby cat\r\n\r\n  Käse \r\n".encode())
    assert read_class_list(lines) == ("tabby cat", "  Käse ")
    listed.write_text(json.dumps(["tabby cat", "Käse"]))
    assert read_class_list(listed) == ("tabby cat", "Käse")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'{"a": 1}'),
        ("a.json", b'["a", 1]'),
        ("a.json", b"["),
        ("a.txt", b"\xff\xfe\x00"),
    ],
)
def test_files_that_hold_no_list_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_class_list(path)
    with pytest.raises(DataError, match="missing"):
        read_class_list(tmp_path / "missing")
