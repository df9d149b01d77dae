"""Time a small `capt-train` on a device, without the features of the frozen model.

python -m benchmarks.training --device cuda
"""

from typing import Any

import click

from benchmarks.cell import measure, open_world
from capt_deploy.core.console import Command, print_json
from capt_train.config import TrainConfig

# Few, of all kinds: enough to tell devices apart.
_EPOCHS: dict[str, Any] = {"tuning.epochs": 10, "visual.epochs": 2}


@click.command(cls=Command)
@click.option("--world", default="pictograms", show_default=True, help="Or one of ../shared/data.")
@click.option("--device", default="auto", show_default=True)
@click.option("--autocast", default="auto", show_default=True)
def main(world: str, device: str, autocast: str) -> None:
    """Tune with all parts of the default method for a few epochs; print JSON."""
    print_json(timed(world, device, autocast))


def timed(world: str, device: str, autocast: str) -> dict[str, Any]:
    """Return seconds, accuracies and the peak of the GPU's memory."""
    import torch

    with open_world(world) as place:
        config = TrainConfig(place.data, place.model, classes="base", device=device)
        changes = {"tuning.autocast": autocast, **_EPOCHS}
        figures = measure(config.with_settings(changes), "val")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    kept = ("seconds", "harmonic", "base", "new")
    return {
        "world": world,
        "device": device,
        "autocast": autocast,
        "epochs": _EPOCHS,
        **{key: figures[key] for key in kept},
        "peak_gpu_bytes": peak,
    }


if __name__ == "__main__":
    main()
