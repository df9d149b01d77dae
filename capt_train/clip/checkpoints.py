"""Reading of checkpoint files, whatever trainer wrote them; pickled code is never run."""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from capt_deploy.core.console import say
from capt_deploy.core.errors import ModelError
from capt_deploy.core.files import is_lfs_pointer

_SCALE = "logit_scale"  # a weight that all models of open_clip have, outside of their towers
_SAVE_TENSORS = "save its state_dict alone, for example with safetensors.torch.save_file"


def read_checkpoint(checkpoint_path: str, device: Any = "cpu", **_: Any) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, by the names they have in the bare model.

    What wrappers such as Lightning (`model.`) and DataParallel (`module.`) put in front of every
    name is removed, with a note. The signature is that of open_clip's `load_state_dict`, for which
    this function stands in.

    Raises:
        ModelError: the file holds a program (TorchScript), pickled objects, no tensors, or only
            the pointer of Git LFS.
    """
    file = Path(checkpoint_path)
    if not file.stat().st_size:
        raise ModelError(f"{file}: expected weights, came an empty file; fetch it again")
    if is_lfs_pointer(file):
        raise ModelError(
            f"{file}: expected weights, came a Git LFS pointer; fetch them with `git lfs pull`"
        )
    if file.suffix == ".safetensors":
        content: Any = load_file(file, device=str(device))
    elif _is_torchscript(file):
        raise ModelError(
            f"{file}: expected tensors, came TorchScript, a program that would have to be run; for "
            "OpenAI's models pass the tag openai (--model ViT-B-16-quickgelu --pretrained openai); "
            f"of others, {_SAVE_TENSORS}"
        )
    else:
        try:
            content = torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as cause:  # its advice is to run whatever is in the file
            raise ModelError(
                f"{file}: expected tensors alone, came a damaged file or pickled Python objects, "
                f"which could run code; {_SAVE_TENSORS}"
            ) from cause
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        came = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else "none"
        raise ModelError(f"{file}: expected tensors by name, came the names {came or 'none'}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    prefix = _prefix(tensors)
    if prefix:
        say(f"note: {file.name}: the names of the weights begin with {prefix!r}, which is left out")
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        say(f"note: {file.name}: not of the model, and not read: {', '.join(others[:3])}")
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name not in others}


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _prefix(names: Iterable[str]) -> str:
    """Return the wrappers' part of the names, such as `model.module.`; empty without one."""
    scale = next((name for name in names if name.split(".")[-1] == _SCALE), _SCALE)
    return scale.removesuffix(_SCALE)
