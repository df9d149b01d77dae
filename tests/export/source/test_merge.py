"""Two runs over one backbone: colours of the sky and of leaves, and stones with balls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from capt_deploy.confidence.calibration import Calibration
from capt_deploy.core.errors import ConfigError, DataError
from capt_deploy.data.preprocess import preprocess
from capt_deploy.serving.classifier import Classifier
from capt_train.run.folder import TunedModel, load_run
from export.source.classes import with_classes
from export.source.merge import source_from_runs
from export.source.model import Source, source_from_run
from export.writer import ExportOptions, export
from tests.export.conftest import by_hand, shaken

SKY, LEAF, STONE, BALL = "blue sky", "green leaf", "grey stone", "red ball"


def listing(folder: Path, photos: Path, *labels: str) -> Path:
    """Write a list of the photos of some classes beside a copy of them."""
    shutil.copytree(photos, folder / "photos")
    rows = ["path,label,split"]
    for split in ("train", "val", "test"):
        for label in labels:
            for file in sorted((photos / split / label).iterdir()):
                rows.append(f"photos/{split}/{label}/{file.name},{label},{split}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


@pytest.fixture(scope="module")
def runs(
    text_run: Callable[..., Path], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return a run on two of four classes, and one on two others and one of the first's."""
    few = listing(tmp_path_factory.mktemp("few"), photos, "green_leaf", "red_ball", "grey_stone")
    return text_run(), text_run(data=str(few), prompt_count=1, classes="base", seed=2)


@pytest.fixture
def models(runs: tuple[Path, Path]) -> list[TunedModel]:
    first, second = (load_run(run) for run in runs)
    second = replace(second, fitted=replace(second.fitted, calibration=Calibration(0.6)))
    return [shaken(first), second]


def row(model: TunedModel, name: str) -> Tensor:
    return model.class_rows.rows[model.class_names.index(name)]


def test_each_run_rules_its_own_classes(models: list[TunedModel]) -> None:
    first, second = models
    assert first.tuned == (True, True, False, False)
    # label order of the second list is that of its first lines
    assert [n for n, own in zip(second.class_names, second.tuned, strict=True) if own] == [
        *second.class_names[:2]
    ]
    source = source_from_runs(models)
    assert source.class_names == (SKY, LEAF, STONE, BALL)
    of = dict(zip(source.class_names, source.rows.rows, strict=True))
    tuned: dict[str, list[Tensor]] = {name: [] for name in source.class_names}
    for model in models:
        for name, own in zip(model.class_names, model.tuned, strict=True):
            if own:
                tuned[name].append(row(model, name))
    counts = {name: len(rows) for name, rows in tuned.items()}
    assert sorted(counts.values()) == [0, 1, 1, 2]
    for name, rows in tuned.items():
        expected = sum(rows) / len(rows) if rows else sum(row(m, name) for m in models) / 2
        torch.testing.assert_close(of[name], expected, atol=1e-6, rtol=0)
    assert source.tuned == tuple(counts[name] > 0 for name in source.class_names)


