"""Loading of open_clip models, and the device they compute on."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from capt_deploy.core.console import say
from capt_deploy.core.errors import ModelError
from capt_deploy.core.files import is_lfs_pointer
from capt_deploy.core.install import install_hint
from capt_deploy.data.preprocess import PreprocessConfig
from capt_train.clip.backbone import Backbone
from capt_train.clip.checkpoints import read_checkpoint

# Packages that open_clip needs for some tokenizers only.
_OPTIONAL = ("transformers", "sentencepiece", "tiktoken")
_LOCAL, _HUB = "local-dir:", "hf-hub:"
_CONFIG = "open_clip_config.json"
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def load_backbone(model: str, pretrained: str | None, device: torch.device) -> Backbone:
    """Load a model of open_clip, with activation and preprocessing that its weights want.

    Args:
        model: an architecture (`ViT-B-16-quickgelu`), `hf-hub:…`, `local-dir:…`, or such a folder.
        pretrained: with an architecture: open_clip's tag or a checkpoint file.
        device: the device of the model.

    Raises:
        ModelError: the model is unknown or cannot be reached, or it has no weights or an
            unsupported tokenizer.
    """
    import open_clip
    from open_clip.model import get_model_preprocess_cfg

    model = _checked(model, pretrained)
    quick_gelu = _lacks_quick_gelu(model, pretrained)
    size, preprocessing = _misstated_size(model), _preprocessing_of_file(model, pretrained)
    try:
        with _quiet_and_careful():
            tokenizer = open_clip.get_tokenizer(model)  # first: fetching the weights takes longer
            network = open_clip.create_model(
                model,
                pretrained=pretrained,
                device=device,
                force_quick_gelu=quick_gelu,
                force_image_size=size,
                force_preprocess_cfg=preprocessing,
                require_pretrained=True,
            ).float()
    except ModelError:
        raise
    except Exception as cause:  # open_clip and its hub clients raise errors of any type
        raise ModelError(
            f"model {model!r}, pretrained {pretrained!r}: cannot be loaded "
            f"({shorten(str(cause), 300)}); {_help(str(cause), model, pretrained)}"
        ) from cause
    name = f"{model}-quickgelu" if quick_gelu else model
    if quick_gelu:
        say(
            f"note: the weights {pretrained!r} were trained with QuickGELU: {model} is loaded as "
            f"{name}"
        )
    if size is not None:
        say(
            f"note: {model} gets images of {size} x {size} pixels, as its name says; open_clip's "
            "own configuration names another size"
        )
    if _is_file(model, pretrained) and open_clip.list_pretrained_tags_by_model(model):
        whose = "CLIP's" if preprocessing is None else f"that of {model}'s tags"
        say(
            f"note: {pretrained} does not say how its weights were trained: the activation is that "
            f"of {model}, the preprocessing {whose}; {_LOCAL}FOLDER with a {_CONFIG} can say both"
        )
    preprocess = PreprocessConfig.from_dict(get_model_preprocess_cfg(network))
    backbone = Backbone(network, tokenizer, preprocess)
    backbone.name = name
    return backbone


@contextmanager
def _quiet_and_careful() -> Iterator[None]:
    """Let open_clip neither log nor warn, and read checkpoints by `read_checkpoint`.

    What concerns the person is said by this module, or is an error.
    """
    from open_clip import factory

    root, read, tokenizer = logging.getLogger(), factory.load_state_dict, factory.HFTokenizer
    level = root.level

    def without_code(*arguments: Any, **options: Any) -> Any:
        """Return a tokenizer; a configuration may not ask to run Python that lies beside it."""
        return tokenizer(*arguments, **{**options, "trust_remote_code": False})

    try:
        root.setLevel(logging.CRITICAL)  # through which open_clip logs
        factory.load_state_dict, factory.HFTokenizer = read_checkpoint, without_code
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        factory.load_state_dict, factory.HFTokenizer = read, tokenizer
        root.setLevel(level)


def _checked(model: str, pretrained: str | None) -> str:
    """Return the model as open_clip names it.

    Raises:
        ModelError: there is no such architecture, tag or file.
    """
    import open_clip

    if (Path(model) / _CONFIG).is_file():
        model = f"{_LOCAL}{model}"
    if model.startswith((_LOCAL, _HUB)):
        if pretrained is not None:
            raise ModelError(
                f"pretrained {pretrained!r}: {model} brings its weights; leave --pretrained out"
            )
        return model
    name = model.replace("/", "-")  # ViT-B/16, as open_clip does
    known = open_clip.list_models()
    if name not in known:
        raise ModelError(f"model {model!r}: {_unknown(model, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    listed = f"known for {name}: {', '.join(tags) or 'none'}"
    if pretrained is None:
        raise ModelError(f"model {model!r}: pass --pretrained with a tag or a file; {listed}")
    if _is_file(name, pretrained) and not Path(pretrained).is_file():
        others = open_clip.list_pretrained_models_by_tag(pretrained)
        owners = f"; it is a tag of {', '.join(others)}" if others else _near(pretrained, tags)
        raise ModelError(
            f"pretrained {pretrained!r}: expected a tag or a checkpoint file{owners}; {listed}"
        )
    return name


def _lacks_quick_gelu(model: str, pretrained: str | None) -> bool:
    """Return whether a pretrained tag says QuickGELU and the architecture does not.

    open_clip warns of it, but computes with GELU. A tag that says nothing proves nothing: then the
    architecture's own activation holds.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(model, pretrained or "")
    if not tag.get("quick_gelu"):
        return False
    config = open_clip.get_model_config(model) or {}
    return not config.get("quick_gelu")


