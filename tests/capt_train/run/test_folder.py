from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from capt_deploy.confidence.calibration import UNCALIBRATED
from capt_deploy.core.errors import RunError
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.method.class_rows import UNCHANGED
from capt_train.method.mixture import Mixture
from capt_train.method.prompt import PromptLearner
from capt_train.pipeline import train
from capt_train.run import folder as runs
from capt_train.run.fitted import Fitted
from capt_train.run.folder import load_run, read_config
from capt_train.setting_groups import PromptSettings
from capt_train.tune.candidates import Candidate
from capt_train.tune.choice import Choice


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_a_loaded_run_holds_the_best_context_for_every_class_name(
    finished: Path, tiny_backbone: Backbone
) -> None:
    model = load_run(finished)
    assert model.class_names == ("blue sky", "green leaf", "grey stone", "red ball")
    assert model.tuned == (True, True, False, False)
    prompt = PromptLearner(tiny_backbone, model.class_names, [0, 1], PromptSettings(depth=1))
    with torch.no_grad():
        start = prompt(range(4))
        best = load_file(finished / "best.safetensors")
        prompt.context.copy_(best["module.prompts.0.context"])
        torch.testing.assert_close(model.class_rows.rows, prompt(range(4)))
    torch.testing.assert_close(model.zero_shot, start)
    assert not torch.allclose(model.class_rows.rows, start, atol=1e-4)


def test_a_loaded_run_of_both_sides_says_what_it_said_when_it_was_tuned(
    tuned_run: Path,
) -> None:
    model = load_run(tuned_run)
    result = json.loads((tuned_run / "result.json").read_text())
    assert model.visual is model.learner.visual is not None
    assert model.visual.strength is not None
    assert float(model.visual.strength) == model.fitted.strength == result["strength"] > 0
    state = load_file(tuned_run / "best.safetensors")
    own = {f"module.{name}": value for name, value in model.learner.state_dict().items()}
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert float(state["module.tuner.alpha"]) != 1.0  # a constant from the training images
    texts = torch.cat([model.zero_shot[None], model.learner.texts(range(4)).embeddings])
    expected = model.fitted.mixture.rows(texts, model.tuned).detach()
    gaussian = model.learner.rows
    assert gaussian is not None and gaussian.share == 0.2
    expected[:2] += 0.2 / model.backbone.scale * gaussian.weight
    torch.testing.assert_close(model.class_rows.rows, expected, atol=1e-6, rtol=0)
    biases = torch.cat([0.2 * gaussian.bias, torch.zeros(2)])
    torch.testing.assert_close(model.class_rows.biases, biases)
    pixels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    moved = model.learner.image_embeddings(pixels)
    frozen = model.learner.backbone.image_embeddings(pixels)  # colours mapped
    assert not torch.allclose(moved, frozen, atol=1e-3)
    model.visual.set_constants(strength=0.0)
    still = model.learner.image_embeddings(pixels)
    torch.testing.assert_close(still, frozen, atol=1e-6, rtol=0)
    assert not torch.allclose(frozen, model.backbone.image_embeddings(pixels), atol=1e-3)


def test_a_visual_side_of_no_strength_is_as_good_as_none(tuned_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tuned_run, tmp_path / "run"))
    edit(run / "result.json", strength=0.0)
    assert load_run(run).visual is None


def test_logits_are_the_scaled_cosines_over_the_temperature_of_each_model(finished: Path) -> None:
    model = load_run(finished)
    result = json.loads((finished / "result.json").read_text())
    fitted = model.fitted
    assert fitted.temperature == result["calibration"]["temperature"] != 1.0
    assert fitted.zero_shot_temperature == result["zero_shot_temperature"] != 1.0
    assert abs(math.log(fitted.temperature / fitted.zero_shot_temperature)) > 0.01
    assert [[*pair, count] for pair, count in fitted.pairs.items()] == result["pairs"] != []
    images = torch.nn.functional.normalize(torch.randn(3, 32), dim=1)
    for row in range(3):
        for column in range(4):
            scale = model.backbone.scale
            cosine = float(sum(images[row] * model.class_rows.rows[column]))
            own = model.logits(images)[row, column].item()
            assert own == pytest.approx(scale * cosine / fitted.temperature, abs=1e-4)
            zero_shot = float(sum(images[row] * model.zero_shot[column]))
            own = model.zero_shot_logits(images)[row, column].item()
            expected = scale * zero_shot / fitted.zero_shot_temperature
            assert own == pytest.approx(expected, abs=1e-4)


