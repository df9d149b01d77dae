"""Tests that need an NVIDIA GPU: `pytest tests/gpu -m gpu`; elsewhere they are skipped."""

import pytest

from capt_deploy.core.gpus import gpu_problem


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    """Skip where there is none, and say why."""
    if (problem := gpu_problem()) is not None:
        pytest.skip(f"no NVIDIA GPU: {problem}")
