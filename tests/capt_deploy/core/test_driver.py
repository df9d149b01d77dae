"""NVIDIA's driver, asked where there is none, and PCI cards as Linux lists them."""

from pathlib import Path

import pytest

from capt_deploy.core import driver
from capt_deploy.core.driver import gpu_problem, nvidia_gpu_is_here


def put_card(root: Path, slot: str, vendor: str, kind: str) -> None:
    folder = root / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_only_a_display_controller_of_nvidias_is_a_gpu(tmp_path: Path) -> None:
    assert not driver._is_on_the_bus(tmp_path)
    put_card(tmp_path, "0000:00:01.0", "0x8086", "0x030000")
    put_card(tmp_path, "0000:00:02.0", "0x10de", "0x040300")  # its sound
    assert not driver._is_on_the_bus(tmp_path)
    put_card(tmp_path, "0000:00:03.0", "0x10de", "0x030200")
    assert driver._is_on_the_bus(tmp_path)


def test_a_gpu_without_a_driver_is_there_unless_it_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "gpu_problem", lambda: "no driver")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for on_the_bus in (True, False):
        monkeypatch.setattr(driver, "_is_on_the_bus", lambda there=on_the_bus: there)
        assert nvidia_gpu_is_here() is on_the_bus
    monkeypatch.setattr(driver, "_is_on_the_bus", lambda: True)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not nvidia_gpu_is_here()


def test_a_missing_driver_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libnothing.so.1")
    gpu_problem.cache_clear()
    try:
        problem = gpu_problem()
    finally:
        gpu_problem.cache_clear()
    assert problem is not None
    assert "expected NVIDIA's driver, found no libnothing.so.1" in problem
    assert "install the driver" in problem
