"""The positions at which samples of two ranks differ, and whether the data may be the same.

Ranks that augment some samples, each with a seed of its own, differ in the same way in each
reading, as parts of a split stream do. Two things tell them from parts: a label or an id stays the
same where the rest of a sample differs, and samples in between are the same, one after another.
"""

from __future__ import annotations

import math
from typing import Any

Part = tuple[str, Any]  # its kind, and what is compared
SampleSummary = dict[str, Part]  # field -> what it is
FieldSummaries = dict[str, list[Part | None]]  # field -> what it is in each sample

_ROUGH = 1e-3  # relative difference of floating-point numbers that are taken for the same
_MOST_DIFFERING = 8  # samples that differ, for each of those that are the same in between


class Differences:
    """A comparison of samples of this rank with those of the main rank, place by place.

    Attributes:
        differs: whether some field differs, for each sample that both have.
    """

    def __init__(self, mine: FieldSummaries, theirs: FieldSummaries) -> None:
        """Compare the fields.

        Args: what this rank and the main rank saw in the fields to compare.
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
        """Tell whether a field is the same wherever samples differ, and not always one value.

        Args:
            first: number of the first sample that counts.
            end: number of the first after it that does not; None if all after it count.
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
        """Return how many samples are the same after one that differs, not counting repetitions.

        A separator between documents is the same on all ranks wherever it comes, and is one sample.
        """
        alike = [i for i in range(first, len(self.differs)) if not self.differs[i]]
        return len({repr([parts[i] for parts in self._mine.values()]) for i in alike})

    def come_together_after(self, first: int) -> bool:
        """Tell whether samples are the same again after one that differs, and not by chance."""
        num_differing = sum(self.differs[first:])
        return self.num_alike_after(first) >= max(2, num_differing / _MOST_DIFFERING)


def is_same(one: list[Part | None], other: list[Part | None] | None) -> bool:
    """Tell whether a field is the same in all samples of two readings."""
    if other is None or len(one) != len(other):
        return False
    return all(is_close(a, b) for a, b in zip(one, other, strict=True))


def is_close(one: Part | None, other: Part | None) -> bool:
    """Tell whether two summaries of a part agree."""
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
