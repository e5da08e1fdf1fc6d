"""How a process ends that was asked to before its work was done."""

from __future__ import annotations

PREEMPTED = 75
"""Exit status of a run that a scheduler ended early: EX_TEMPFAIL, "try again later"."""

STALLED = 76
"""Exit status of a run whose ranks waited for one that did not come."""


INCOMPLETE = 3
"""Exit status of training that is done, but whose last checkpoint could not be written."""


class Preempted(SystemExit):
    """All that must survive has been saved, and the run is to end with status ``PREEMPTED``."""

    def __init__(self, message: str) -> None:
        """Keep what happened, for who reports it."""
        super().__init__(PREEMPTED)
        self.message = message
