"""Time and peak memory of tuning, export and prediction by the number of classes.

    python -m benchmarks.many_classes --docs

Every figure is of a process of its own, on one thread, so that its peak is that of its size: the
libraries and the model are in it. Times are those of the processor, for other programs may run
beside it. Weights, photos and embeddings are random: neither time nor memory depends on them.

- `prompt step`: one step of prompt tuning with the text tower of ViT-B/16, 32 photos.
- `rows`: the closed form on two embeddings a class, 512 dimensions.
- `map`: two steps of L-BFGS on the same, of at most 40; one ridge.
- `train`, `export`, `eval`: the commands on a tiny CLIP with 512 dimensions and three photos a
  class, two of them to tune on with `--method rows`; `eval` with `--report`.
- `answer`: `Classifier.predict` of that bundle on the CPU, 1 and 32 photos; median on the clock.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.command import peak_bytes
from benchmarks.record import add_cells, load_cells, write_docs
from capt_deploy.core.console import Command, say, table

_ROOT = Path(__file__).parents[1]
SIZES = (100, 1000, 5000, 10000)
_DIM, _SCALE = 512, 100.0
_IMAGE_SIZE, _PHOTOS = 32, {"train": 2, "test": 1}  # photos of each class
_DATA, _MODEL, _BUNDLE = "photos", "model", "many.capt"
_BATCHES = (1, 32)
_REPEATS = 20
TINY = {
    "embed_dim": _DIM,
    "vision_cfg": {
        "image_size": _IMAGE_SIZE,
        "patch_size": 16,
        "width": 64,
        "layers": 2,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}


def _process(*arguments: str) -> dict[str, Any]:
    """Run a module on one thread; return the JSON of its last line, and its processor seconds.

    Raises:
        CalledProcessError: it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = _seconds_of_children()
    program = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        program, cwd=_ROOT, env=environment, check=True, text=True, stdout=subprocess.PIPE
    )
    cell: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": _seconds_of_children() - start, **cell}


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _measured(work: Callable[[], object]) -> dict[str, Any]:
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def _random_photos(classes: int, each: int) -> tuple[Any, Any, Any]:
    """Return embeddings of photos, their labels, and class embeddings, all unit norm."""
    import torch
    from torch.nn import functional

    draw = torch.Generator().manual_seed(0)
    texts = functional.normalize(torch.randn(classes, _DIM, generator=draw), dim=1)
    labels = torch.arange(classes).repeat(each)
    noise = torch.randn(len(labels), _DIM, generator=draw)
    return functional.normalize(texts[labels] + 0.05 * noise, dim=1), labels, texts


def _prompt_step(classes: int) -> dict[str, Any]:
    import torch

    from benchmarks.random_models import random_backbone
    from capt_train.config import TrainConfig
    from capt_train.data.features import Features
    from capt_train.data.fewshot import FewShotSplit
    from capt_train.method.learner import make_learner
    from capt_train.tune.epochs import Epochs
    from capt_train.tune.stages import TuningTask, text_stage

    images, labels, texts = _random_photos(classes, 1)
    names, tuned = tuple(f"thing {number}" for number in range(classes)), tuple(range(classes))
    shown = torch.randperm(classes, generator=torch.Generator().manual_seed(0))[:32].sort().values
    backbone = random_backbone("ViT-B-16")
    config = TrainConfig("", "", method="coop")
    train, val = Features(images[shown], labels[shown]), Features(images[:0], labels[:0])
    task = TuningTask(backbone.scale, tuned, train, val, texts, config)
    learner = make_learner(backbone, config, FewShotSplit(names, tuned, (), (), {}), texts)
    stage = text_stage(task, learner)
    if stage is None:
        raise ValueError("expected a prompt to tune")
    loop = Epochs(learner, task, stage)
    return _measured(lambda: loop.epoch(0))  # of one batch


def _rows(classes: int) -> dict[str, Any]:
    from capt_train.method.class_rows import discriminant

    images, labels, _ = _random_photos(classes, 2)
    return _measured(lambda: discriminant(images, labels, classes))


def _map(classes: int) -> dict[str, Any]:
    from capt_train.method.class_map import CLASSES
    from capt_train.tune.fit_map import MapTask, fit_map

    images, labels, texts = _random_photos(classes, 2)
    weights = {"cross_entropy": 1.0}
    task = MapTask(_SCALE, texts[None], images, labels, None, texts, weights)
    return _measured(lambda: fit_map(task, CLASSES, 0.01, steps=2))


_COMMANDS = "commands"  # train, export, eval and answer
_JOBS = {"prompt step": _prompt_step, "rows": _rows, "map": _map}


