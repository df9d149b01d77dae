"""What wrong labels and unequal class sizes cost, and whether tuning can be made to mind them less.

    python -m benchmarks.noise --world cifar100 --docs

A row is a way of tuning on images with a certain trouble: a share of the shots with a wrong label,
or a long tail of classes with few images. Test images are as they were: balanced, labelled rightly.
Cells that are measured stay in benchmarks/results/noise-WORLD.json, as in benchmarks.ablation.
"""

import csv
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean as middle
from typing import Any

import click
import torch

from benchmarks.ablation import mean
from benchmarks.cell import World, fill, measure, open_world
from benchmarks.record import load_cells, write_docs
from capt_deploy.core.console import Command
from capt_deploy.data.datasets import Dataset, Item, read_dataset
from capt_train.clip.loading import load_backbone
from capt_train.config import TrainConfig
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import embed
from capt_train.data.fewshot import FewShotSplit, choose

NAME = "noise"
DOCS = Path(__file__).parents[1] / "docs" / "confidence.md"
SHOTS = 16
_SMALL = "small.csv"
_ALL = 1000  # more images than any class has


@dataclass(frozen=True)
class Trouble:
    """What is wrong with the labelled images."""

    kind: str = ""  # of wrong labels: "uniform", any other class; "pair", the likeliest other one
    share: float = 0.0  # of the images with a wrong label
    val_too: bool = True  # the same hand has labelled the validation images
    # "tail": classes shrink from all images that there are to one; "level": as many images in all,
    # equally many of each class; with half as many for validation. Without it SHOTS of each class.
    sizes: str = ""


_TEXT_SIDE: Mapping[str, Any] = {"method": "capt", "without": ("visual", "colours")}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "CoOp": {"method": "coop"},
    "CoOp, labels trusted": {"method": "coop", "label_noise": "0"},
    "default, text side": _TEXT_SIDE,
    "default, text side, labels trusted": {**_TEXT_SIDE, "label_noise": "0"},
}
TROUBLES: Mapping[str, Trouble] = {
    "none": Trouble(),
    **{f"uniform {s} %": Trouble("uniform", s / 100) for s in (10, 20, 30)},
    **{f"pair {s} %": Trouble("pair", s / 100) for s in (10, 20, 30)},
    "uniform 20 %, validation right": Trouble("uniform", 0.2, val_too=False),
    "pair 20 %, validation right": Trouble("pair", 0.2, val_too=False),
    "long tail": Trouble(sizes="tail"),
    "as many images, level": Trouble(sizes="level"),
}
# Title, key of the cell, and whether it is a share, shown in %.
COLUMNS = (
    ("base", "base", True),
    ("new", "new", True),
    ("harmonic", "harmonic", True),
    ("small classes", "small", True),
    ("ECE-15 base", "ece_15_base", True),
    ("ECE-15 new", "ece_15_new", True),
    ("NLL base", "nll_base", False),
    ("NLL new", "nll_new", False),
    ("temperature", "temperature", False),
)


@click.command(cls=Command)
@click.option("--world", required=True, help="pictograms, or a photo set of ../shared/data.")
@click.option("--methods", default="|".join(METHODS), help="Some of them, separated by |.")
@click.option("--troubles", default="|".join(TROUBLES), help="Likewise.")
@click.option("--seeds", default="1,2,3", show_default=True)
@click.option("--only-table", is_flag=True, help="Measure nothing.")
@click.option("--docs", is_flag=True, help="Write the table into docs/confidence.md as well.")
def main(world: str, methods: str, troubles: str, seeds: str, only_table: bool, docs: bool) -> None:
    """Measure the cells that are missing, one after the other, and print the table."""
    ways, rows = _among(METHODS, methods), _among(TROUBLES, troubles)
    if not only_table:
        with open_world(world) as place:
            # Seeds are the outer loop, so that an interrupted table has all rows.
            numbers = [int(text) for text in seeds.split(",")]
            for seed, trouble, method in ((s, t, m) for s in numbers for t in rows for m in ways):
                _fill(world, place, method, trouble, seed)
    table = markdown(load_cells(f"{NAME}-{world}"))
    click.echo(table)
    if docs:
        write_docs(DOCS, NAME, table)


def _among(known: Mapping[str, Any], text: str) -> list[str]:
    names = text.split("|")
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"{unknown} not among {' | '.join(known)}")
    return names


def _fill(world: str, place: World, method: str, trouble: str, seed: int) -> None:
    name, key = f"{NAME}-{world}", f"{method} / {trouble} / {seed}"
    own = {"method": method, "trouble": trouble, "seed": seed}
    with troubled(place, TROUBLES[trouble], seed) as data:
        config = config_of(World(data, place.model), method, seed)
        small = {} if TROUBLES[trouble].kind else {"small": str(Path(data).with_name(_SMALL))}
        fill(name, key, own, config, "test", measured=partial(measure, also=small))


def config_of(place: World, method: str, seed: int) -> TrainConfig:
    """Return the settings of one cell's run."""
    # every image that is listed is tuned on, also where wrong labels have enlarged a class
    return TrainConfig(
        place.data, place.model, classes="base", shots=_ALL, seed=seed, **METHODS[method]
    )


