"""Errors that a user can act on: messages say what was expected, what came, and how to fix it.

Commands print them as one `Error:` line and exit with `exit_code`; libraries catch `CaptError`.
"""


class CaptError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 2


class ConfigError(CaptError):
    """An option or a configuration value that cannot be used."""


class DataError(CaptError):
    """A data set that cannot be read or lacks the requested images or classes."""


class ImageError(CaptError):
    """One image that cannot be decoded."""


class ModelError(CaptError):
    """A backbone that cannot be loaded or is not supported."""


class RunError(CaptError):
    """A run folder that is missing, unfinished, or made with other settings."""


class BundleError(CaptError):
    """A bundle that is damaged, unknown, or unsafe."""


class BackendError(CaptError):
    """A requested backend that cannot run here."""


class UnavailableError(BackendError):
    """A backend that this machine cannot run, whatever the graph."""


class BusyError(BackendError):
    """The queue of requests is full; try again later."""


class GateError(CaptError):
    """An export whose outputs differ from those of the trained model."""

    exit_code = 1
