"""Write a model of open_clip at its real size with random weights, as a `local-dir`.

    python -m benchmarks.random_model ViT-B-16 FOLDER PHOTOS

Batch norms get the statistics of the photos below PHOTOS; without them the features of all images
would be the same. A tokenizer that would come from a model hub is made from a few sentences.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from capt_deploy.files import visible_files
from capt_deploy.preprocess import PreprocessConfig, preprocess

_SEED = 1


def write_random_model(architecture: str, folder: Path, photos: Path) -> None:
    """Write `open_clip_config.json` and weights."""
    import open_clip
    from open_clip.model import get_model_preprocess_cfg
    from safetensors.torch import save_file

    torch.manual_seed(_SEED)
    model: Any = open_clip.create_model(architecture)
    config = get_model_preprocess_cfg(model)
    _settle(model.visual, PreprocessConfig.from_dict(config), visible_files(photos))
    folder.mkdir(parents=True)
    described = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": config}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


@torch.no_grad()
def _settle(visual: nn.Module, config: PreprocessConfig, photos: list[Path]) -> None:
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    pixels = np.stack([preprocess(photo, config) for photo in photos[:32]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(own).view(3, 1, 1) for own in (config.mean, config.std))
    for norm in norms:
        norm.momentum = None  # a plain mean over what it sees
    visual.train()
    visual((images - mean) / std)
    visual.eval()


if __name__ == "__main__":
    write_random_model(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
