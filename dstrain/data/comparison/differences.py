"""Comparison of two ranks' samples position by position, to tell noise from different data.

Ranks that augment some samples, each with its own seed, differ in the same way in each reading, as
parts of a split stream do. Two signs tell augmentation from parts: a label or an id is equal where
the rest of a sample differs, and samples between differing ones are equal.
"""

from __future__ import annotations

import math
from typing import Any

Part = tuple[str, Any]  # kind of a field ("exact", "rough", ...), and the content to compare
SampleSummary = dict[str, Part]  # field -> its summary
FieldSummaries = dict[str, list[Part | None]]  # field -> its summary in each sample

_ROUGH = 1e-3  # relative difference up to which floating-point numbers count as equal
_MOST_DIFFERING = 8  # most differing samples for each equal sample between them


class Differences:
    """Comparison of this rank's samples with those of the main rank, position by position.

    Attributes:
        differs: for each sample that both ranks have, whether some field differs.
    """

    def __init__(self, mine: FieldSummaries, theirs: FieldSummaries) -> None:
        """Compare the fields.

        Args:
            mine: this rank's summaries of the fields to compare.
            theirs: the main rank's summaries of these fields.
        """
        self._mine = mine
        self._alike = {
            field: [is_close(a, b) for a, b in zip(parts, theirs[field], strict=False)]
            for field, parts in mine.items()
        }
        self.differs = [not all(alike) for alike in zip(*self._alike.values(), strict=True)]

    def field_at(self, place: int) -> str:
        """Return the name of a field that differs in a sample."""
        return next(field for field, alike in self._alike.items() if not alike[place])

    def have_column_in_common(self, first: int = 0, end: int | None = None) -> bool:
        """Tell whether a field is equal in all differing samples, with more than one value.

        Args:
            first: position of the first sample to compare.
            end: position after the last sample to compare; None for all.
        """
        places = [i for i, differs in enumerate(self.differs[:end]) if differs and i >= first]
        for field, alike in self._alike.items():
            parts = [self._mine[field][i] for i in places]
            if (
                None not in parts
                and all(alike[i] for i in places)
                and len(set(map(repr, parts))) > 1
            ):
                return True
        return False

    def num_alike_after(self, first: int) -> int:
        """Return the number of distinct samples from ``first`` on that are equal on both ranks.

        Repeated samples count once: a separator between documents is equal wherever it occurs.
        """
        alike = [i for i in range(first, len(self.differs)) if not self.differs[i]]
        return len({repr([parts[i] for parts in self._mine.values()]) for i in alike})

    def come_together_after(self, first: int) -> bool:
        """Tell whether enough samples from ``first`` on are equal to rule out chance."""
        num_differing = sum(self.differs[first:])
        return self.num_alike_after(first) >= max(2, num_differing / _MOST_DIFFERING)


def is_same(one: list[Part | None], other: list[Part | None] | None) -> bool:
    """Tell whether a field is equal in all samples of two readings, within rounding."""
    if other is None or len(one) != len(other):
        return False
    return all(is_close(a, b) for a, b in zip(one, other, strict=True))


def is_close(one: Part | None, other: Part | None) -> bool:
    """Tell whether two summaries of a field are equal, floats within rounding."""
    if one is None or other is None:
        return one is other
    if one[0] != other[0]:
        return False
    if one[0] != "rough":
        return bool(one[1] == other[1])
    if len(one[1]) != len(other[1]):
        return False
    return all(
        x == y or (x != x and y != y) or math.isclose(x, y, rel_tol=_ROUGH, abs_tol=1e-6)
        for x, y in zip(one[1], other[1], strict=True)
    )
