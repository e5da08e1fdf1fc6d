"""Reading of a stream's length, and a warning if it is wrong."""

from __future__ import annotations

from typing import Any

from dstrain.core.log import get_logger

logger = get_logger(__name__)


class LengthWatch:
    """Counter that warns if a stream yields more or fewer samples than its ``__len__``."""

    def __init__(self, name: str, *, length: int, tells: bool) -> None:
        """Set up before the first epoch.

        Args:
            name: name of the stream's class.
            length: the stream's ``__len__``.
            tells: whether to warn, which is done once.
        """
        self._name, self._length, self._tells = name, length, tells
        self._left = 0

    def begin(self, num_steps: int) -> None:
        """Begin or resume an epoch with ``num_steps`` expected micro-steps."""
        self._left = num_steps

    def count(self) -> None:
        """Count a micro-step, and warn if it is beyond the length."""
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
    """Return the ``__len__`` of a source; None if it has none."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None
