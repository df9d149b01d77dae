"""What is different on a Jetson: TensorRT comes with JetPack, for the Python of the system."""

import re
from pathlib import Path

_JETPACKS = {"36": "JetPack 6", "38": "JetPack 7", "39": "JetPack 7"}  # by Jetson Linux


def jetson_linux(root: Path = Path("/")) -> str | None:
    """Return the release of Jetson Linux, such as "36.4.3"; None where this is no Jetson.

    Args:
        root: the folder that holds `etc` and `usr`.
    """
    try:
        text = (root / "etc/nv_tegra_release").read_text(errors="replace")
    except OSError:
        return None
    match = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else None


def jetpack(root: Path = Path("/")) -> str | None:
    """Return the name of the JetPack, such as "JetPack 6"; None if unknown, or not a Jetson."""
    return _JETPACKS.get((jetson_linux(root) or "").split(".")[0])


def tensorrt_hint(root: Path = Path("/")) -> str:
    """Return how an environment on a Jetson gets TensorRT."""
    found = sorted(root.glob("usr/lib/python3*/dist-packages/tensorrt"))
    if not found:
        return "sudo apt-get install python3-libnvinfer"
    python = found[-1].parents[1].name  # python3.10
    return (
        f"TensorRT of JetPack is here for /usr/bin/{python}; make the environment with "
        f"/usr/bin/{python} -m venv --system-site-packages"
    )


def cuda_hint(root: Path = Path("/")) -> str:
    """Return the command that installs a way to CUDA; the driver of JetPack 6 runs CUDA 12."""
    version = "'cuda-python<13'" if jetpack(root) == "JetPack 6" else "cuda-python"
    return f"pip install {version}"
