from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from capt_deploy.core.errors import RunError
from capt_train.tune.checkpoint import TuningState, load_checkpoint, part_of, save_checkpoint

STATE = TuningState(3, 2, 0.1 + 0.2, ({"coa": 1 / 3}, {"coa": 0.1, "val_nll": 2.0}))
OPTIMIZERS = {
    "adamw": lambda own: torch.optim.AdamW(own, lr=0.1),
    "sgd": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9),
    "sgd without momentum": lambda own: torch.optim.SGD(own, lr=0.1),
}


def module(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3)


def advance(own: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        own(inputs).square().sum().backward()
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    state = optimizer.state_dict()["state"]
    return {(index, key): value for index, own in state.items() for key, value in own.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_optimizer_and_state_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    first, other = module(0), module(1)
    optimizer, own = (OPTIMIZERS[name](of.parameters()) for of in (first, other))
    advance(first, optimizer, 3)
    save_checkpoint(tmp_path / "c.safetensors", first, STATE, optimizer)
    assert load_checkpoint(tmp_path / "c.safetensors", other, own) == (STATE, {})
    saved, loaded = tensors(optimizer), tensors(own)
    assert saved.keys() == loaded.keys()
    for key, value in saved.items():
        assert value.dtype == loaded[key].dtype
        assert torch.equal(value, loaded[key])
    advance(first, optimizer, 2)
    advance(other, own, 2)
    assert torch.equal(first.weight, other.weight)
    assert torch.equal(first.bias, other.bias)


def test_without_an_optimizer_only_parameters_are_written(tmp_path: Path) -> None:
    first, other = module(0), module(1)
    save_checkpoint(tmp_path / "c.safetensors", first, TuningState())
    assert load_checkpoint(tmp_path / "c.safetensors", other) == (TuningState(), {})
    assert torch.equal(first.weight, other.weight)


def test_further_tensors_come_back_under_their_names(tmp_path: Path) -> None:
    path, own = tmp_path / "c.safetensors", module(0)
    optimizer = torch.optim.AdamW(own.parameters())
    advance(own, optimizer, 1)
    extra = {"bank.counts": torch.tensor([[0.0, 1 / 3]]), "bank.labels": torch.tensor([2, 0])}
    save_checkpoint(path, own, STATE, optimizer, extra)
    _, loaded = load_checkpoint(path, module(1), OPTIMIZERS["adamw"](module(1).parameters()))
    assert loaded.keys() == extra.keys()
    assert all(torch.equal(loaded[name], own) for name, own in extra.items())
    bank = part_of(loaded, "bank")
    assert sorted(bank) == ["counts", "labels"]
    assert bank["labels"].dtype == torch.long
    assert part_of(loaded, "ban") == {}


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        own = module(0)
        optimizer = torch.optim.AdamW(own.parameters())
        advance(own, optimizer, 2)
        save_checkpoint(tmp_path / name, own, STATE, optimizer)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def refusal(path: Path, of: nn.Module) -> str:
    with pytest.raises(RunError) as caught:
        load_checkpoint(path, of)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, module(0), STATE)
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a checkpoint of this run" in refusal(path, module(0))


def test_a_missing_file_and_one_without_state_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    refusal(tmp_path / "nowhere.safetensors", module(0))
    save_file({"module.weight": torch.zeros(3, 5)}, tmp_path / "foreign.safetensors")
    refusal(tmp_path / "foreign.safetensors", module(0))


def test_a_checkpoint_of_another_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, module(0), STATE)
    refusal(path, nn.Linear(4, 3))
    refusal(path, nn.Sequential(nn.Linear(5, 3)))


def test_epochs_since_best_are_counted_from_the_best() -> None:
    assert STATE.epochs_since_best == 1
