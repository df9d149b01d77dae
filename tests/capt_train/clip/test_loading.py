from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from capt_deploy.core.errors import ConfigError, ModelError
from capt_train.clip.backbone import Backbone
from capt_train.clip.loading import choose_device, load_backbone
from capt_train.pipeline import train
from capt_train.run.folder import load_run
from tests.configs import train_config

CPU = torch.device("cpu")
WEIGHTS = "open_clip_model.safetensors"
TEXTS = ["a photo of a cat.", "one two three"]


@pytest.fixture
def own_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "own"))


def test_an_architecture_with_a_checkpoint_file_gives_the_same_model(
    tiny_model_dir: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_model_dir / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "capt-tiny", config)
    backbone = load_backbone("capt-tiny", str(tiny_model_dir / WEIGHTS), CPU)
    assert backbone.fingerprint() == tiny_backbone.fingerprint()
    assert torch.equal(backbone.text_embeddings(TEXTS), tiny_backbone.text_embeddings(TEXTS))


def test_a_half_precision_checkpoint_is_computed_in_float32(
    own_model: Path, tiny_backbone: Backbone
) -> None:
    save_file({k: v.half() for k, v in load_file(own_model / WEIGHTS).items()}, own_model / WEIGHTS)
    embeddings = load_backbone(str(own_model), None, CPU).text_embeddings(TEXTS)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, tiny_backbone.text_embeddings(TEXTS), rtol=0, atol=5e-3)


