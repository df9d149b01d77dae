"""NVIDIA's driver, faked and as it is here, and PCI cards as Linux lists them."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from capt_deploy.core import gpus
from capt_deploy.core.gpus import Driver, Gpu, find_driver, gpu_problem, nvidia_gpu_is_here

H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    sm=90,
    driver="580.159.04",
    memory_bytes=81559 * 2**20,
    memory_used_bytes=512 * 2**20,
    clock_sm_mhz=345,
    clock_sm_max_mhz=1980,
    clock_memory_mhz=2619,
    power_limit_w=700.0,
)


class FakeNvml:
    """NVML with an H100 and, as number 1, an Orin of which it knows the name alone."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, nvmlMemory_v2 = 1, 2, 3  # noqa: N815

    class NVMLError(Exception):
        pass

    def __init__(self, count=1, fails=None):
        self._count, self._fails = count, fails

    def nvmlInit(self):
        if self._fails:
            raise self.NVMLError(self._fails)

    def nvmlShutdown(self):
        pass

    def nvmlDeviceGetCount(self):
        return self._count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 13000

    def nvmlSystemGetDriverVersion(self):
        return H100.driver

    def nvmlDeviceGetName(self, handle):
        return "Orin (nvgpu)" if handle else H100.name

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self._known(handle, (9, 0))

    def nvmlDeviceGetMemoryInfo(self, handle, version):
        memory = SimpleNamespace(total=H100.memory_bytes, used=H100.memory_used_bytes)
        return self._known(handle, memory)

    def nvmlDeviceGetPowerManagementLimit(self, handle):
        return self._known(handle, 700_000)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._known(handle, {1: 345, 2: 2619}[kind])

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return self._known(handle, {1: 1980}[kind])

    def _known(self, handle, value):
        if handle:
            raise self.NVMLError("Not Supported")
        return value


class FakeCuda:
    """CUDA's driver API with an Orin and a Thor; it writes each answer where the caller says."""

    def cuDeviceGetCount(self, answer):
        answer._obj.value = 2

    def cuDeviceGet(self, answer, ordinal):
        answer._obj.value = ordinal

    def cuDeviceGetAttribute(self, answer, attribute, device):
        answer._obj.value = {75: (8, 11), 76: (7, 0)}[attribute][device]

    def cuDeviceTotalMem_v2(self, answer, device):
        answer._obj.value = (2**34, 2**37)[device]

    def cuDriverGetVersion(self, answer):
        answer._obj.value = 12060


@pytest.fixture
def fake(monkeypatch):
    """Return a function that puts a fake NVML and what CUDA says in place of the machine's."""

    def put(nvml, problem=None):
        monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
        monkeypatch.setattr(gpus, "gpu_problem", lambda: problem)

    return put


def put_card(root: Path, slot: str, vendor: str, kind: str) -> None:
    folder = root / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_every_field_of_a_gpu_is_read_and_unsupported_ones_are_none(fake):
    fake(FakeNvml(count=2))
    assert find_driver() == Driver((H100, Gpu("Orin (nvgpu)", driver=H100.driver)), None, "13.0")
    assert gpus.query_gpus() == find_driver().gpus


def test_gpus_hidden_from_cuda_are_listed_with_the_problem(fake):
    fake(FakeNvml(), "the driver shows no GPU; is CUDA_VISIBLE_DEVICES set?")
    driver = find_driver()
    assert driver.gpus == (H100,)
    assert driver.problem == "the driver shows no GPU; is CUDA_VISIBLE_DEVICES set?"


def test_what_nvml_says_is_added_to_the_problem(fake):
    fake(FakeNvml(fails="Driver/library version mismatch"), "the driver failed")
    said = "the driver failed (NVML: Driver/library version mismatch)"
    assert find_driver() == Driver((), said)
    assert gpus.query_gpus() == ()
    fake(FakeNvml(count=0), "no GPU")
    assert find_driver().problem == "no GPU (NVML lists no GPU)"


def test_where_nvml_is_missing_cuda_names_the_gpus(fake, monkeypatch):
    fake(FakeNvml(fails="NVML Shared Library Not Found"))
    monkeypatch.setattr(gpus, "gpu_name", ("Orin", "Thor").__getitem__)
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda _: FakeCuda())
    orin, thor = Gpu("Orin", 87, memory_bytes=2**34), Gpu("Thor", 110, memory_bytes=2**37)
    assert find_driver() == Driver((orin, thor), None, "12.6")


def test_a_driver_that_hangs_is_given_up(fake, monkeypatch):
    hanging, nvml = threading.Event(), FakeNvml()
    nvml.nvmlInit = hanging.wait
    fake(nvml, "no CUDA")
    monkeypatch.setattr(gpus, "_SECONDS", 0.05)
    assert find_driver().problem == "no CUDA (NVML did not answer within 0.05 s)"
    hanging.set()


def test_there_is_a_gpu_or_a_reason_why_not():
    driver = find_driver()
    assert driver.gpus or driver.problem
    assert driver.cuda is None or driver.cuda[0].isdigit()


def test_only_a_display_controller_of_nvidias_is_a_gpu(tmp_path: Path) -> None:
    assert not gpus._is_on_the_bus(tmp_path)
    put_card(tmp_path, "0000:00:01.0", "0x8086", "0x030000")
    put_card(tmp_path, "0000:00:02.0", "0x10de", "0x040300")  # its sound
    assert not gpus._is_on_the_bus(tmp_path)
    put_card(tmp_path, "0000:00:03.0", "0x10de", "0x030200")
    assert gpus._is_on_the_bus(tmp_path)


def test_a_gpu_without_a_driver_is_there_unless_it_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "gpu_problem", lambda: "no driver")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for on_the_bus in (True, False):
        monkeypatch.setattr(gpus, "_is_on_the_bus", lambda card=on_the_bus: card)
        assert nvidia_gpu_is_here() is on_the_bus
    monkeypatch.setattr(gpus, "_is_on_the_bus", lambda: True)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not nvidia_gpu_is_here()


@pytest.mark.parametrize("card", [True, False])
def test_a_missing_driver_is_named_with_the_fix(card: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpus, "_CUDA", "libnothing.so.1")
    monkeypatch.setattr(gpus, "_is_on_the_bus", lambda: card)
    gpu_problem.cache_clear()
    try:
        problem = gpu_problem()
    finally:
        gpu_problem.cache_clear()
    assert problem is not None
    assert "expected NVIDIA's driver, found no libnothing.so.1" in problem
    assert f"; {'an' if card else 'no'} NVIDIA GPU is on the PCI bus; " in problem
    assert "install the driver" in problem
