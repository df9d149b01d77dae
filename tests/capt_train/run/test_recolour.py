"""The colour map of a run: which images it is fitted on, and what a run does with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from torch import Tensor

from capt_deploy.core.errors import RunError
from capt_deploy.data.datasets import Item, read_dataset
from capt_deploy.serving.classifier import Classifier
from capt_train.clip.colour_map import ColourMap
from capt_train.config import TrainConfig
from capt_train.data.features import Embedded, embed, read_pixels
from capt_train.pipeline import train
from capt_train.run import recolour as recolouring
from capt_train.run.colours import ColourFit
from capt_train.run.evaluate import evaluate_run
from capt_train.run.folder import COLOURS, TunedModel, load_run
from capt_train.run.recolour import recolour
from capt_train.run.setup import Setup, load
from export.cli.export import main as capt_export

Configure = Callable[..., TrainConfig]
MAP = ColourMap(torch.diag(torch.tensor([2.0, 0.5, 1.0])), torch.tensor([0.1, 0.0, -0.3]))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def frozen_of(setup: Setup) -> Embedded:
    split = setup.split
    own = (embed(setup.backbone, None, setup.dataset, n, "it") for n in (split.train, split.val))
    return Embedded(*own)


@pytest.fixture
def setup(configure: Configure) -> Setup:
    """Return a run of the second and fourth class, before its first step."""
    setup = load(configure(method="zeroshot", added=("colours",)))
    chosen = (1, 3)

    def among(items: tuple[Item, ...]) -> tuple[Item, ...]:
        return tuple(item for item in items if item.label in chosen)

    own = replace(
        setup.split, tuned=chosen, train=among(setup.split.train), val=among(setup.split.val)
    )
    return replace(setup, split=own)


def pairs(pixels: Tensor, labels: list[int]) -> list[tuple[bytes, int]]:
    images = [image.numpy().tobytes() for image in pixels]
    return list(zip(images, labels, strict=True))


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return a list of the arguments of each fit from now on; every fit returns MAP."""
    calls: list[tuple[Any, ...]] = []

    def fit(*arguments: Any) -> ColourFit:
        calls.append(arguments)
        return ColourFit(MAP, 0.5, 0.1)

    monkeypatch.setattr(recolouring, "fit_colours", fit)
    return calls


def test_it_is_fitted_on_training_images(setup, fitted, tmp_path):
    recolour(setup, frozen_of(setup), tmp_path)
    ((backbone, reference, pixels, labels, embeddings),) = fitted
    assert torch.equal(reference, setup.zero_shot[[1, 3]])
    expected = read_pixels(setup.backbone, setup.dataset, setup.split.train)
    places = [setup.split.tuned.index(item.label) for item in setup.split.train]
    assert sorted(pairs(pixels, labels.tolist())) == sorted(pairs(expected, places))
    torch.testing.assert_close(backbone.image_embeddings(pixels), embeddings, rtol=0, atol=1e-5)


