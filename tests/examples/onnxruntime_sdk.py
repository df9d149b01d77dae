"""ONNX Runtime as its release archive lays it out, from what can be had by package managers.

The wheel holds the library without headers. Debian's package holds headers of an earlier version,
which a later library serves: its C API is versioned.
"""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from platform import freedesktop_os_release
from typing import NoReturn

import pytest

PACKAGES = ("libonnxruntime-dev", "nlohmann-json3-dev")
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SECONDS = 60


def miss(what: str) -> NoReturn:
    """Skip the test for want of something that is installed; in CI, fail."""
    if os.environ.get("CAPT_CI"):
        pytest.fail(what)
    pytest.skip(what)


def make_sdk(folder: Path) -> Path:
    """Return a folder with `include` and `lib`.

    Where they cannot be had, the test fails in CI, and is skipped elsewhere and without a network.
    """
    for package in _download(folder / "packages"):
        _run("dpkg", "--extract", str(package), str(folder / "root"))
    sdk = folder / "sdk"
    shutil.copytree(folder / "root" / "usr" / "include", sdk / "include")
    (sdk / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # to link, and to load
        (sdk / "lib" / name).symlink_to(_library())
    return sdk


def _library() -> Path:
    spec = find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        miss("ONNX Runtime's package holds no libonnxruntime.so")
    return found[0]


def _download(folder: Path) -> list[Path]:
    """Download packages of Debian 13, also on 12, which has none; nothing is installed."""
    if not KEYS.is_file() or shutil.which("apt-get") is None:
        miss("ONNX Runtime's headers come from a Debian package, and this is no Debian")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    sources = folder / "sources.list"
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "none",
    }
    options = [f"--option={name}={value}" for name, value in settings.items()]
    try:
        lines = [f"deb [signed-by={KEYS}] {server} trixie main\n" for server in _servers()]
        sources.write_text("".join(lines))
        _run("apt-get", *options, "update")
        _run("apt-get", *options, "download", *PACKAGES, folder=folder)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"ONNX Runtime's headers cannot be downloaded ({error})")
    return sorted(folder.glob("*.deb"))


def _servers() -> list[str]:
    """Return the addresses from which this machine gets Debian's own packages."""
    codename = freedesktop_os_release().get("VERSION_CODENAME", "")
    listed = _run("apt-get", "update", "--print-uris")
    return re.findall(rf"'(\S+)/dists/{codename}/InRelease'", listed)


def _run(*command: str, folder: Path | None = None) -> str:
    """Run a command; return what it printed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return done.stdout
