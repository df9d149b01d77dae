"""An epoch on a real GPU, also in bf16, leads to where one on the CPU leads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
FEW = {
    "shots": 4,
    "tuning_epochs": 1,
    "visual_epochs": 1,
    "tuning_warmup_epochs": 0,
    # nothing is chosen
    "map_side": "images",
    "map_ridge": 0.01,
    "rows_weight": 0.1,
}
Train = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def train_on(request: pytest.FixtureRequest, tmp_path: Path) -> Train:
    """Return a function that tunes a tiny model for an epoch of each kind."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    from capt_train.pipeline import train
    from tests.configs import train_config

    photos, model = (request.getfixturevalue(name) for name in ("photos", "tiny_model_dir"))

    def run(device: str, autocast: str) -> dict[str, Any]:
        config = train_config(
            data=str(photos),
            model=f"local-dir:{model}",
            classes="base",
            method="full",
            without=("visual-prompts", "text-prompts"),
            visual_strength="1",  # the visual side counts, whatever images say of it
            device=device,
            tuning_autocast=autocast,
            **FEW,
        )
        return train(config, tmp_path / f"{device}-{autocast}")

    return run


@pytest.mark.parametrize(("autocast", "tolerance"), [("off", 0.005), ("bf16", 0.02)])
def test_an_epoch_on_the_gpu_ends_as_on_the_cpu(
    train_on: Train, autocast: str, tolerance: float
) -> None:
    """What is said of the images is compared, not parameters.

    The optimizer's first steps have one length in either direction: noise turns some around.
    On the CPU, bf16 moves these figures by 0.003.
    """
    on_gpu, on_cpu = train_on("cuda", autocast), train_on("cpu", "off")
    for scope in ("base", "new", "all"):
        own, wanted = on_gpu[scope], on_cpu[scope]
        assert own["nll"] == pytest.approx(wanted["nll"], abs=tolerance)
        assert abs(own["accuracy"] - wanted["accuracy"]) * own["n"] <= 1.5  # images
