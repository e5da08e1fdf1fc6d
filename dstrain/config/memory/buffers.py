"""Bytes of communication buffers on the accelerator, at every stage."""

from __future__ import annotations

from dstrain.config.memory.placement import Buckets, Placement, Work
from dstrain.config.memory.sizes import ModelSizes

STAGE_0_BUFFER_ELEMENTS = 500_000_000
"""``engine.py:buffered_allreduce_fallback`` copies at most this many gradients at once."""


def reduction_bytes(
    sizes: ModelSizes, work: Work, placement: Placement, buckets: Buckets
) -> tuple[int, int]:
    """Return bytes of gradient communication: of buffers held in backward, and of a passing copy.

    Stages 1-2 hold the contiguous bucket, two of them with overlap (``setup_buckets``), and copy
    what it is filled with (``allreduce_bucket``). Stage 3 copies what its standing bucket is filled
    with (``coalesced_collectives.py:reduce_scatter_coalesced``), and stage 0 its gradients
    (``engine.py:allreduce_bucket``).
    """
    filled = min(buckets.reduce, sizes.facts.num_trainable)
    if placement.stage == 0:
        most = min(sizes.facts.num_trainable, STAGE_0_BUFFER_ELEMENTS)
        return 0, most * work.width
    if placement.stage == 3:
        return 0, filled * work.width
    return buckets.reduce * (2 if buckets.overlap else 1) * work.width, filled * work.width


def unfilled(sizes: ModelSizes, buckets: Buckets) -> float:
    """Return how much of backward is left, from 0 to 1, when the first bucket is full."""
    return max(0.0, 1 - buckets.reduce / max(1, sizes.facts.num_trainable))


def gathered_bytes(
    sizes: ModelSizes, work: Work, placement: Placement, buckets: Buckets
) -> tuple[int, int]:
    """Return bytes of whole parameters at stage 3 beside persistent ones, and of their buffer.

    ``partitioned_param_coordinator.py:__params_to_release`` keeps what is used again within
    ``max_reuse_distance`` elements, which at the end of forward is the last half of that many; then
    come the module in use and the prefetched ones. These arrive in a flat buffer
    (``partition_parameters.py:AllGatherCoalescedHandle``) that lives until the last of them is
    used, so it is alive in the last layer. One rank alone uses its partition in place.
    """
    if placement.stage < 3 or (work.world_size == 1 and placement.parameters == "none"):
        return 0, 0
    total = sizes.elements() - sizes.elements_up_to(buckets.persistence)
    kept = min(buckets.max_reuse // 2, buckets.max_live)
    prefetched = min(total, buckets.prefetch, buckets.max_live)
    gathered = min(total, kept + sizes.facts.largest + prefetched)
    return gathered * work.width, prefetched * work.width if work.world_size > 1 else 0
