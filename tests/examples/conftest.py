"""What the tests of the examples share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.server_load import Server, running_server
from capt_deploy.serving.classifier import Classifier


@pytest.fixture(scope="session")
def server_extra() -> None:
    """Skip where the server's own packages are not installed."""
    for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        pytest.importorskip(name)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the committed bundle; see tests/golden/make.py."""
    return Path(__file__).parents[1] / "golden" / "tiny.capt"


@pytest.fixture(scope="session")
def classifier(golden: Path) -> Classifier:
    """Return it loaded."""
    return Classifier.load(golden)


@pytest.fixture(scope="module")
def server(server_extra: None, golden: Path) -> Iterator[Server]:
    with running_server(golden, "--max-bytes", 300_000, "--max-seconds", 20) as running:
        yield running
        assert running.process.poll() is None
        assert "Traceback" not in running.log.read_text()
