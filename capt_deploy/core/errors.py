"""Errors a user can act on: each message says what was expected, what came, and the fix.

Commands print them as one `Error:` line and exit with 2; library users catch `CaptError`.
"""


class CaptError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 2


class ConfigError(CaptError):
    """An option or a configuration value that cannot be used."""


class DataError(CaptError):
    """A data set that cannot be read or does not hold what is asked for."""


class ImageError(CaptError):
    """One image that cannot be decoded."""


class ModelError(CaptError):
    """A backbone that cannot be loaded or is not supported."""


class RunError(CaptError):
    """A run folder that is missing, unfinished, foreign, or does not match."""


class BundleError(CaptError):
    """A bundle that is damaged, unknown, or unsafe."""


class BackendError(CaptError):
    """A requested backend that cannot run here."""


class UnavailableError(BackendError):
    """A backend that this machine cannot run, whatever the graph."""


class BusyError(BackendError):
    """More requests wait than are allowed to; try again later."""


class GateError(CaptError):
    """An export that does not say the same as the trained model."""

    exit_code = 1
