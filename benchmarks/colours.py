"""What the map to natural colours gains behind simulated cameras, on validation images.

    python -m benchmarks.colours --worlds clothes,objects,cifar100 --cameras none,webcam

Cells that are measured stay in benchmarks/results/cameras.json; `--only-table` prints them.
"""

import time
from collections.abc import Mapping
from typing import Any

import click
import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.cameras import CAMERAS
from benchmarks.cell import World, open_world
from benchmarks.record import add_cells, load_cells
from capt_deploy.core.console import Command, say
from capt_train.config import TrainConfig
from capt_train.data.features import embed, read_pixels
from capt_train.run.colours import fit_colours, natural_colours
from capt_train.run.setup import load

_JUDGED = 256  # training images that decide, as in a run


@click.command(cls=Command)
@click.option("--worlds", default="clothes,objects,cifar100", show_default=True)
@click.option("--cameras", default=",".join(("none", *CAMERAS)), show_default=True)
@click.option("--shots", default=16, show_default=True)
@click.option("--images", default=500, show_default=True, help="Validation images, at most.")
@click.option("--only-table", is_flag=True, help="Measure nothing.")
def main(worlds: str, cameras: str, shots: int, images: int, only_table: bool) -> None:
    """Measure every world through every camera, and print the table."""
    for world in () if only_table else worlds.split(","):
        for camera in cameras.split(","):
            name = world if camera == "none" else f"{world}@{camera}"
            say(f"colours: {name}")
            with open_world(name) as place:
                add_cells(
                    "cameras", {f"{name} / {shots}": {"world": name, **_cell(place, shots, images)}}
                )
    click.echo(markdown(load_cells("cameras")))


def _cell(place: World, shots: int, count: int) -> dict[str, Any]:
    """Return accuracies with and without the map, and the time that the decision takes."""
    setup = load(TrainConfig(place.data, place.model, method="zeroshot", shots=shots))
    backbone, dataset, texts = setup.backbone, setup.dataset, setup.zero_shot.cpu()
    draw = torch.Generator().manual_seed(1)
    order = torch.randperm(len(setup.split.val), generator=draw)[:count].tolist()
    items = {"train": setup.split.train, "val": [setup.split.val[row] for row in order]}
    plain = {name: embed(backbone, None, dataset, some, name) for name, some in items.items()}
    rows = torch.randperm(len(items["train"]), generator=draw)[:_JUDGED]
    started = time.process_time()
    pixels = read_pixels(backbone, dataset, [items["train"][row] for row in rows.tolist()])
    labels, embeddings = plain["train"].labels[rows], plain["train"].embeddings[rows]
    fit = fit_colours(backbone, texts, pixels, labels, embeddings)
    seconds = time.process_time() - started
    encode = backbone.recoloured(natural_colours(pixels, backbone.preprocess)).image_embeddings
    mapped = {
        name: embed(backbone, None, dataset, some, f"mapped {name}", encode)
        for name, some in items.items()
    }
    cell: dict[str, Any] = {
        "shots": shots,
        "images": len(items["val"]),
        "kept": fit.colours is not None,
        "gain": fit.gain,
        "standard_error": fit.standard_error,
        "cpu_seconds": seconds,
    }
    for name, images in (("plain", plain), ("mapped", mapped)):
        train, val = images["train"], images["val"]
        weights, biases = discriminant(train.embeddings, train.labels, len(texts))
        tuned = val.embeddings.double() @ weights.T + biases
        for title, logits in (("zero_shot", val.embeddings @ texts.T), ("tuned", tuned)):
            right = logits.argmax(dim=1) == val.labels
            cell[f"{title}_{name}"] = float(right.double().mean())
    return cell


def discriminant(
    embeddings: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], classes: int
) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " classes"]]:
    """Return rows and biases of Gaussian discriminant analysis (arXiv 2402.04087), in float64."""
    exact = embeddings.double()
    means = torch.stack([exact[labels == label].mean(dim=0) for label in range(classes)])
    covariance = torch.cov((exact - means[labels]).T)
    count, dim = exact.shape
    shrunken = (count - 1) * covariance + covariance.trace() * torch.eye(dim, dtype=exact.dtype)
    rows = dim * torch.linalg.solve(shrunken, means.T).T
    return rows, -0.5 * (rows * means).sum(dim=1)


def markdown(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table: accuracies in %, those with the map also where a run drops it."""
    titles = "world | shots | zero-shot | with map | tuned | with map | gain in NLL | kept | CPU s"
    lines = [f"| {titles} |", "|---" * 9 + "|"]
    for cell in sorted(cells.values(), key=lambda cell: cell["world"].partition("@")[0]):
        names = ("zero_shot_plain", "zero_shot_mapped", "tuned_plain", "tuned_mapped")
        shares = " | ".join(f"{100 * cell[name]:.1f}" for name in names)
        gain = f"{cell['gain']:+.3f} ± {cell['standard_error']:.3f}"
        kept = "yes" if cell["kept"] else "no"
        lines.append(
            f"| {cell['world']} | {cell['shots']} | {shares} | {gain} | {kept} | "
            f"{cell['cpu_seconds']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
