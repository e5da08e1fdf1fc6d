"""Agreement of all ranks on the table of a checkpoint's slices, when it is written.

No rank is sent what every rank holds. The main rank says how its own file looks; each rank compares
its file with that and with the rule of ZeRO stage 3, and reports what differs. So each rank
exchanges bytes in proportion to the number of parameters, whatever the number of ranks. The main
rank also receives the runs that follow no rule: at stages 0 to 2 about as many as there are
parameters and ranks together, at stage 3 none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.checkpoint.slice_table import (
    Kind,
    MergedScalars,
    Numbering,
    Numbers,
    RankSlices,
    Run,
    SliceTable,
    even_run,
    table_of,
)
from dstrain.core.ranks import Ranks, broadcast_object, is_distributed

_NOTHING = -1


@dataclass(frozen=True)
class Reference:
    """The main rank's slices; it has the first partition of each parameter that follows the rule.

    Attributes:
        kinds: combinations of keys that its parameters have.
        kind_of: index of the kind of each parameter, in sorted order; -1 without slices.
        numbers: the single numbers that its parameters have.
        numbers_of: index into ``numbers`` of each parameter, or -1.
    """

    kinds: tuple[Kind, ...] = ()
    kind_of: tuple[int, ...] = ()
    numbers: tuple[Numbers, ...] = ()
    numbers_of: tuple[int, ...] = ()

    def scalars(self, place: int) -> Numbers | None:
        """Return the single numbers of a parameter; None where the main rank has none."""
        number = self.numbers_of[place]
        return None if number == _NOTHING else self.numbers[number]


def agree_on_table(
    mine: RankSlices,
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Ranks,
    *,
    group: Any = None,
    on_all: bool = False,
) -> SliceTable | None:
    """Make the table of all ranks' slices; a collective of the ranks in ``group``.

    Args:
        mine: the slices that this rank writes.
        shapes: of all parameters, the same on all ranks.
        ranks: facts of this process.
        group: a process group of all ranks for tensors in host memory.
        on_all: whether all ranks need the table.

    Returns:
        the table on the main rank; on the others None, unless all need it.
    """
    if not is_distributed():
        return table_of([(ranks.rank, mine)], shapes, ranks.world_size)
    agreement = Agreement(mine, shapes, ranks.rank, ranks.world_size)
    reference = agreement.reference() if ranks.is_main else Reference()
    reference = broadcast_object(reference, group=group)
    by_rule = agreement.follow(reference)
    torch.distributed.all_reduce(by_rule, torch.distributed.ReduceOp.MIN, group=group)
    follow = by_rule.bool().tolist()
    reports = _send_to_main(agreement.report(reference, follow), group=group)
    table = None if reports is None else agreement.merged(reference, reports, follow)
    return broadcast_object(table, group=group) if on_all else table


class Agreement:
    """Makes one rank's report, and the main rank's table of all reports; exchanges nothing."""

    def __init__(
        self,
        mine: RankSlices,
        shapes: Mapping[str, tuple[int, ...]],
        rank: int,
        world_size: int,
    ) -> None:
        """Begin with the slices that a rank writes, and the shapes of all parameters."""
        self._mine, self._shapes = mine, shapes
        self._rank, self._world_size = rank, world_size
        self._names = sorted(shapes)

    def reference(self) -> Reference:
        """Return how this rank's file looks; asked of the main rank."""
        kinds, kind_of = Numbering[Kind](), []
        numbers, numbers_of = Numbering[str](), []
        for name in self._names:
            keys, found = self._mine.keys.get(name), self._mine.scalars.get(name)
            kind_of.append(_NOTHING if keys is None else kinds.number(keys))
            text = None if found is None else json.dumps(found, sort_keys=True)
            numbers_of.append(_NOTHING if text is None else numbers.number(text))
        distinct = tuple(json.loads(text) for text in numbers.all())
        return Reference(kinds.all(), tuple(kind_of), distinct, tuple(numbers_of))

    def follow(self, reference: Reference) -> torch.Tensor:
        """Return 1 for each parameter that this rank has as ``even_run`` and the main rank say."""
        mine, rank, world_size = self._mine, self._rank, self._world_size

        def follows(name: str, kind: int) -> bool:
            if kind == _NOTHING:
                return False
            span = even_run(torch.Size(self._shapes[name]).numel(), world_size, rank)
            if name not in mine.spans:
                return span[1] == 0
            return mine.spans[name] == span and mine.keys[name] == reference.kinds[kind]

        pairs = zip(self._names, reference.kind_of, strict=True)
        return torch.tensor([follows(name, kind) for name, kind in pairs], dtype=torch.uint8)

    def report(self, reference: Reference, follow: Sequence[bool]) -> bytes:
        """Return this rank's runs that follow no rule, and its numbers that the main rank lacks.

        Args:
            reference: of the main rank.
            follow: whether all ranks have a parameter by the rule.
        """
        mine, kinds = self._mine, Numbering[Kind]()
        runs = [
            (place, *mine.spans[name], kinds.number(mine.keys[name]))
            for place, (name, by_rule) in enumerate(zip(self._names, follow, strict=True))
            if not by_rule and name in mine.spans
        ]
        numbers = {
            place: mine.scalars[name]
            for place, name in enumerate(self._names)
            if name in mine.scalars and mine.scalars[name] != reference.scalars(place)
        }
        if not runs and not numbers:
            return b""
        return json.dumps({"kinds": kinds.all(), "runs": runs, "numbers": numbers}).encode()

    def merged(
        self, reference: Reference, reports: Sequence[bytes], follow: Sequence[bool]
    ) -> SliceTable:
        """Return the table that the reports of all ranks make."""
        names, kinds = self._names, Numbering[Kind](reference.kinds)
        runs: dict[str, list[Run]] = {}
        scalars = MergedScalars()
        ours = ((name, reference.scalars(place)) for place, name in enumerate(names))
        scalars.add({name: numbers for name, numbers in ours if numbers is not None})
        for rank, report in enumerate(reports):
            if not report:
                continue
            document = json.loads(report)
            theirs = [kinds.number(tuple(keys)) for keys in document["kinds"]]
            for place, start, numel, kind in document["runs"]:
                runs.setdefault(names[place], []).append(Run(start, numel, rank, theirs[kind]))
            scalars.add({names[int(place)]: found for place, found in document["numbers"].items()})
        for found in runs.values():
            found.sort()
        rows = zip(names, follow, reference.kind_of, strict=True)
        even = {name: kind for name, by_rule, kind in rows if by_rule}
        return SliceTable(self._world_size, kinds.all(), even, runs, scalars.merged)


def _send_to_main(data: bytes, *, group: Any) -> list[bytes] | None:
    """Send bytes of every rank to the main rank; a collective of all ranks in ``group``.

    Each message takes its own size: a gather would pad all of them to the largest one.

    Args:
        data: the message; nothing is sent where it is empty.
        group: a process group of all ranks for tensors in host memory.

    Returns:
        the messages in rank order on the main rank; None on all others.
    """
    if not is_distributed():
        return [data]
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.int64)
    sizes[rank] = len(data)
    dist.all_reduce(sizes, group=group)
    if rank:
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group=group)
        return None
    received = [data]
    for sender, size in enumerate(sizes.tolist()[1:], start=1):
        message = torch.empty(size, dtype=torch.uint8)
        if size:
            dist.recv(message, sender, group=group)
        received.append(message.numpy().tobytes())
    return received
