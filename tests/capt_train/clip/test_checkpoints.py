from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from capt_deploy.core.errors import ModelError
from capt_train.clip.checkpoints import read_checkpoint

STATE = {
    "visual.proj": torch.ones(2),
    "visual.ln.weight": torch.zeros(3),
    "logit_scale": torch.ones(()),
}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model._orig_mod.module.", "a.b."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_stands_in_front_of_all_names_is_removed_and_said(
    prefix: str, wrapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Any] = {f"{prefix}{name}": value for name, value in STATE.items()}
    if wrapped:
        state = {"epoch": 3, "pytorch-lightning_version": "2.0", "state_dict": state}
    torch.save(state, tmp_path / "file.pt")
    assert_same(read_checkpoint(str(tmp_path / "file.pt")), STATE)
    said = capsys.readouterr().err
    assert (f"begin with {prefix!r}" in said) == bool(prefix)


def test_weights_that_are_not_of_the_model_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"model.{name}": value for name, value in STATE.items()}
    state |= {"criterion.weight": torch.ones(2)}
    torch.save({"state_dict": state | {"epoch": 3}}, tmp_path / "file.pt")
    assert_same(read_checkpoint(str(tmp_path / "file.pt")), STATE)
    assert "not of the model, and not read: criterion.weight" in capsys.readouterr().err


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.pt").touch()
    with pytest.raises(ModelError, match=r"file\.pt: .*came an empty file"):
        read_checkpoint(str(tmp_path / "file.pt"))


def test_a_module_that_is_called_so_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "modules.b": torch.ones(1)}
    save_file(state, tmp_path / "file.safetensors")
    assert_same(read_checkpoint(str(tmp_path / "file.safetensors")), state)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_is_refused_with_the_tag_to_use(tmp_path: Path) -> None:
    script: Any = torch.jit.script(Scaled())
    torch.jit.save(script, tmp_path / "ViT-B-16.pt")
    with pytest.raises(ModelError, match=r"came TorchScript.*--pretrained openai"):
        read_checkpoint(str(tmp_path / "ViT-B-16.pt"))


def test_pickled_objects_are_refused_without_the_advice_to_run_them(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "callback": Path("x")}, tmp_path / "file.pt")
    (tmp_path / "text.bin").write_text("not a checkpoint")
    for name in ("file.pt", "text.bin"):
        with pytest.raises(ModelError, match="save its state_dict alone") as caught:
            read_checkpoint(str(tmp_path / name))
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"epoch": 3, "model": {}}, [torch.ones(1)], 5])
def test_a_file_without_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ModelError, match="expected tensors by name, came the names"):
        read_checkpoint(str(tmp_path / "file.pt"))
