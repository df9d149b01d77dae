"""Threads and device handles do not survive `fork`: notice their use in a forked copy."""

import os

from capt_deploy.errors import BackendError


class Process:
    """The process in which something was made."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_this(self) -> bool:
        """Whether this still is that process and no forked copy of it."""
        return os.getpid() == self._id

    def check(self) -> None:
        """Make sure that it is, before waiting for a thread that the copy does not have.

        Raises:
            BackendError: this is a forked copy.
        """
        if not self.is_this:
            raise BackendError(
                f"expected the process {self._id} that loaded the classifier, came its forked copy "
                f"{os.getpid()}; load it after the fork, or start processes with "
                f'multiprocessing.get_context("spawn")'
            )
