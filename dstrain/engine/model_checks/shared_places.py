"""Comparison of the memory that two tensors occupy, element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Number of memory places that are compared at once.
_MARKED = 2**22


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether two tensors share memory; ``first`` must begin at the lower address."""
    distance = second.data_ptr() - first.data_ptr()
    unit = math.gcd(first.element_size(), second.element_size(), distance)
    return _intersect(
        _Lattice.of(first, 0, unit=unit), _Lattice.of(second, distance // unit, unit=unit)
    )


@dataclass(frozen=True)
class _Lattice:
    """A set of memory places that a tensor's elements occupy.

    Attributes:
        start: the first place.
        dims: size and stride of each dimension with more than one place.
    """

    start: int
    dims: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, start: int, *, unit: int) -> _Lattice:
        """Return the places of a tensor.

        Args:
            tensor: the tensor.
            start: place of its first element.
            unit: bytes per place; divides the size of an element, which may span several places.
        """
        units = tensor.element_size() // unit
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        dims = [(size, stride * units) for size, stride in steps]
        return cls(start, tuple((n, step) for n, step in [*dims, (units, 1)] if n > 1 and step))

    @property
    def span(self) -> int:
        """Count the places from the first element to the last."""
        return sum((size - 1) * stride for size, stride in self.dims) + 1

    def halves(self) -> tuple[_Lattice, _Lattice]:
        """Split the dimension with the largest stride into two halves."""
        widest = max(self.dims, key=lambda dim: dim[1])
        size, stride = widest
        at = self.dims.index(widest)
        first, second = (
            tuple(
                (n, step)
                for n, step in (*self.dims[:at], (part, stride), *self.dims[at + 1 :])
                if n > 1
            )
            for part in (size // 2, size - size // 2)
        )
        return _Lattice(self.start, first), _Lattice(self.start + size // 2 * stride, second)

    def mark(self, marks: torch.Tensor, start: int) -> torch.Tensor:
        """Return a view of the elements of ``marks`` that stand for these places.

        Args:
            marks: one element per place.
            start: place for which the first element of ``marks`` stands.
        """
        sizes = [size for size, _ in self.dims]
        return marks.as_strided(sizes, [stride for _, stride in self.dims], self.start - start)


def _intersect(first: _Lattice, second: _Lattice) -> bool:
    """Tell whether two lattices have a place in common.

    Splits them into pieces of at most ``_MARKED`` places, and compares the pieces whose ranges
    overlap by marking their places. The time grows with the number of places, the memory does not.
    """
    pairs = [(first, second)]
    while pairs:
        a, b = pairs.pop()
        if a.start + a.span <= b.start or b.start + b.span <= a.start:
            continue
        common = math.gcd(*(stride for _, stride in (*a.dims, *b.dims)))
        if common > 1 and (b.start - a.start) % common:
            continue  # they alternate, as the even and the odd elements of a tensor
        wider, other = (a, b) if a.span >= b.span else (b, a)
        if wider.span > _MARKED:
            pairs += [(half, other) for half in wider.halves()]
            continue
        start = min(a.start, b.start)
        marks = torch.zeros(max(a.start + a.span, b.start + b.span) - start, dtype=torch.bool)
        a.mark(marks, start).fill_(True)
        if b.mark(marks, start).any():
            return True
    return False
