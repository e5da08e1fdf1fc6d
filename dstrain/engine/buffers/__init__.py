"""Buffers of a module: detection of those that training changes, and their broadcast."""

from dstrain.engine.buffers.slots import Slot, empty_slots_of, slots_of
from dstrain.engine.buffers.tracked import Buffers, checksum, main_rank_buffers

__all__ = [
    "Buffers",
    "Slot",
    "checksum",
    "empty_slots_of",
    "main_rank_buffers",
    "slots_of",
]
