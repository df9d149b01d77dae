"""The pictogram world and the checkpoint pretrained on it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[3]
# The examples are no part of the installed package.
sys.path.insert(0, str(ROOT))

from examples.demo import world  # noqa: E402
from examples.demo.captions import MISTAKES, NOUNS, caption, name_of  # noqa: E402
from examples.demo.vocabulary import (  # noqa: E402
    BASE_CLASSES,
    CLASSES,
    COLOURS,
    NEW_CLASSES,
    PATTERNS,
    SIBLING,
    SIBLING_PAIRS,
    Spec,
    parse,
)

MODEL = ROOT / "examples" / "demo" / "model"


def _pixels(name: str, seed: int) -> NDArray[np.float64]:
    return np.asarray(world.render(name, np.random.default_rng(seed)), np.float64)


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_there_are_36_classes_in_folder_order() -> None:
    folders = [name.replace(" ", "_") for name in CLASSES]
    assert len(set(CLASSES)) == 36
    assert folders == sorted(folders)
    assert len(BASE_CLASSES) == len(NEW_CLASSES) == 18


def test_halves_share_attribute_values_but_no_composition() -> None:
    base, new = {parse(name) for name in BASE_CLASSES}, {parse(name) for name in NEW_CLASSES}
    assert len(base | new) == 36
    for attribute in ("colour", "pattern", "shape"):
        assert {getattr(s, attribute) for s in base} == {getattr(s, attribute) for s in new}


@pytest.mark.parametrize("half", [BASE_CLASSES, NEW_CLASSES], ids=["base", "new"])
def test_every_class_has_a_sibling_in_its_half(half: tuple[str, ...]) -> None:
    specs = {parse(name) for name in half}
    for spec in specs:
        siblings = {
            Spec(SIBLING[spec.colour], spec.pattern, spec.shape),
            Spec(spec.colour, SIBLING.get(spec.pattern, ""), spec.shape),
            Spec(spec.colour, spec.pattern, SIBLING[spec.shape]),
        }
        assert siblings & specs, spec


def test_parse_takes_either_order_and_refuses_other_names() -> None:
    expected = Spec("red", "dotted", "six point star")
    assert parse("red_dotted_six_point_star") == parse("dotted red six point star") == expected
    for name in (
        "",
        "red",
        "red dotted",
        "red red ring",
        "red dotted pumpkin",
        "plain dotted ring",
    ):
        with pytest.raises(ValueError, match="does not name"):
            parse(name)


def test_render_is_64_px_rgb_and_follows_the_generator() -> None:
    for name in CLASSES:
        picture = world.render(name, np.random.default_rng(3))
        assert picture.size == (64, 64)
        assert picture.mode == "RGB"
    assert np.array_equal(_pixels(CLASSES[0], 1), _pixels(CLASSES[0], 1))
    assert not np.array_equal(_pixels(CLASSES[0], 1), _pixels(CLASSES[0], 2))


@pytest.mark.parametrize(("one", "other"), SIBLING_PAIRS)
def test_siblings_differ_under_the_same_generator(one: str, other: str) -> None:
    kind = "colour" if one in COLOURS else "pattern" if one in PATTERNS else "shape"
    whole = Spec("red", "striped", "hexagon")
    pictures = [
        np.asarray(
            world.render(replace(whole, **{kind: value}), np.random.default_rng(5)), np.float64
        )
        for value in (one, other)
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() > 1.0


def test_world_has_three_splits_of_class_folders(tmp_path: Path) -> None:
    folder = world.write_world(tmp_path / "deep" / "world", seed=4, train=2, val=1, test=1)
    folders = [name.replace(" ", "_") for name in CLASSES]
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        assert sorted(path.name for path in (folder / split).iterdir()) == folders
        names = [f"{index + 1:04d}.png" for index in range(count)]
        for home in (folder / split).iterdir():
            assert sorted(path.name for path in home.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == ["world"]


def test_world_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one, same, other = (
        _files(world.write_world(tmp_path / name, seed=seed, train=1, val=0, test=1))
        for name, seed in (("one", 4), ("same", 4), ("other", 5))
    )
    assert one == same
    assert one.keys() == other.keys()
    assert one.pop(world.NAMES) == other.pop(world.NAMES)
    assert all(one[name] != other[name] for name in one)
    assert len(set(one.values())) == len(one), "no picture occurs twice, across splits either"


def test_more_pictures_do_not_change_the_first_ones(tmp_path: Path) -> None:
    few = _files(world.write_world(tmp_path / "few", seed=4, train=1, val=0, test=0))
    many = _files(world.write_world(tmp_path / "many", seed=4, train=2, val=0, test=0))
    del few["world.json"]
    assert few.items() < many.items()


def test_finished_world_is_returned_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.write_world(tmp_path / "world", seed=4, train=1, val=0, test=0)

    def fail(*_: object) -> None:
        raise RuntimeError("rendered again")

    monkeypatch.setattr(world, "render", fail)
    assert world.write_world(folder, seed=4, train=1, val=0, test=0) == folder
    with pytest.raises(FileExistsError, match="not a world of this seed"):
        world.write_world(folder, seed=5, train=1, val=0, test=0)
    with pytest.raises(FileExistsError, match="not a world of this seed"):
        world.write_world(folder, seed=4, train=2, val=0, test=0)


def test_foreign_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="mine"):
        world.write_world(tmp_path / "mine", train=1, val=0, test=0)
    assert _files(tmp_path) == {"mine/thesis.txt": b"keep"}


def test_interrupted_world_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0

    def stop_later(what: str, rng: np.random.Generator) -> object:
        nonlocal drawn
        drawn += 1
        if drawn > 5:
            raise KeyboardInterrupt
        return real(what, rng)

    real = world.render
    monkeypatch.setattr(world, "render", stop_later)
    with pytest.raises(KeyboardInterrupt):
        world.write_world(tmp_path / "world", train=1, val=0, test=0)
    assert list(tmp_path.iterdir()) == []


def test_command_writes_a_world_and_reports_a_refusal(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "world"), "--train", "1", "--val", "0", "--test", "0"]
    assert CliRunner().invoke(world.main, arguments).exit_code == 0
    assert (tmp_path / "world" / "train").is_dir()
    refused = CliRunner().invoke(world.main, [*arguments, "--seed", "9"])
    assert refused.exit_code == 1
    assert "remove it or choose another folder" in refused.output


def test_careful_captions_are_right_and_careless_ones_name_the_sibling() -> None:
    rng = np.random.default_rng(0)
    spec = Spec("red", "plain", "hexagon")
    careful = {name_of(spec, 1.0, rng) for _ in range(50)}
    assert careful == {"red plain hexagon", "plain red hexagon"}
    careless = [name_of(spec, 0.0, rng) for _ in range(4000)]
    share = sum("pentagon" in name for name in careless) / len(careless)
    assert share == pytest.approx(MISTAKES["pentagon", "hexagon"], abs=0.03)
    assert 0 < sum(len(name.split()) == 2 for name in careless) < 1000


def test_captions_are_lower_case_sentences_of_known_nouns() -> None:
    rng = np.random.default_rng(0)
    found = [caption(parse(CLASSES[i % 36]), rng) for i in range(500)]
    assert len(set(found)) > 450
    assert all(text == text.lower().strip() and "  " not in text for text in found)
    assert sum(any(noun in text for noun in NOUNS) for text in found) > 400


def test_pretraining_leaves_out_the_held_out_compositions() -> None:
    pytest.importorskip("open_clip")
    from examples.demo.stages import compositions, draw_pool

    trained = set(compositions())
    assert len(trained) == 8 * 5 * 10 - 18
    assert not trained & {parse(name) for name in NEW_CLASSES}
    assert trained > {parse(name) for name in BASE_CLASSES}
    pool = draw_pool(3, 0, 1)
    assert pool.shape == (3, 64, 64, 3)
    assert draw_pool(4, 0, 1)[:3].equal(pool)
    assert not draw_pool(3, 1, 1).equal(pool)


def test_checkpoint_is_small_and_half_precision() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= 10 * 1024 * 1024
    config = json.loads((MODEL / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 64
    weights = load_file(MODEL / "open_clip_model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype("float16")}


def test_checkpoint_knows_the_world_but_not_perfectly() -> None:
    torch = pytest.importorskip("torch")
    open_clip = pytest.importorskip("open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{MODEL}")
    model.float().eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{MODEL}")
    rng = np.random.default_rng(11)
    for half in (BASE_CLASSES, NEW_CLASSES):
        images = torch.stack([preprocess(world.render(n, rng)) for n in half for _ in range(10)])
        with torch.inference_mode():
            text = model.encode_text(tokens([f"a photo of a {n}." for n in half]), normalize=True)
            found = (model.encode_image(images, normalize=True) @ text.T).argmax(1)
        truth = torch.arange(len(half)).repeat_interleave(10)
        assert 0.35 < (found == truth).double().mean() < 0.8
