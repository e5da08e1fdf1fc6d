"""The length that a stream reports, and a warning where it is wrong."""

from __future__ import annotations

from typing import Any

from dstrain.core.log import get_logger

logger = get_logger(__name__)


class LengthWatch:
    """A counter that warns where a stream gives more or fewer samples than its ``__len__`` says."""

    def __init__(self, name: str, *, length: int, tells: bool) -> None:
        """Begin with no epoch.

        Args: name of the stream's class, length that it reports, whether to warn (once).
        """
        self._name, self._length, self._tells = name, length, tells
        self._left = 0

    def begin(self, num_steps: int) -> None:
        """Begin an epoch, or go on inside of it, with ``num_steps`` micro-steps still to come."""
        self._left = num_steps

    def count(self) -> None:
        """Count one more micro-step, and warn if it is beyond the length."""
        self._left -= 1
        if self._tells and self._left < 0:
            self._warn(
                "and gives more: epochs are longer than the schedule was made for, which ends "
                "after as many steps as its length says, wherever the data is then"
            )

    def end(self) -> None:
        """End the epoch, and warn if micro-steps are missing."""
        if self._tells and self._left > 0:
            self._warn(
                "and gives fewer: the run ends after its epochs, in fewer steps than the schedule "
                "was made for"
            )

    def _warn(self, what: str) -> None:
        self._tells = False
        logger.warning(
            "%s says that it has %d samples, %s. Mend its __len__, or set max_steps",
            self._name,
            self._length,
            what,
        )


def length_of(source: Any) -> int | None:
    """Return the length that a source reports; None if it reports none."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None