def markdown(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each method and trouble, mean ± std over the seeds."""
    lines = [
        "| tuned by | wrong labels, or sizes | " + " | ".join(t for t, *_ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for method, trouble in product(METHODS, TROUBLES):
        own = [c for c in cells.values() if (c["method"], c["trouble"]) == (method, trouble)]
        if own:
            texts = (_text(own, key, share) for _, key, share in COLUMNS)
            lines.append(f"| {method} | {trouble} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _text(cells: list[Mapping[str, Any]], key: str, share: bool) -> str:
    if any(key not in cell for cell in cells):
        return "-"
    return mean(cells, key, True) if share else f"{middle(cell[key] for cell in cells):.3f}"


def long_tail(classes: int, largest: int) -> list[int]:
    """Return the sizes of classes that shrink by a constant factor, from `largest` to 1.

    The long-tailed CIFAR of Cui et al. (arXiv 1901.05555), with as many images in its last class
    as there can be few.
    """
    steps = max(1, classes - 1)
    return [round(largest ** (1 - rank / steps)) for rank in range(classes)]


def wrong_labels(
    labels: Sequence[int], others: Sequence[Sequence[int]], share: float, seed: str
) -> list[int]:
    """Return labels of which `round(share·n)`, chosen by seed, are one of `others` instead.

    Args:
        labels: the right ones.
        others: for each, the wrong ones that it may become.
        share: in 0-1.
        seed: decides which and to what.
    """
    draw = random.Random(seed)
    changed = set(draw.sample(range(len(labels)), round(share * len(labels))))
    return [draw.choice(others[row]) if row in changed else own for row, own in enumerate(labels)]


def shortened(items: Sequence[Item], sizes: Mapping[int, int]) -> tuple[Item, ...]:
    """Return the first images of each class, as many as `sizes` says."""
    taken: Counter[int] = Counter()
    kept = []
    for item in items:
        if taken[item.label] < sizes[item.label]:
            taken[item.label] += 1
            kept.append(item)
    return tuple(kept)


@contextmanager
def troubled(place: World, trouble: Trouble, seed: int) -> Iterator[str]:
    """Yield a CSV of a world's images with the trouble in it; it lives as long.

    The images tuned on are those that `capt-train` would choose with that seed. Beside it lies
    another CSV of the test images of those classes that are the smaller half of a long tail.
    """
    dataset = read_dataset(place.data)
    split = choose(dataset, "base", _ALL if trouble.sizes else SHOTS, seed)
    sizes = _tail(split, seed)
    small = {*list(sizes)[len(sizes) // 2 :]}  # largest first
    train, val, test = split.train, split.val, dataset.items("test")
    if trouble.sizes == "level":
        sizes = dict.fromkeys(sizes, round(middle(sizes.values())))
    if trouble.sizes:
        train = shortened(train, sizes)
        val = shortened(val, {label: -(-count // 2) for label, count in sizes.items()})
    rows = [
        *_labelled(place, dataset, split, "train", train, trouble, seed),
        *_labelled(place, dataset, split, "val", val, trouble, seed),
        *((item, "test") for item in test),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").symlink_to(dataset.root.resolve())
        _write(
            folder / _SMALL, dataset.class_names, [(i, "test") for i in test if i.label in small]
        )
        yield str(_write(folder / "data.csv", dataset.class_names, rows))


def _tail(split: FewShotSplit, seed: int) -> dict[int, int]:
    """Return how many images each class has in a long tail, largest first; the seed says which."""
    order = random.Random(f"{seed}/sizes").sample(split.tuned, len(split.tuned))
    largest = min(Counter(item.label for item in split.train).values())
    return dict(zip(order, long_tail(len(order), largest), strict=True))


def _labelled(
    place: World,
    dataset: Dataset,
    split: FewShotSplit,
    name: str,
    items: Sequence[Item],
    trouble: Trouble,
    seed: int,
) -> list[tuple[Item, str]]:
    """Return images with the labels of a hand that errs."""
    own = [item.label for item in items]
    if trouble.share and (name == "train" or trouble.val_too):
        if trouble.kind == "pair":
            others = likeliest_others(place, dataset, items, split.tuned)
        else:
            others = [[other for other in split.tuned if other != label] for label in own]
        own = wrong_labels(own, others, trouble.share, f"{seed}/{name}")
    return [(Item(item.path, label), name) for item, label in zip(items, own, strict=True)]


@torch.no_grad()
def likeliest_others(
    place: World, dataset: Dataset, items: Sequence[Item], classes: Sequence[int]
) -> list[list[int]]:
    """Return the wrong class that the frozen model finds most probable, for each image."""
    backbone = load_backbone(place.model, None, torch.device("cpu"))
    with closing(EmbeddingCache(backbone.fingerprint(), "cpu")) as cache:
        features = embed(backbone, cache, dataset, items, "images to mislabel")
    own = TrainConfig(place.data, place.model)
    texts = backbone.class_embeddings([dataset.class_names[c] for c in classes], own.templates)
    cosines = features.embeddings @ texts.T
    cosines[torch.arange(len(features)), features.labels_among(classes)] = -torch.inf
    return [[classes[column]] for column in cosines.argmax(dim=1).tolist()]


def _write(path: Path, class_names: Sequence[str], rows: Iterable[tuple[Item, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "label", "split"))
        for item, split in rows:
            table.writerow((f"images/{item.path}", class_names[item.label], split))
    return path


if __name__ == "__main__":
    main()