@pytest.fixture
def tiny_openai(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the tiny model, with GELU, where open_clip has ViT-B-16 and OpenAI's weights."""
    config = json.loads((tiny_model_dir / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", config)
    quick = {**config, "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16-quickgelu", quick)
    fetched = str(tiny_model_dir / WEIGHTS)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: fetched)


def activations(backbone: Backbone) -> set[str]:
    names = {type(module).__name__ for module in backbone.model.modules()}
    return names & {"GELU", "QuickGELU"}


@pytest.mark.usefixtures("tiny_openai")
def test_weights_trained_with_quick_gelu_are_computed_with_it(
    tiny_model_dir: Path, tiny_backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    right = load_backbone("ViT-B-16-quickgelu", "openai", CPU)
    assert "QuickGELU" not in capsys.readouterr().err
    repaired = load_backbone("ViT-B-16", "openai", CPU)
    assert "ViT-B-16-quickgelu" in capsys.readouterr().err
    assert activations(repaired) == activations(right) == {"QuickGELU"}
    assert torch.equal(repaired.text_embeddings(TEXTS), right.text_embeddings(TEXTS))
    assert repaired.fingerprint() == right.fingerprint()
    # the same weights with GELU are another model, for runs as for cached embeddings
    assert repaired.fingerprint() != tiny_backbone.fingerprint()
    plain = load_backbone("ViT-B-16", str(tiny_model_dir / WEIGHTS), CPU)
    assert activations(plain) == {"GELU"} and plain.fingerprint() == tiny_backbone.fingerprint()
    assert activations(load_backbone("ViT-B-16", "laion400m_e32", CPU)) == {"GELU"}


@pytest.mark.usefixtures("tiny_openai")
def test_a_run_has_the_activation_again(photos: Path, tmp_path: Path) -> None:
    config = train_config(
        data=str(photos), model="ViT-B-16", pretrained="openai", method="zeroshot", device="cpu"
    )
    train(config, tmp_path / "run")
    assert activations(load_run(tmp_path / "run").backbone) == {"QuickGELU"}
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["config"]["model"] == "ViT-B-16-quickgelu"  # as what is exported will say
    right = load_backbone("ViT-B-16-quickgelu", "openai", CPU)
    assert content["model_sha256"] == right.fingerprint()


class StoppedError(Exception):
    """The model would be created now."""


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what open_clip is asked to create; nothing is."""
    asked: list[dict[str, Any]] = []

    def create_model(model: str, **options: Any) -> None:
        asked.append({"model": model, **options})
        raise StoppedError

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: asked.append({"tokenizer": name}))
    return asked


def test_every_tag_of_open_clip_gets_its_activation(created: list[dict[str, Any]]) -> None:
    for model, tag in open_clip.list_pretrained():
        with pytest.raises(ModelError):
            load_backbone(model, tag, CPU)
        config = open_clip.get_model_config(model)
        quick = config.get("quick_gelu", False) or created[-1]["force_quick_gelu"]
        if (model, tag) != ("roberta-ViT-B-32", "laion2b_s12b_b32k"):  # only its name says it
            assert quick == open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
        if created[-1]["force_quick_gelu"]:  # the note and the run name the same model
            other = open_clip.get_model_config(f"{model}-quickgelu")
            assert other == {**config, "quick_gelu": True}
            assert open_clip.get_pretrained_cfg(f"{model}-quickgelu", tag)


def test_every_tag_of_open_clip_gets_images_of_the_size_in_its_name(
    created: list[dict[str, Any]],
) -> None:
    other = {}
    for model, tag in open_clip.list_pretrained():
        with pytest.raises(ModelError):
            load_backbone(model, tag, CPU)
        size = created[-1]["force_image_size"]
        assert created[-1]["force_preprocess_cfg"] is None  # open_clip takes the tag's
        taken = size or open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
        named = re.search(r"-(2|3|4|5)\d\d(-quickgelu)?$", model)
        assert named is None or named[0].startswith(f"-{taken}")
        if size is not None:
            other[model] = size
    assert other == {"ViTamin-XL-384": 384}


@pytest.mark.parametrize("model", open_clip.list_models())
def test_a_checkpoint_file_gets_the_preprocessing_on_which_the_tags_agree(
    model: str, created: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "file.pt").touch()
    with pytest.raises(ModelError):
        load_backbone(model, str(tmp_path / "file.pt"), CPU)
    forced = created[-1]["force_preprocess_cfg"]
    tags = [open_clip.get_pretrained_cfg(*pair) for pair in open_clip.list_pretrained()
            if pair[0] == model]  # fmt: skip
    if model in ("ViT-L-14", "ViT-H-14", "ViT-H-14-quickgelu"):  # whose tags differ
        assert forced is None
    else:
        assert all(forced == {key: tag[key] for key in forced} for tag in tags)
        assert (forced is None) == (not tags)


@pytest.mark.usefixtures("tiny_openai")
def test_open_clip_neither_warns_nor_logs_between_the_lines(
    tiny_model_dir: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    load_backbone("ViT-B-16", "openai", CPU)
    load_backbone("ViT-B-16", str(tiny_model_dir / WEIGHTS), CPU)
    with pytest.raises(ModelError):
        load_backbone("local-dir:nowhere", None, CPU)
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("note: ")] == []
    assert len(lines) == 2
    assert f"{WEIGHTS} does not say how its weights were trained" in lines[1]
    assert recwarn.list == []


def test_a_slash_in_a_name_means_the_same_model_and_tokenizer(
    created: list[dict[str, Any]],
) -> None:
    with pytest.raises(ModelError):
        load_backbone("ViT-B/16-SigLIP", "webli", CPU)
    assert [next(iter(asked.values())) for asked in created] == ["ViT-B-16-SigLIP"] * 2


def failure(model: str, pretrained: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        load_backbone(model, pretrained, CPU)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_architecture_without_pretrained_lists_the_known_tags() -> None:
    message = failure("ViT-B-16")
    assert all(text in message for text in ("--pretrained", "openai", "laion2b_s34b_b88k"))


def test_an_unknown_architecture_or_tag_is_named_with_what_is_expected(
    tiny_model_dir: Path,
) -> None:
    assert "'ViT-B-17'" in failure("ViT-B-17")
    message = failure("ViT-B-17", str(tiny_model_dir / WEIGHTS))
    assert "'ViT-B-17'" in message
    assert "local-dir:FOLDER" in message
    assert "'openapi'" in failure("ViT-S-32-alt", "openapi")


@pytest.mark.parametrize(
    ("model", "pretrained", "said"),
    [
        ("vit-b-16-quickgelo", "openai", "near: ViT-B-16-quickgelu"),
        ("ViT-B-16", "opnai", "near: openai"),
        ("ViT-B-16", "laion2b", "known for ViT-B-16: openai, "),
        (
            "ViT-B-16-quickgelu",
            "laion2b_s34b_b88k",
            "it is a tag of ViT-B-16, ViT-g-14; known for ViT-B-16-quickgelu: openai",
        ),
        ("hf-hub:me/mine", "openai", "hf-hub:me/mine brings its weights; leave --pretrained out"),
    ],
)
def test_a_wrong_name_or_tag_is_answered_with_the_right_one(
    model: str, pretrained: str, said: str
) -> None:
    assert said in failure(model, pretrained)


def test_a_folder_or_file_as_model_says_what_is_missing(tiny_model_dir: Path) -> None:
    assert "a folder without open_clip_config.json" in failure(str(tiny_model_dir.parent))
    assert "and the file as --pretrained" in failure(str(tiny_model_dir / WEIGHTS))


def test_the_help_fits_where_the_weights_come_from(
    own_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (own_model / WEIGHTS).write_bytes(b"damaged")
    assert "; expected a folder with open_clip_config.json and" in failure(str(own_model))
    assert "that can be reached; or download it" in failure("hf-hub:nobody/nothing")
    config = json.loads((own_model / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "capt-tiny", config)
    said = failure("capt-tiny", str(own_model / WEIGHTS))
    assert "; expected a file with the weights of capt-tiny" in said
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", config)

    def download(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    assert "or pass a downloaded file" in failure("ViT-B-32", "laion2b_s34b_b79k")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 19366682\n"


def test_a_pointer_of_git_lfs_is_named_for_weights_and_tokenizer(
    own_model: Path, family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    (own_model / WEIGHTS).write_text(LFS)
    assert f"{WEIGHTS}: expected weights, came a Git LFS pointer" in failure(str(own_model))
    folder = shutil.copytree(family_dir("ViT-B-16-SigLIP"), tmp_path / "siglip")
    (folder / "tokenizer.json").write_text(LFS)
    assert "Git LFS pointers lie there in place of tokenizer.json" in failure(str(folder))


def test_a_tokenizer_whose_packages_are_missing_says_what_to_install(
    family_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_dir("ViT-B-16-SigLIP")
    assert load_backbone(str(folder), None, CPU).tokens.leading == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = failure(str(folder))
    assert "transformers" in message
    assert "pip install '.[hf]'" in message


def test_the_tokenizer_is_loaded_before_weights_that_may_be_far_to_fetch(
    family_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    own = shutil.copytree(family_dir("ViT-B-16-SigLIP"), tmp_path / "own")
    (own / WEIGHTS).write_bytes(b"damaged")
    assert "header too small" in failure(str(own))
    (own / "tokenizer.json").unlink()
    assert "header too small" not in failure(str(own))


def test_a_missing_folder_and_one_without_weights_are_named(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert "nowhere" in failure("local-dir:nowhere")
    shutil.copy(tiny_model_dir / "open_clip_config.json", tmp_path)
    assert str(tmp_path) in failure(str(tmp_path))


def test_a_checkpoint_of_another_architecture_and_a_damaged_one_are_one_line_each(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_model_dir / "open_clip_config.json").read_text())["model_cfg"]
    config["vision_cfg"]["layers"] = 3
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "capt-deeper", config)
    assert len(failure("capt-deeper", str(tiny_model_dir / WEIGHTS))) < 1000
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tiny_model_dir / WEIGHTS).read_bytes()[:1000])
    assert "damaged.safetensors" in failure("capt-deeper", str(damaged))


def test_preprocessing_that_the_runtime_cannot_do_is_refused(
    write_model: Callable[..., Path],
) -> None:
    folder = write_model(preprocess={"interpolation": "random"})
    with pytest.raises((ModelError, ConfigError), match="interpolation"):
        load_backbone(str(folder), None, CPU)


def test_device_auto_works_and_others_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(ModelError, match=f"device '{name}' cannot be used here"):
            choose_device(name)


def test_a_tokenizer_that_brings_python_is_not_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": "own",
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_backbone(f"local-dir:{folder}", None, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