def test_a_class_that_only_one_run_knows_is_new_to_the_other(models: list[TunedModel]) -> None:
    first, second = models
    assert SKY not in second.class_names
    strangers = replace(first, split=replace(first.split, tuned=(1, 2)))  # to the sky
    source = source_from_runs([strangers, second])
    expected = (by_hand(first, SKY) + by_hand(second, SKY)) / 2
    torch.testing.assert_close(source.rows.rows[0], expected, atol=1e-6, rtol=0)
    other = with_classes(source, [strangers, second], [SKY, "tabby cat"])
    expected = (by_hand(first, "tabby cat") + by_hand(second, "tabby cat")) / 2
    torch.testing.assert_close(other.rows.rows[1], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_temperature_is_fitted_on_all_validation_images(models: list[TunedModel]) -> None:
    source = source_from_runs(models)
    pixels, labels = pixels_of(source)
    columns = [index for index, own in enumerate(source.tuned) if own]
    assert set(labels.tolist()) == set(columns)
    embeddings = models[0].backbone.image_embeddings(pixels)
    targets = torch.searchsorted(torch.tensor(columns), labels)
    for rows, found in (
        (source.rows.rows, source.temperature),
        (source.hand_written, source.zero_shot_temperature),
    ):
        logits = (models[0].backbone.scale * embeddings @ rows[columns].T).double()
        # a grid of ln T; the summed loss has the prior of `fit_temperature`
        logs = torch.linspace(-3, 3, 1201)
        losses = [
            cross_entropy(logits / t.exp(), targets, reduction="sum") + t**2 / 0.5 for t in logs
        ]
        best = logs[int(torch.stack(losses).argmin())].exp()
        assert found == pytest.approx(float(best), rel=0.01)


def pixels_of(source: Source) -> tuple[Tensor, Tensor]:
    photos = source.photos.gate
    config = source.learner.backbone.preprocess
    pixels = [torch.from_numpy(preprocess(photo.path, config).copy()) for photo in photos]
    return torch.stack(pixels), torch.tensor([photo.label for photo in photos])


def test_images_pairs_and_provenance_of_all_runs_are_there(models: list[TunedModel]) -> None:
    source = source_from_runs(models)
    for kind, split in (("gate", "val"), ("training", "train")):
        photos = getattr(source.photos, kind)
        assert len(photos) == sum(len(getattr(model.split, split)) for model in models)
        for photo in photos:
            assert photo.path.is_file()
            assert source.class_names[photo.label] == photo.path.parent.name.replace("_", " ")
    total = sum(sum(model.fitted.pairs.values()) for model in models)
    assert sum(pair["count"] for pair in source.pairs) == total > 0
    assert [run["data_fingerprint"] for run in source.training["runs"]] == [
        model.split.fingerprint() for model in models
    ]
    json.dumps(dict(source.training))


def test_images_that_two_runs_share_count_once(
    text_run: Callable[..., Path], models: list[TunedModel]
) -> None:
    again = load_run(text_run(seed=5))
    source = source_from_runs([models[0], again])
    assert source.photos.gate == source_from_run(models[0]).photos.gate


def test_a_merged_bundle_passes_the_gate(models: list[TunedModel], tmp_path: Path) -> None:
    source = source_from_runs(models)
    out = export(source, tmp_path / "x.capt", ExportOptions())
    classifier = Classifier.load(out)
    assert classifier.class_names == source.class_names
    assert [run["seed"] for run in classifier.manifest.training["runs"]] == [1, 2]


def test_templates_of_all_runs_make_the_hand_written_rows(
    text_run: Callable[..., Path], models: list[TunedModel]
) -> None:
    other = load_run(text_run(prompt_templates=("a drawing of a {}.",), prompt_count=1))
    source = source_from_runs([models[0], other])
    templates = [*models[0].config.prompt.templates, "a drawing of a {}."]
    expected = models[0].backbone.class_embeddings(source.class_names, templates)
    torch.testing.assert_close(source.hand_written, expected, atol=1e-6, rtol=0)


def test_a_data_set_that_has_moved_can_be_pointed_to(
    text_run: Callable[..., Path], models: list[TunedModel], photos: Path, tmp_path: Path
) -> None:
    gone = [models[0], load_run(text_run(seed=5))]
    gone = [replace(model, config=replace(model.config, data="/gone/photos")) for model in gone]
    with pytest.raises(DataError, match="--gate-data"):
        source_from_runs(gone)
    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved)
    source = source_from_runs(gone, moved)
    assert all(moved in photo.path.parents for photo in source.photos.gate)
    # other photos, in folders of the same classes, serve as well
    other = tmp_path / "other"
    for file in (photos / "test" / "blue_sky").iterdir():
        (other / "val" / "blue_sky").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, other / "val" / "blue_sky" / f"new-{file.name}")
    source = source_from_runs(gone, other)
    assert {photo.label for photo in source.photos.gate} == {0}


def test_without_validation_images_the_runs_temperatures_are_averaged(
    models: list[TunedModel],
) -> None:
    blind = [replace(model, split=replace(model.split, val=())) for model in models]
    source = source_from_runs(blind)
    assert source.temperature == pytest.approx((1.7 * 0.6) ** 0.5)
    asked, others = ({p.path for p in own} for own in (source.photos.gate, source.photos.training))
    assert asked and others and not asked & others  # half of the training images each


def test_runs_that_do_not_fit_together_are_refused(
    models: list[TunedModel], tuned_run: Path, runs: tuple[Path, Path]
) -> None:
    first, second = models
    with pytest.raises(ConfigError, match="at least two runs, came 1"):
        source_from_runs([first])
    with pytest.raises(ConfigError, match="runs 1 and 3 are the same"):
        source_from_runs([first, second, shaken(load_run(runs[0]))])
    other = replace(second, provenance={**second.provenance, "model_sha256": "f" * 64})
    with pytest.raises(ConfigError, match=r"one model and preprocessing, came local-dir.*ffffffff"):
        source_from_runs([first, other])
    with pytest.raises(ConfigError, match=r"run 2 .* --without visual,colours"):
        source_from_runs([first, load_run(tuned_run)])
    names = tuple(name.replace(" ", "_").title() for name in second.class_names)
    respelled = replace(second, split=replace(second.split, class_names=names))
    with pytest.raises(ConfigError, match=r"is there already, as .* with --class-names"):
        source_from_runs([first, respelled])
