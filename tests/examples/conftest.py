"""What the tests of the examples share."""

from pathlib import Path

import pytest

from capt_deploy.classifier import Classifier


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