def _commands(folder: Path, classes: int) -> dict[str, dict[str, Any]]:
    """Return the figures of the three commands, and of the answers of the exported bundle."""
    data, model = folder / _DATA, folder / _MODEL
    job = ("benchmarks.many_classes", "--job", "write", "--folder", str(folder))
    _process(*job, "--classes", str(classes))
    run, bundle, cells = folder / "run", folder / _BUNDLE, {}
    os.environ["CAPT_CACHE"] = str(folder / "cache")
    chosen = ["--method", "rows", "--set", "workers=1"]
    commands = {
        "train": ["capt-train", "--data", data, "--model", model, "--out", run, *chosen],
        "export": ["capt-export", run, "--out", bundle],
        "eval": ["capt-eval", bundle, "--data", data, "--report", folder / "report"],
    }
    for name, command in commands.items():
        say(f"{classes} classes: {name}")
        cells[name] = _process("benchmarks.command", *map(str, command))
    cells["export"]["graph_bytes"] = (bundle / "model.onnx").stat().st_size
    page = folder / "report" / "report.html"
    cells["eval"]["page_bytes"] = page.stat().st_size
    cells["answer"] = _process(
        *("benchmarks.many_classes", "--job", "answer", "--folder", str(folder))
    )
    return cells


def _result(job: str, classes: int, folder: Path | None) -> dict[str, Any]:
    """Do a job of this process."""
    if folder is None:
        return _JOBS[job](classes)
    if job == "answer":
        return _answers(folder)
    _write_photos(folder / _DATA, classes)
    _write_model(folder / _MODEL)
    return {}


def _answers(folder: Path) -> dict[str, Any]:
    """Return the median milliseconds of a batch by its size, decoded photos to predictions."""
    from capt_deploy import Classifier

    pixels = np.random.default_rng(0).integers(
        0, 256, (max(_BATCHES), _IMAGE_SIZE, _IMAGE_SIZE, 3), dtype=np.uint8
    )
    cell: dict[str, Any] = {}
    with Classifier.load(folder / _BUNDLE, "onnxruntime-cpu") as classifier:
        for batch in _BATCHES:
            images = list(pixels[:batch])
            times = []
            for _ in range(_REPEATS + 3):
                start = time.perf_counter()
                classifier.predict(images, batch_size=batch)
                times.append(1000 * (time.perf_counter() - start))
            cell[f"batch_{batch}_ms"] = statistics.median(times[3:])
    return {**cell, "peak_bytes": peak_bytes()}


def _write_photos(folder: Path, classes: int) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for label in range(classes):
        colours = random.integers(0, 256, (2, 2, 3)).repeat(12, axis=0).repeat(12, axis=1)
        for split, count in _PHOTOS.items():
            place = folder / split / f"thing {label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.normal(colours, 70).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png", compress_level=1)


def _write_model(folder: Path) -> None:
    """Write a tiny CLIP with random weights as a `local-dir` of open_clip."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"model_cfg": TINY, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = open_clip.create_model(f"local-dir:{folder}")
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def _table(cells: dict[str, dict[str, Any]]) -> str:
    """Return seconds and peak memory of each job, a row for each number of classes."""
    names = [*_JOBS, "train", "export", "eval"]
    sizes = sorted({int(key.rsplit(" ", 1)[1]) for key in cells})
    header = ["classes", *names, "1 photo", "32 photos", "graph"]
    rows = []
    for classes in sizes:
        row = [f"{classes:,}"]
        for name in names:
            cell = cells.get(f"{name} {classes}")
            row.append(f"{cell['seconds']:.1f} s, {_gb(cell)}" if cell else "–")
        answer, export = cells.get(f"answer {classes}"), cells.get(f"export {classes}")
        row += [f"{answer[f'batch_{batch}_ms']:.1f} ms" if answer else "–" for batch in _BATCHES]
        row.append(f"{export['graph_bytes'] / 1e6:.1f} MB" if export else "–")
        rows.append(row)
    return table(header, rows)


def _gb(cell: dict[str, Any]) -> str:
    return f"{cell['peak_bytes'] / 1e9:.1f} GB"


@click.command(cls=Command)
@click.option("--classes", "sizes", multiple=True, type=click.IntRange(4), default=SIZES)
@click.option("--only", multiple=True, type=click.Choice([*_JOBS, _COMMANDS]))
@click.option("--docs", is_flag=True, help="Write the table into docs/training.md.")
@click.option("--only-table", is_flag=True, help="Measure nothing.")
@click.option("--job", hidden=True)
@click.option("--folder", type=Path, hidden=True)
def main(
    sizes: tuple[int, ...],
    only: tuple[str, ...],
    docs: bool,
    only_table: bool,
    job: str | None,
    folder: Path | None,
) -> None:
    """Measure every job for each number of classes, and print the table."""
    only = only or (*_JOBS, _COMMANDS)
    if job is not None:
        click.echo(json.dumps(_result(job, sizes[0], folder)))
        return
    for classes in () if only_table else sizes:
        for name in filter(_JOBS.__contains__, only):
            say(f"{classes} classes: {name}")
            cell = _process("benchmarks.many_classes", "--job", name, "--classes", str(classes))
            add_cells("many_classes", {f"{name} {classes}": cell})
        if _COMMANDS in only:
            with tempfile.TemporaryDirectory() as scratch:
                for name, cell in _commands(Path(scratch), classes).items():
                    add_cells("many_classes", {f"{name} {classes}": cell})
    text = _table(load_cells("many_classes"))
    click.echo(text)
    if docs:
        write_docs(_ROOT / "docs" / "training.md", "many classes", f"```\n{text}\n```")


if __name__ == "__main__":
    main()
