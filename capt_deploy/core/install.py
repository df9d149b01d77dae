"""How to install capt's extras: no package index has capt."""

from importlib import import_module
from pathlib import Path

from capt_deploy.core.errors import ConfigError
from capt_deploy.core.jetson import jetson_linux, tensorrt_hint
from capt_deploy.core.version import __version__

_FOLDER = Path(__file__).resolve().parents[2]


def install_hint(extra: str) -> str:
    """Return the command that adds an extra, such as "tensorrt", to this installation."""
    if extra == "tensorrt" and jetson_linux() is not None:
        return tensorrt_hint()
    if (_FOLDER / "pyproject.toml").is_file():  # a clone, installed with --editable
        return f"pip install '.[{extra}]' in {_FOLDER}"
    return (
        f"pip install '.[{extra}]' in a clone of capt, or "
        f"pip install 'capt-{__version__}-py3-none-any.whl[{extra}]' of a built wheel"
    )


def require_packages(option: str, extra: str, *names: str) -> None:
    """Raise an error, before time is spent, if a package that an option needs is missing.

    Raises:
        ConfigError: a package cannot be imported; the message says how to install the extra.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as cause:
            raise ConfigError(f"{option} needs {name} ({cause}); {install_hint(extra)}") from cause
