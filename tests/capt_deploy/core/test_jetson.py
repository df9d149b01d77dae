from pathlib import Path

import pytest

from capt_deploy.core import install
from capt_deploy.core.jetson import cuda_hint, jetpack, jetson_linux, tensorrt_hint

RELEASE = "# R{}, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Mon Dec 30 2024\n"


def board(root: Path, release: str) -> Path:
    (root / "etc").mkdir()
    (root / "etc" / "nv_tegra_release").write_text(release)
    return root


@pytest.mark.parametrize(
    ("text", "linux", "name"),
    [
        (RELEASE.format("36 (release), REVISION: 4.3"), "36.4.3", "JetPack 6"),
        (RELEASE.format("38 (release), REVISION: 2.0"), "38.2.0", "JetPack 7"),
        (RELEASE.format("35 (release), REVISION: 6.1"), "35.6.1", None),
        ("something else\n", None, None),
        ("", None, None),
    ],
)
def test_a_jetson_is_known_by_its_release(
    tmp_path: Path, text: str, linux: str | None, name: str | None
) -> None:
    root = board(tmp_path, text)
    assert (jetson_linux(root), jetpack(root)) == (linux, name)


def test_other_machines_are_no_jetsons(tmp_path: Path) -> None:
    assert (jetson_linux(tmp_path), jetpack(tmp_path)) == (None, None)
    assert cuda_hint(tmp_path) == "pip install cuda-python"


def test_the_driver_of_jetpack_6_runs_cuda_12(tmp_path: Path) -> None:
    root = board(tmp_path, RELEASE.format("36 (release), REVISION: 4.3"))
    assert cuda_hint(root) == "pip install 'cuda-python<13'"


def test_an_environment_that_does_not_see_jetpacks_tensorrt_says_how(tmp_path: Path) -> None:
    assert tensorrt_hint(tmp_path) == "sudo apt-get install python3-libnvinfer"
    (tmp_path / "usr/lib/python3.10/dist-packages/tensorrt").mkdir(parents=True)
    assert tensorrt_hint(tmp_path).endswith("/usr/bin/python3.10 -m venv --system-site-packages")


def test_the_extra_of_tensorrt_is_never_installed_on_a_jetson(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "pip install '.[tensorrt]'" in install.install_hint("tensorrt")
    monkeypatch.setattr(install, "jetson_linux", lambda: "36.4.3")
    assert "pip" not in install.install_hint("tensorrt")
    assert "pip install '.[open-vocab]'" in install.install_hint("open-vocab")
