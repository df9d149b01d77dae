import pytest

from capt_deploy.core.nvidia import Gpu, find_driver, parse_smi, query_gpus

H100 = "NVIDIA H100 80GB HBM3, 9.0, 580.159.04, 81559, 512, 345, 1980, 2619, 700.00\n"
ORIN = "Orin (nvgpu), [N/A], 540.4.0, [N/A], [N/A], [N/A], [N/A], [N/A], [N/A]\n"


def test_a_line_of_the_drivers_tool_is_a_gpu():
    (gpu,) = parse_smi(H100)
    assert gpu == Gpu(
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


def test_what_the_tool_does_not_know_is_none():
    first, second = parse_smi(H100 + ORIN)
    assert first.sm == 90
    assert second == Gpu("Orin (nvgpu)", driver="540.4.0")
    (lost,) = parse_smi(H100.replace("580.159.04", "[Unknown Error]"))
    assert lost.driver is None


@pytest.mark.parametrize("text", ["", "\n", "No devices were found\n"])
def test_other_text_is_no_gpu(text):
    assert parse_smi(text) == ()


def test_the_tools_answers_are_what_is_queried(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query_gpus() == ()
    tool.write_text(f'#!/bin/sh\ncase "$1" in *name,compute_cap*) echo "{H100.strip()}";; esac\n')
    tool.chmod(0o755)
    assert query_gpus() == parse_smi(H100)
    tool.write_text("#!/bin/sh\necho Driver/library version mismatch; exit 18\n")
    assert query_gpus() == ()
    driver = find_driver()
    if driver.problem is not None:
        assert "Driver/library version mismatch" in driver.problem


def test_there_is_a_gpu_or_a_reason_why_not():
    driver = find_driver()
    assert driver.gpus or driver.problem
    assert driver.cuda is None or driver.cuda[0].isdigit()