def _is_file(model: str, pretrained: str | None) -> bool:
    """Return whether the weights of an architecture come from a file, not from a tag."""
    import open_clip

    return pretrained is not None and not open_clip.get_pretrained_cfg(model, pretrained)


def _preprocessing_of_file(model: str, pretrained: str | None) -> dict[str, Any] | None:
    """Return the preprocessing of weights from a file: that on which the model's tags agree.

    open_clip takes CLIP's for every file, even of a SigLIP. None: open_clip's holds.
    """
    import open_clip

    if not _is_file(model, pretrained):
        return None
    tags = [
        open_clip.get_pretrained_cfg(model, tag)
        for tag in open_clip.list_pretrained_tags_by_model(model)
    ]
    choices = [{key: tag[key] for key in _PREPROCESSING} for tag in tags]
    return choices[0] if choices and all(choice == choices[0] for choice in choices) else None


def _misstated_size(model: str) -> int | None:
    """Return the image size in an architecture's name, in pixels, where its configuration differs.

    open_clip's ViTamin-XL-384 would be given images of 256 pixels.
    """
    import open_clip

    named = re.search(r"[-_](\d{3})(-quickgelu)?$", model)
    if named is None or model not in open_clip.list_models():
        return None
    size = int(named[1])
    config = open_clip.get_model_config(model) or {}
    return None if config["vision_cfg"].get("image_size", size) == size else size


def _unknown(model: str, known: list[str]) -> str:
    """Say what `--model` expects, and what the name that came may have meant."""
    if Path(model).is_dir():
        return f"a folder without {_CONFIG}, which open_clip needs beside the weights"
    if Path(model).is_file():
        return "a file; expected an architecture as --model, and the file as --pretrained"
    return (
        f"expected a name from open_clip.list_models(), {_HUB}NAME, or {_LOCAL}FOLDER"
        f"{_near(model, known)}"
    )


def _near(name: str, known: list[str]) -> str:
    lowered = {other.lower(): other for other in known}
    near = [lowered[found] for found in get_close_matches(name.lower(), lowered, 3)]
    return f"; near: {', '.join(near)}" if near else ""


def _help(cause: str, model: str, pretrained: str | None) -> str:
    """Say how a model that could not be loaded can be, by where it was to come from."""
    if any(name in cause and find_spec(name) is None for name in _OPTIONAL):
        return (
            f"its tokenizer needs more packages: {install_hint('hf')}; where there is a "
            "tokenizer.json, transformers is enough"
        )
    if model.startswith(_LOCAL):
        files = sorted(Path(model.removeprefix(_LOCAL)).glob("*"))
        if pointers := [file.name for file in files if is_lfs_pointer(file)]:
            return (
                f"Git LFS pointers lie there in place of {', '.join(pointers)}; fetch them with "
                "`git lfs pull`"
            )
        return (
            f"expected a folder with {_CONFIG} and open_clip_model.safetensors or "
            "open_clip_pytorch_model.bin that fit each other"
        )
    if model.startswith(_HUB):
        return (
            f"expected a repository with {_CONFIG} that can be reached; or download it and pass "
            f"{_LOCAL}FOLDER"
        )
    if _is_file(model, pretrained):
        return f"expected a file with the weights of {model}"
    return (
        "expected weights that can be fetched; or pass a downloaded file as --pretrained, or "
        f"{_LOCAL}FOLDER"
    )


def choose_device(name: str) -> torch.device:
    """Return the device by name; `auto` means CUDA where it works.

    Raises:
        ModelError: the device is unknown or not usable here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as cause:
        raise ModelError(
            f"device {name!r} cannot be used here: {str(cause).splitlines()[0]}"
        ) from cause
    return device
