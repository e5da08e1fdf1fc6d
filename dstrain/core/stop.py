"""Exit statuses of processes that end before their work is done, and the exception for it."""

from __future__ import annotations

PREEMPTED = 75
"""Exit status of a run that a scheduler ended early: EX_TEMPFAIL, "try again later"."""

STALLED = 76
"""Exit status of a run whose ranks waited for one that did not come."""

INCOMPLETE = 3
"""Exit status of training that is done, but whose last checkpoint could not be written."""


class Preempted(SystemExit):
    """The end of a run that was asked to end; it has saved, and exits with ``PREEMPTED``."""

    def __init__(self, message: str) -> None:
        """Keep the message for the code that reports the end."""
        super().__init__(PREEMPTED)
        self.message = message
