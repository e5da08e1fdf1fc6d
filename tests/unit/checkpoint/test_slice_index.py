"""The index of the slices in a checkpoint's files."""

from __future__ import annotations

from dstrain.checkpoint.slice_index import SliceIndex
from dstrain.checkpoint.slice_table import Run, SliceTable
from dstrain.engine import MASTER


def test_missing_elements_are_counted_between_overlapping_pieces(tmp_path):
    runs = [Run(0, 4, 0, 0), Run(2, 4, 1, 0), Run(8, 2, 2, 0)]
    index = SliceIndex(
        tmp_path, SliceTable(3, ((MASTER,),), {}, {"w": runs}), {"w": (12,), "v": (3,)}
    )
    assert index.missing(MASTER, "w", 0, 12) == 4
    assert index.missing(MASTER, "w", 1, 6) == 0
    assert index.missing(MASTER, "v", 0, 3) == 3
