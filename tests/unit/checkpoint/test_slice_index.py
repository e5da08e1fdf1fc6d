"""The index of the slices in a checkpoint's files."""

from __future__ import annotations

from dstrain.checkpoint.slice_index import Piece, SliceIndex
from dstrain.engine import MASTER


def test_missing_elements_are_counted_between_overlapping_pieces(tmp_path):
    pieces = [Piece(0, 4, tmp_path), Piece(2, 4, tmp_path), Piece(8, 2, tmp_path)]
    index = SliceIndex({(MASTER, "w"): pieces}, {})
    assert index.missing(MASTER, "w", 0, 12) == 4
    assert index.missing(MASTER, "w", 1, 6) == 0
    assert index.missing(MASTER, "v", 0, 3) == 3