def test_of_very_many_images_a_random_part_is_enough(setup, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(recolouring, "_MOST", 4)
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        seeded = replace(setup, config=replace(setup.config, seed=seed))
        recolour(seeded, frozen_of(seeded), tmp_path / str(number))
    first, same, other = (call[4] for call in fitted)
    assert len(first) == 4
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_every_image_is_embedded_through_the_map(setup, fitted, tmp_path):
    frozen = frozen_of(setup)
    seen, images = recolour(setup, frozen, tmp_path)
    assert seen.colours is MAP and setup.backbone.colours is None
    for own, before, items in (
        (images.train, frozen.train, setup.split.train),
        (images.val, frozen.val, setup.split.val),
    ):
        pixels = read_pixels(setup.backbone, setup.dataset, items)
        expected = setup.backbone.recoloured(MAP).image_embeddings(pixels)
        torch.testing.assert_close(own.embeddings, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(own.embeddings, before.embeddings, atol=0.01)
        assert torch.equal(own.labels, before.labels)


def test_images_that_cannot_be_read_stay_left_out(setup, fitted, photos, tmp_path):
    moved = Path(shutil.copytree(photos, tmp_path / "photos"))
    (moved / setup.split.val[1].path).write_bytes(b"no image")
    setup = replace(setup, dataset=read_dataset(moved))
    frozen = frozen_of(setup)
    _, images = recolour(setup, frozen, tmp_path)
    assert len(images.val) == 7
    kept = images.val.kept(setup.split.val)
    assert kept == frozen.val.kept(setup.split.val) and len(kept) == 7
    assert images.val.labels.tolist() == [item.label for item in kept]


def test_a_map_that_is_not_kept_changes_nothing_and_is_written(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(recolouring, "fit_colours", lambda *_, **__: ColourFit(None, 0.0, 0.0))
    frozen = frozen_of(setup)
    assert recolour(setup, frozen, tmp_path) == (setup.backbone, frozen)
    assert read(tmp_path / COLOURS)["colours"] is None
    without = replace(setup, config=replace(setup.config, added=()))
    (tmp_path / "other").mkdir()
    assert recolour(without, frozen, tmp_path / "other") == (setup.backbone, frozen)
    assert list((tmp_path / "other").iterdir()) == []


# Whole runs of a second, which keep MAP.

TINY: dict[str, Any] = {"shots": 6, "tuning_epochs": 2, "visual_views": 2}


def run_with_map(config: TrainConfig, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recolouring, "fit_colours", lambda *_: ColourFit(MAP, 0.5, 0.1))
        train(config, folder)
    assert read(folder / COLOURS)["colours"] == MAP.to_dict()
    return folder


@pytest.fixture(scope="module")
def coloured(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of both sides and a colour map; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "coloured"
    return run_with_map(configure(method="capt", **TINY), folder)


@pytest.fixture(scope="module")
def alone(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of nothing but a colour map."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    return run_with_map(configure(method="zeroshot", added=("colours",), **TINY), folder)


def test_a_run_is_compared_with_the_model_as_it_came(coloured, configure, tmp_path):
    train(configure(method="zeroshot", **TINY), tmp_path / "plain")

    def before(run: Path) -> list[Any]:
        metrics, result = read(run / "metrics.json"), read(run / "result.json")
        pairs = read(run / "confusions.json")["pairs"]
        counts = [(own["true"], own["predicted"], own["before"]) for own in pairs]
        return [
            metrics["zero_shot"],
            metrics["uncalibrated"]["zero_shot"],
            result["zero_shot_temperature"],
            result["pairs"],
            sorted(own for own in counts if own[2]),
        ]

    assert before(coloured) == before(tmp_path / "plain")
    assert before(coloured)[-1] != []
    assert read(coloured / "metrics.json")["all"] != read(tmp_path / "plain/metrics.json")["all"]


def test_a_resumed_run_takes_the_map_that_it_has_written(
    coloured, configure, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "split.json", COLOURS):
        shutil.copy2(coloured / name, run / name)
    written = (run / COLOURS).stat()
    monkeypatch.setattr(recolouring, "fit_colours", None)
    train(configure(method="capt", **TINY), run, resume=True)
    after = (run / COLOURS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    names = {file.name for file in coloured.iterdir()}
    assert names == {file.name for file in run.iterdir()}
    for name in names:
        assert (run / name).read_bytes() == (coloured / name).read_bytes(), name


def embedded(model: TunedModel, photos: Path) -> Tensor:
    items = read_dataset(photos).splits["test"]
    return model.learner.image_embeddings(read_pixels(model.backbone, read_dataset(photos), items))


@pytest.mark.parametrize("name", ["coloured", "alone"])
def test_a_run_with_a_map_evaluates_loads_and_exports(name, request, photos, tmp_path):
    run = request.getfixturevalue(name)
    metrics, again = read(run / "metrics.json"), evaluate_run(run, photos)
    assert {key: metrics[key] for key in again} == again
    assert "colours" in metrics["parts"]
    model = load_run(run)
    assert metrics["trained_parameters"] == model.learner.size >= 12
    assert model.backbone.colours is None and model.moves_images
    own = model.learner.backbone.colours
    assert own is not None and own.to_dict() == read(run / COLOURS)["colours"]

    bundle = tmp_path / "tiny.capt"
    done = CliRunner().invoke(capt_export, [str(run), "--out", str(bundle)])
    assert done.exit_code == 0, done.output
    # rows and temperature of the frozen model are of no use to a graph that maps colours first
    assert {*load_file(bundle / "text_embeddings.safetensors")} == {"text_embeddings", "bias"}
    assert read(bundle / "manifest.json")["calibration"] == {
        "fp32": {"temperature": model.fitted.temperature}
    }
    classifier = Classifier.load(bundle)
    files = [photos / item.path for item in read_dataset(photos).splits["test"]]
    logits = model.logits(embedded(model, photos))
    expected = logits.softmax(dim=1)
    found = torch.tensor([[*own.probabilities] for own in classifier.predict(files)])
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=1e-4)
    assert torch.equal(found.argmax(dim=1), logits.argmax(dim=1))


def test_a_map_alone_is_the_hand_written_prompt_on_other_colours(alone, photos):
    model = load_run(alone)
    assert model.visual is None and not model.learner.trainable
    assert torch.equal(model.class_rows.rows, model.zero_shot)
    items = read_dataset(photos).splits["test"]
    pixels = read_pixels(model.backbone, read_dataset(photos), items)
    own = ColourMap.from_dict(read(alone / COLOURS)["colours"])
    expected = model.backbone.recoloured(own).image_embeddings(pixels)
    assert torch.equal(model.learner.image_embeddings(pixels), expected)
    assert read(alone / "metrics.json")["trained_parameters"] == 12


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        '{"colours": null}',
        '{"colours": null, "gain": "high", "standard_error": 0.1}',
        '{"colours": null, "gain": 0.5, "standard_error": null}',
        '{"colours": 3, "gain": 0.5, "standard_error": 0.1}',
        '{"colours": {"matrix": null, "offset": [0, 0, 0]}, "gain": 0.5, "standard_error": 0.1}',
    ],
)
def test_a_run_without_its_map_is_refused(content, alone, tmp_path):
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    (run / COLOURS).unlink()
    if content is not None:
        (run / COLOURS).write_text(content)
    with pytest.raises(RunError, match=r"colours\.json: "):
        load_run(run)
