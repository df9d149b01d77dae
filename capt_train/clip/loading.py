"""Loading of open_clip models, and the device they compute on."""

import logging
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

import torch

from capt_deploy.core.console import say
from capt_deploy.core.errors import ModelError
from capt_deploy.core.install import install_hint
from capt_deploy.data.preprocess import PreprocessConfig
from capt_train.clip.backbone import Backbone

# Packages that open_clip needs for some tokenizers only.
_OPTIONAL = ("transformers", "sentencepiece", "tiktoken")


def load_backbone(model: str, pretrained: str | None, device: torch.device) -> Backbone:
    """Load a model of open_clip, with the activation that its weights were trained with.

    Args:
        model: an architecture (`ViT-B-16`), `hf-hub:…`, `local-dir:…`, or such a folder.
        pretrained: with an architecture: open_clip's tag or a checkpoint file.
        device: the device of the model.

    Raises:
        ModelError: the model is unknown or cannot be reached, or it has no weights or an
            unsupported tokenizer.
    """
    import open_clip
    from open_clip.model import get_model_preprocess_cfg

    if (Path(model) / "open_clip_config.json").is_file():
        model = f"local-dir:{model}"
    if not model.startswith(("local-dir:", "hf-hub:")) and pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        known = f"known for {model}: {tags}" if tags else "see open_clip.list_models()"
        raise ModelError(f"model {model!r}: pass --pretrained with a tag or a file; {known}")
    quick_gelu = _lacks_quick_gelu(model, pretrained)
    if quick_gelu:
        say(
            f"note: the weights {pretrained!r} were trained with QuickGELU: {model} is loaded as "
            f"{model}-quickgelu"
        )
    level = logging.getLogger().level
    try:
        logging.getLogger().setLevel(logging.ERROR)  # open_clip logs through the root logger
        tokenizer = open_clip.get_tokenizer(model)  # first: fetching the weights takes longer
        network = open_clip.create_model(
            model,
            pretrained=pretrained,
            device=device,
            force_quick_gelu=quick_gelu,
            require_pretrained=True,
        ).float()
    except Exception as cause:  # open_clip and its hub clients raise errors of any type
        raise ModelError(
            f"model {model!r}, pretrained {pretrained!r}: cannot be loaded "
            f"({shorten(str(cause), 300)}); {_help(str(cause))}"
        ) from cause
    finally:
        logging.getLogger().setLevel(level)
    return Backbone(
        network, tokenizer, PreprocessConfig.from_dict(get_model_preprocess_cfg(network))
    )


def _lacks_quick_gelu(model: str, pretrained: str | None) -> bool:
    """Tell whether a pretrained tag says QuickGELU and the architecture does not.

    open_clip warns of it, but computes with GELU. A tag that says nothing proves nothing: then the
    architecture's own activation holds.
    """
    import open_clip

    architecture = model.replace("/", "-")  # as open_clip does
    tag = open_clip.get_pretrained_cfg(architecture, pretrained or "")
    if not tag.get("quick_gelu"):
        return False
    config = open_clip.get_model_config(architecture) or {}
    return not config.get("quick_gelu")


def _help(cause: str) -> str:
    if any(name in cause and find_spec(name) is None for name in _OPTIONAL):
        return (
            f"its tokenizer needs more packages: {install_hint('hf')}; where there is a "
            "tokenizer.json, transformers is enough"
        )
    return "expected a name from open_clip.list_pretrained(), hf-hub:NAME, or local-dir:FOLDER"


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
