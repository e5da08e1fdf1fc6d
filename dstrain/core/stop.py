"""Exit statuses of runs that end early or incomplete, and the exception of a preempted run."""

from __future__ import annotations

PREEMPTED = 75
"""Exit status of a run that a scheduler ended early: EX_TEMPFAIL, "try again later"."""

STALLED = 76
"""Exit status of a run whose ranks waited in a collective for a rank that did not arrive."""

INCOMPLETE = 3
"""Exit status of a run that finished training but could not write its last checkpoint."""


class Preempted(SystemExit):
    """Exit of a run that was sent a signal to stop and has saved; its status is ``PREEMPTED``."""

    def __init__(self, message: str) -> None:
        """Store the message for the code that reports the exit."""
        super().__init__(PREEMPTED)
        self.message = message
