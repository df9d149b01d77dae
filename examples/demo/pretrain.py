"""Pretrain the demo's CLIP from scratch on noisy captions of pictograms, in minutes on two cores.

What it writes is an open_clip `local-dir` with half-precision weights. The pictures are drawn
from another seed than the data set's; of the data set's classes, the compositions of the base
half occur among the 382 that are trained on, those of the new half do not, in neither stage (see
`stages`). `captions` says which captions are wrong and how often.

Command: python -m examples.demo.pretrain
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from safetensors.torch import save as to_bytes
from torch import Tensor

from .drawing import SIZE, render
from .stages import MEAN, STD, Plan, encode_images, encode_text, train_image_tower, train_text_tower
from .vocabulary import BASE_CLASSES, NEW_CLASSES

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIZE,
        "patch_size": 8,
        "width": 128,
        "layers": 4,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 3,
    },
}
PREPROCESS_CFG: dict[str, Any] = {
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def zero_shot(model: CLIP, classes: tuple[str, ...], seed: int, count: int = 20) -> float:
    """Return the zero-shot accuracy on fresh pictures, `count` per class, in [0, 1]."""
    rng = np.random.default_rng((seed, 2))
    drawn = [np.asarray(render(name, rng)) for name in classes for _ in range(count)]
    tokenise = SimpleTokenizer(context_length=model.context_length)
    with torch.inference_mode():
        text = encode_text(model, tokenise([f"a photo of a {name}." for name in classes]))
        images = torch.from_numpy(np.stack(drawn))
        predicted: Tensor = (encode_images(model, images) @ text.T).argmax(1)
    truth = torch.arange(len(classes)).repeat_interleave(count)
    return float((predicted == truth).double().mean())


def save(model: CLIP, folder: Path) -> None:
    """Write `model` as an open_clip local-dir with half-precision weights.

    Each file is written beside its place and then moved there, the configuration last, so that an
    interruption leaves no torn file. OSError where the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    scratch = folder / f".{os.getpid()}.partial"
    try:
        scratch.write_bytes(to_bytes(weights))
        scratch.replace(folder / "open_clip_model.safetensors")
        scratch.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        scratch.replace(folder / "open_clip_config.json")
    finally:
        scratch.unlink(missing_ok=True)


@click.command()
@click.option(
    "--out",
    default=Path(__file__).parent / "model",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the checkpoint.  [default: model, beside this file]",
)
@click.option("--steps", default=2000, show_default=True, type=click.IntRange(min=1))
@click.option("--text-steps", default=800, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--bf16/--no-bf16", default=True, help="No: for a CPU without bfloat16 arithmetic.")
def main(out: Path, steps: int, text_steps: int, seed: int, threads: int, bf16: bool) -> None:
    """Pretrain the demo's CLIP; STEPS are the image tower's, TEXT-STEPS the text tower's."""
    start = time.perf_counter()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = CLIP(**MODEL_CFG)
    plan = Plan(seed, steps, text_steps, threads, bf16)
    train_image_tower(model, plan)
    train_text_tower(model, plan)
    for half, classes in (("base", BASE_CLASSES), ("new", NEW_CLASSES)):
        click.echo(
            f'"a photo of a …" on {half} classes: {100 * zero_shot(model, classes, seed):.1f} %'
        )
    save(model, out)
    click.echo(f"saved in {out} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
