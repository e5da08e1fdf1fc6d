"""What a stream says of its length, and whether that was right."""

from __future__ import annotations

from typing import Any

from dstrain.core.log import get_logger

logger = get_logger(__name__)


class LengthWatch:
    """Warns where a stream gives more or fewer samples than its ``__len__`` says."""

    def __init__(self, name: str, *, length: int, tells: bool) -> None:
        """Args: name of the stream's class, length that it says, whether to warn at all, once."""
        self._name, self._length, self._tells = name, length, tells
        self._left = 0

    def begin(self, num_steps: int) -> None:
        """Begin an epoch, or go on inside of it: the micro-steps that are still to come."""
        self._left = num_steps

    def count(self) -> None:
        """Count one more micro-step."""
        self._left -= 1
        if self._tells and self._left < 0:
            self._warn(
                "and gives more: epochs are longer than the schedule was made for, which ends "
                "after as many steps as its length says, wherever the data is then"
            )

    def end(self) -> None:
        """End the epoch."""
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
    """Return what a source says of its length, if anything."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None