def test_a_bias_of_the_model_is_in_its_logits(
    configure: Callable[..., TrainConfig], write_model: Callable[..., Path], tmp_path: Path
) -> None:
    name = f"local-dir:{write_model(custom_text=True, init_logit_bias=-7.5)}"
    train(configure(model=name), tmp_path / "run")
    model = load_run(tmp_path / "run")
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    frozen = open_clip.create_model(name).eval()
    texts = [f"a photo of a {name}." for name in model.class_names]
    with torch.no_grad():
        images = model.backbone.normalise(pixels)
        expected, _ = frozen.get_logits(images, open_clip.get_tokenizer(name)(texts))
    embeddings = model.backbone.image_embeddings(pixels)
    zero_shot = model.zero_shot_logits(embeddings) * model.fitted.zero_shot_temperature
    torch.testing.assert_close(zero_shot, expected, rtol=0, atol=1e-4)
    bare = model.backbone.scale * embeddings @ model.class_rows.rows.T
    tuned = model.logits(embeddings) * model.fitted.temperature
    torch.testing.assert_close(tuned, bare - 7.5, rtol=0, atol=1e-4)


def test_provenance_names_settings_data_model_and_versions(finished: Path) -> None:
    provenance = load_run(finished).provenance
    split = json.loads((finished / "split.json").read_text())
    assert provenance["data_fingerprint"] == split["fingerprint"]
    assert len(provenance["model_sha256"]) == 64
    assert provenance["seed"] == 1
    assert set(provenance["versions"]) >= {"capt", "python", "torch", "open_clip_torch"}
    json.dumps(provenance)


def test_a_zeroshot_run_is_the_hand_written_prompt(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(configure(method="zeroshot", prompt_templates=("a {}.", "one {}.")), tmp_path / "run")
    model = load_run(tmp_path / "run")
    assert torch.equal(model.class_rows.rows, model.zero_shot)
    expected = model.backbone.class_embeddings(model.class_names, ["a {}.", "one {}."])
    assert torch.equal(model.zero_shot, expected)


def test_a_model_without_validation_images_has_temperature_1() -> None:
    own = Mixture.learned_only(1)
    assert Fitted({(0, 1): 2}, own) == Fitted({(0, 1): 2}, own, 1.0, UNCALIBRATED, 1.0)
    assert UNCALIBRATED.temperature == 1.0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"no run \(config\.json is missing\)"):
            load_run(folder)


def test_a_run_that_has_not_ended_says_how_to_continue(run: Path) -> None:
    (run / "result.json").unlink()
    with pytest.raises(RunError, match=r"tuning has not ended.*--resume"):
        load_run(run)


def test_a_run_whose_model_has_changed_is_refused(run: Path, tiny_model_dir: Path) -> None:
    model = Path(shutil.copytree(tiny_model_dir, run.parent / "model"))
    config = json.loads((run / "config.json").read_text())["config"]
    edit(run / "config.json", config={**config, "model": f"local-dir:{model}"})
    assert load_run(run).class_names
    state = load_file(model / "open_clip_model.safetensors")
    state["logit_scale"] += 0.1
    save_file(state, model / "open_clip_model.safetensors")
    with pytest.raises(RunError, match="restore that model or tune again"):
        load_run(run)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": {}, "model_sha256": ""}', "3"])
def test_a_config_that_is_none_is_refused(content: str, run: Path) -> None:
    (run / "config.json").write_text(content)
    with pytest.raises(RunError):
        read_config(run)


