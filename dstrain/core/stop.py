"""Exit statuses of runs that end early or incomplete, and the exception of a preempted run."""

from __future__ import annotations

PREEMPTED = 75
"""Exit status of a run that a scheduler ended early: EX_TEMPFAIL, "try again later"."""

STALLED = 76
"""Exit status of a run whose ranks waited in a collective for a rank that did not arrive."""

INCOMPLETE = 3
"""Exit status of a run that finished training but could not write its last checkpoint."""


class Preempted(SystemExit):
    """Exit of a run that was sent a signal to stop.

    Its status is ``PREEMPTED`` where the run has saved, and 128 + signal where it had not come to
    its first step, so that there was nothing to save.
    """

    def __init__(self, message: str, *, unsaved: int = 0) -> None:
        """Store the message for the code that reports the exit.

        Args:
            message: says what ended the run, and what was saved.
            unsaved: the signal that ended the run where nothing was saved; 0 where something was.
        """
        super().__init__(128 + unsaved if unsaved else PREEMPTED)
        self.message, self.is_saved = message, not unsaved

    @property
    def status(self) -> int:
        """Return the exit status of the process."""
        assert isinstance(self.code, int)
        return self.code
