"""Ranks that write a checkpoint, grouped by the folder into which they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.checkpoint import content
from dstrain.checkpoint.policy import Policy
from dstrain.core.files import FileRecord
from dstrain.core.ranks import Ranks, gather_objects


@dataclass(frozen=True)
class Writers:
    """Ranks that write a checkpoint, grouped by the folder into which they write.

    Attributes:
        ranks: rank facts of this process among all ranks.
        sharers: rank facts among the ranks that write into the same folder; their main rank writes
            the files that each folder has once.
        groups: the ranks of each folder.
        first: the first rank that writes into this rank's folder.
    """

    ranks: Ranks
    sharers: Ranks
    groups: tuple[tuple[int, ...], ...]
    first: int

    @classmethod
    def of(cls, policy: Policy, ranks: Ranks) -> Writers:
        """Gather which ranks share a folder; a collective of all ranks."""
        first = ranks.first_on_machine if policy.on_each_node else 0
        firsts = gather_objects(first)
        groups = tuple(
            tuple(rank for rank, other in enumerate(firsts) if other == folder)
            for folder in sorted(set(firsts))
        )
        return cls(ranks, ranks.on_machine() if policy.on_each_node else ranks, groups, first)


def files_by_folder(
    parts: Sequence[tuple[int, dict[str, FileRecord]]], folder: int
) -> tuple[dict[str, FileRecord], dict[str, FileRecord]]:
    """Split records of files into those of a folder and those of other machines' folders.

    Args:
        parts: for each rank, the first rank of its folder and the records of its files.
        folder: the first rank of the folder.
    """
    files: dict[str, FileRecord] = {}
    elsewhere: dict[str, FileRecord] = {}
    for first, records in parts:
        if first == folder:
            files |= records
        else:
            elsewhere |= {n: r for n, r in records.items() if content.is_rank_file(n)}
    return files, elsewhere