def test_scales_of_other_classes_are_refused(run: Path) -> None:
    vector = {"scales": [1.0], "biases": [0.0]}
    own = {"kind": "vector", "temperature": 1.0, "vector": vector, "top_label": None}
    edit(run / "result.json", calibration=own)
    with pytest.raises(RunError, match="expected vector scaling of 4 classes, came 1"):
        load_run(run)


FITTED = ["calibration", "zero_shot_temperature", "pairs", "mixture", "strength", "outside"]


@pytest.mark.parametrize("key", FITTED)
def test_a_result_without_one_of_its_values_is_refused(key: str, run: Path) -> None:
    content = json.loads((run / "result.json").read_text())
    del content[key]
    (run / "result.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"result\.json: not as capt-train writes it.*'{key}'"):
        load_run(run)


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": None},
        {"calibration": {"kind": "temperature"}},
        {"calibration": {"kind": "x", "temperature": 1, "vector": None, "top_label": None}},
        {"zero_shot_temperature": None},
        {"zero_shot_temperature": "warm"},
        {"pairs": [[1, 2]]},
        {"pairs": 3},
        {"strength": None},
        {"mixture": None},
        {"mixture": {"inside": [0.0, 1.0]}},
        {"mixture": {"inside": [1.0], "outside": [1.0]}},
        {"outside": None},
        {"outside": {"scale": 1.0, "offset": "warm"}},
    ],
)
def test_a_damaged_result_is_refused(change: dict[str, Any], run: Path) -> None:
    edit(run / "result.json", **change)
    with pytest.raises(RunError, match=r"result\.json: not as capt-train writes it"):
        load_run(run)


def test_a_loaded_run_has_the_parts_that_were_chosen(default_run: tuple[TrainConfig, Path]) -> None:
    _, run = default_run
    choice = json.loads((run / "choice.json").read_text())
    assert [row["candidate"]["prompt"] for row in choice["table"]] == [True] * 4  # it is pinned
    model, chosen = load_run(run), choice["chosen"]
    assert (model.learner.class_map is not None) == (chosen["side"] is not None)
    assert (model.learner.rows is not None) == (chosen["weight"] > 0)
    assert model.provenance["choice"] == choice
    assert json.loads((run / "metrics.json").read_text())["choice"] == choice


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out_of_fold.safetensors", b"damaged"),
        ("choice.json", b"{}"),
        ("choice.json", b'{"chosen": {"prompt": true, "side": "x", "ridge": 0, "weight": 0}}'),
    ],
)
def test_a_damaged_choice_is_refused(
    name: str, content: bytes, default_run: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(default_run[1], tmp_path / "run"))
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=name):
        load_run(run)


def test_a_missing_or_damaged_checkpoint_is_refused(run: Path) -> None:
    (run / "best.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"best\.safetensors: not a checkpoint"):
        load_run(run)


def test_a_run_says_what_each_of_its_files_is(tuned_run: Path) -> None:
    patterns = [name for names in runs.FILES for name in names.split(", ")]
    readme = (tuned_run / runs.README).read_text()
    assert all(f"{names}\n    " in readme for names in runs.FILES)
    files = [file.name for file in tuned_run.iterdir() if file.name != runs.README]
    unnamed = [file for file in files if not any(fnmatch(file, name) for name in patterns)]
    assert unnamed == []


def test_a_choice_of_an_older_run_has_a_row_for_each_photo(tmp_path: Path) -> None:
    logits = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [3.0, 4.0]])
    choice = Choice(
        Candidate(),
        UNCHANGED,
        (),
        None,
        {"tuned": 2, "new": 0},
        logits[[0, 2]],
        torch.tensor([0, 2]),
    )
    runs.write_choice(tmp_path, choice)
    for content in (None, {"logits": logits}):
        if content is not None:
            save_file(content, tmp_path / runs.OUT_OF_FOLD)
        read = runs.read_choice(tmp_path)
        assert read is not None and read.judging.tolist() == [0, 2]
        assert torch.equal(read.out_of_fold, logits[[0, 2]])
