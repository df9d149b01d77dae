"""Bundles to measure with, made by the package's own commands from models of real size.

python -m benchmarks.exported FOLDER --model ViT-B/16 --precisions fp32,fp16
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from capt_deploy.core.console import Command
from examples.demo.world import write_world

_ROOT = Path(__file__).parents[1]
_SHARED = _ROOT.parent / "shared"
PHOTO_MODEL = _SHARED / "models" / "tinyclip-cifar"
# Architectures of open_clip have their real sizes and random weights; the others are trained.
MODELS: Mapping[str, str | Path] = {
    "ViT-B/16": "ViT-B-16",
    "ViT-B/32": "ViT-B-32",
    "ViT-L/14": "ViT-L-14",
    "photo model": PHOTO_MODEL,
    "demo model": _ROOT / "examples" / "demo" / "model",
}
_IMAGES = 16  # that an export is checked on


@dataclass(frozen=True)
class Exported:
    """A model, and the bundle made from it."""

    model: Path  # a local-dir of open_clip's
    bundle: Path


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", "name", type=click.Choice(list(MODELS)), required=True)
@click.option("--precisions", default="fp32", show_default=True)
def main(folder: Path, name: str, precisions: str) -> None:
    """Export a model into FOLDER and print where its bundle is."""
    click.echo(export_model(name, folder, precisions.split(",")).bundle)


def export_model(name: str, folder: Path, precisions: Sequence[str]) -> Exported:
    """Export a model with the hand-written prompt; files that exist are used again.

    Raises:
        click.ClickException: one of the commands failed.
    """
    from benchmarks.random_models import write_random_model

    source, bundle = MODELS[name], bundle_of(name, folder, precisions)
    photos, run = bundle.with_name("photos"), bundle.with_name("run")
    model = source if isinstance(source, Path) else bundle.with_name("model")
    make_whole(photos, lambda folder: copy_photos(folder, _IMAGES))
    if isinstance(source, str):
        make_whole(model, partial(write_random_model, source, photos=photos))
    if not (run / "result.json").exists():
        _command(
            "capt_train.cli.train",
            *("--data", photos, "--model", f"local-dir:{model}", "--method", "zeroshot"),
            *("--out", run),
        )
    if not bundle.exists():
        flags = [f"--{precision}" for precision in precisions]
        # Forced: the limits of the gate are for trained models, not for random weights.
        _command(
            "export.cli.export", run, "--out", bundle, *flags, "--gate-images", _IMAGES, "--force"
        )
    return Exported(model, bundle)


def make_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, unless it exists, under another name until it is complete."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    write(unfinished)
    unfinished.rename(folder)


def bundle_of(name: str, folder: Path, precisions: Sequence[str]) -> Path:
    """Return where `export_model` writes a bundle."""
    model_folder = name.lower().replace("/", "").replace(" ", "_")
    return folder / model_folder / f"{'_'.join(precisions)}.capt"


def copy_photos(folder: Path, images: int) -> None:
    """Lay out four classes with eight photos each to tune on, and `images` photos to check on.

    They are photos of ../shared, or pictures of the demo where that is missing.
    """
    source = _SHARED / "data" / "cifar100"
    if source.is_dir():
        _copy(source, folder, images)
        return
    with tempfile.TemporaryDirectory() as scratch:
        world = write_world(Path(scratch) / "world", train=8, val=images // 4, test=1)
        _copy(world, folder, images)


def _copy(source: Path, folder: Path, images: int) -> None:
    names = sorted(path.name for path in (source / "train").iterdir())
    classes = names[:: len(names) // 4][:4]
    for split, count in (("train", 8), ("val", images // len(classes))):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for photo in sorted((source / split / name).iterdir())[:count]:
                shutil.copy(photo, folder / split / name)


def _command(module: str, *arguments: Any) -> None:
    """Run one of the package's commands in its own process, without its output."""
    words = [sys.executable, "-c", f"from {module} import main; main()", *map(str, arguments)]
    done = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{module} exited with {done.returncode}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
