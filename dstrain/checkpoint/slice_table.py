"""The table of a checkpoint's slices: which rank's file has which run of which parameter.

ZeRO stage 3 divides every parameter over all ranks by one rule, and a table of 4,096 ranks and
100,000 parameters would have 400 million entries if it listed what the rule says. So it lists the
parameters that follow the rule, and runs only of the others: its size grows with the number of
parameters plus the number of ranks, at every stage.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from dstrain.engine import MASTER, WEIGHT

Numbers = Mapping[str, Any]
Kind = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class RankSlices:
    """The slices in one rank's file.

    Attributes:
        spans: parameter -> (start, number of elements) in the flattened parameter.
        keys: parameter -> sorted keys of its tensors, such as "exp_avg" and "master".
        scalars: parameter -> single numbers of its optimizer state.
    """

    spans: Mapping[str, tuple[int, int]]
    keys: Mapping[str, Kind]
    scalars: Mapping[str, Numbers]

    @classmethod
    def of(
        cls,
        tensors: Iterable[str],
        spans: Mapping[str, tuple[int, int]],
        scalars: Mapping[str, Numbers],
    ) -> RankSlices:
        """Sort out the tensors of a file, which are named "<key>/<parameter>"."""
        keys: dict[str, list[str]] = {}
        for tensor in tensors:
            key, _, name = tensor.partition("/")
            if spans[name][1]:
                keys.setdefault(name, []).append(key)
        sorted_keys = {name: tuple(sorted(found)) for name, found in keys.items()}
        return cls({name: spans[name] for name in keys}, sorted_keys, scalars)


class Run(NamedTuple):
    """A run of a flattened parameter in the file of one rank.

    Attributes:
        start: its first element.
        numel: number of elements.
        rank: whose file has it.
        kind: index of its keys in ``SliceTable.kinds``.
    """

    start: int
    numel: int
    rank: int
    kind: int


@dataclass(frozen=True)
class SliceTable:
    """The slices of all ranks.

    Attributes:
        world_size: number of ranks that have files.
        kinds: the combinations of keys that parameters have.
        even: parameter -> index of its kind, for those that ``even_run`` divides over all ranks.
        runs: parameter -> its runs in order of their start, for all others.
        scalars: parameter -> single numbers of its optimizer state; equal ones are one object.
    """

    world_size: int
    kinds: tuple[Kind, ...] = ()
    even: Mapping[str, int] = field(default_factory=dict)
    runs: Mapping[str, Sequence[Run]] = field(default_factory=dict)
    scalars: Mapping[str, Numbers] = field(default_factory=dict)

    def of_rank(self, rank: int, shapes: Mapping[str, tuple[int, ...]]) -> RankSlices:
        """Return the slices in the file of one rank; the time grows with the parameters."""
        spans: dict[str, tuple[int, int]] = {}
        keys: dict[str, Kind] = {}
        for name, kind in self.even.items():
            span = even_run(_numel(shapes[name]), self.world_size, rank)
            if span[1]:
                spans[name], keys[name] = span, self.kinds[kind]
        for name, run in self._runs_of_ranks.get(rank, {}).items():
            spans[name], keys[name] = (run.start, run.numel), self.kinds[run.kind]
        return RankSlices(spans, keys, {n: s for n, s in self.scalars.items() if n in spans})

    @cached_property
    def _runs_of_ranks(self) -> dict[int, dict[str, Run]]:
        """Return the listed runs by rank and parameter."""
        found: dict[int, dict[str, Run]] = {}
        for name, runs in self.runs.items():
            for run in runs:
                found.setdefault(run.rank, {})[name] = run
        return found


def even_run(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return (start, number of elements) of a rank's partition as ZeRO stage 3 divides.

    All partitions have the size of the first one but the last, which ends with the parameter;
    ranks behind it have none (DeepSpeed's ``partition_parameters.py:_partition_param``).
    """
    size = -(-numel // world_size)
    start = min(rank * size, numel)
    return start, min(size, numel - start)


def table_of(
    parts: Iterable[tuple[int, RankSlices]],
    shapes: Mapping[str, tuple[int, ...]],
    world_size: int,
) -> SliceTable:
    """Make the table of ranks' slices.

    Args:
        parts: rank and slices, each rank at most once.
        shapes: of all parameters.
        world_size: number of ranks; one that ``parts`` leave out has no file.
    """
    kinds = Numbering[Kind]()
    met: set[int] = set()
    even: dict[str, int] = {}  # parameters that all ranks so far have by the rule
    runs: dict[str, list[Run]] = {}
    scalars = MergedScalars()
    names = [(name, _numel(shape)) for name, shape in shapes.items()]
    for rank, mine in parts:
        for name, numel in names:
            span = mine.spans.get(name, (0, 0))
            kind = kinds.number(mine.keys[name]) if span[1] else -1
            by_rule = even_run(numel, world_size, rank)
            follows = (span == by_rule or not (span[1] or by_rule[1])) and name not in runs
            if follows and (kind == -1 or even.setdefault(name, kind) == kind):
                continue
            if name not in runs:  # what earlier ranks have by the rule is listed from now on
                runs[name] = _by_rule(numel, world_size, met, even.pop(name, -1))
            if span[1]:
                runs[name].append(Run(*span, rank, kind))
        met.add(rank)
        scalars.add(mine.scalars)
    if len(met) < world_size:
        for name, numel in names:
            if name in even:
                runs[name] = _by_rule(numel, world_size, met, even.pop(name))
    for found in runs.values():
        found.sort()
    return SliceTable(world_size, kinds.all(), even, runs, scalars.merged)


def _by_rule(numel: int, world_size: int, ranks: Iterable[int], kind: int) -> list[Run]:
    if kind == -1:
        return []
    spans = ((even_run(numel, world_size, rank), rank) for rank in ranks)
    return [Run(*span, rank, kind) for span, rank in spans if span[1]]


class Numbering(Generic[T]):
    """Numbers distinct values in the order in which they are met."""

    def __init__(self, values: Iterable[T] = ()) -> None:
        """Begin with values that have numbers."""
        self._numbers = {value: number for number, value in enumerate(values)}

    def number(self, value: T) -> int:
        """Return the number of a value."""
        return self._numbers.setdefault(value, len(self._numbers))

    def all(self) -> tuple[T, ...]:
        """Return all values in the order of their numbers."""
        return tuple(self._numbers)


class MergedScalars:
    """The single numbers of parameters, merged from several ranks; the largest one counts.

    Numbers differ only where a rank has never stepped its part of a parameter.

    Attributes:
        merged: parameter -> numbers; equal ones are one object.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.merged: dict[str, Numbers] = {}
        self._shared: dict[str, Numbers] = {}

    def add(self, scalars: Mapping[str, Numbers]) -> None:
        """Add the numbers of one rank."""
        for name, numbers in scalars.items():
            present = self.merged.get(name)
            if present is not None and present != numbers:
                larger = {
                    key: max(value, present.get(key, value)) for key, value in numbers.items()
                }
                numbers = {**present, **larger}
            if present is None or present != numbers:
                self.merged[name] = self._shared.setdefault(repr(sorted(numbers.items())), numbers)


def uncovered(
    table: SliceTable,
    shapes: Mapping[str, tuple[int, ...]],
    optimized: Container[str],
    *,
    ignore_copies: bool,
) -> Iterator[str]:
    """Yield a line for each parameter of which elements are in no file, or in several.

    The time grows with the number of parameters plus that of listed runs.

    Args:
        table: of all slices.
        shapes: of all parameters.
        optimized: names of the parameters that have master weights.
        ignore_copies: whether elements may be in several files.
    """
    for name, shape in shapes.items():
        if name in table.even:
            continue
        numel = _numel(shape)
        runs = table.runs.get(name, ())
        keys = dict.fromkeys(key for run in runs for key in table.kinds[run.kind])
        for key in keys or [MASTER if name in optimized else WEIGHT]:
            found = [run for run in runs if key in table.kinds[run.kind]]
            missing = count_missing(found, 0, numel)
            there = sum(run.numel for run in found)
            if missing:
                yield f"{key} of {name}: {missing} of {numel} elements are in no file"
            elif there > numel and not ignore_copies:
                yield f"{key} of {name}: {there - numel} elements are there twice or more"


def count_missing(runs: Iterable[Any], start: int, stop: int) -> int:
    """Count the elements from ``start`` to ``stop`` that no run has; runs in order of their start.

    Args:
        runs: anything with ``start`` and ``numel``.
        start: the first element that counts.
        stop: the end of those that count.
    """
    reached, missing = start, 0
    for run in runs:
        low, high = max(run.start, reached), min(run.start + run.numel, stop)
        if low < high:
            missing += low - reached
            reached = high
    return missing + stop - reached


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
