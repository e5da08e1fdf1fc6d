"""What callbacks remember: taken down before a search, and given back before each of its trials."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

_SINGLE = (type(None), str, bytes, numbers.Number, np.ndarray, Path)


class CallbackStates:
    """The attributes of callbacks that are plain values; others stay whatever they are.

    A callback may hold the trainer, a file or a connection: a copy of these would be another one,
    and may be large. Trackers are left alone, as what they remember is about their connection.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        """Take down what they remember now."""
        from dstrain.reporting.compat import INTEGRATION_TO_CALLBACK

        trackers = tuple(INTEGRATION_TO_CALLBACK.values())
        self._states = [
            (c, set(vars(c)), {n: copy.deepcopy(v) for n, v in vars(c).items() if _is_plain(v)})
            for c in callbacks
            if hasattr(c, "__dict__") and not isinstance(c, trackers)
        ]

    def give_back(self) -> None:
        """Let them remember that again, and nothing plain that they have learnt since."""
        for callback, names, values in self._states:
            attributes = vars(callback)
            for name in [n for n, v in attributes.items() if n not in names and _is_plain(v)]:
                del attributes[name]
            attributes.update(copy.deepcopy(values))


def _is_plain(value: Any) -> bool:
    if isinstance(value, _SINGLE):
        return True
    if isinstance(value, Mapping):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return isinstance(value, (Sequence, AbstractSet)) and all(_is_plain(v) for v in value)
