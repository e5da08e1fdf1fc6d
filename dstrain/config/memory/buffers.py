"""Bytes of communication buffers on the accelerator, at every stage."""

from __future__ import annotations

from dstrain.config.memory.placement import Buckets, Placement, Work
from dstrain.config.memory.sizes import ModelSizes

STAGE_0_BUFFER_ELEMENTS = 500_000_000
"""Most gradients that ``engine.py:buffered_allreduce_fallback`` copies at once."""


def reduction_bytes(
    sizes: ModelSizes, work: Work, placement: Placement, buckets: Buckets
) -> tuple[int, int]:
    """Return bytes of buffers that last through backward, and bytes of a copy for each reduction.

    Stages 1-2 keep a contiguous bucket, with overlap two (``setup_buckets``), and copy its filled
    part (``allreduce_bucket``). Stage 3 copies the filled part of its bucket, which is counted
    among the states (``coalesced_collectives.py:reduce_scatter_coalesced``). Stage 0 copies
    gradients (``engine.py:allreduce_bucket``).
    """
    filled = min(buckets.reduce, sizes.facts.num_trainable)
    if placement.stage == 0:
        most = min(sizes.facts.num_trainable, STAGE_0_BUFFER_ELEMENTS)
        return 0, most * work.width
    if placement.stage == 3:
        return 0, filled * work.width
    return buckets.reduce * (2 if buckets.overlap else 1) * work.width, filled * work.width


def unfilled(sizes: ModelSizes, buckets: Buckets) -> float:
    """Return the share of backward, 0 to 1, that follows the first full bucket."""
    return max(0.0, 1 - buckets.reduce / max(1, sizes.facts.num_trainable))


def gathered_bytes(
    sizes: ModelSizes, work: Work, placement: Placement, buckets: Buckets
) -> tuple[int, int]:
    """Return bytes of gathered parameters at stage 3, without persistent ones, and of a buffer.

    Gathered are parameters that are used again within ``max_reuse_distance`` elements
    (``partitioned_param_coordinator.py:__params_to_release``), which at the end of forward are the
    last ``max_reuse_distance / 2`` elements; the parameters of the module in use; and prefetched
    ones. Prefetched parameters arrive in a flat buffer
    (``partition_parameters.py:AllGatherCoalescedHandle``) that is freed when the last of them is
    used, so that it exists in the last layer. A single rank uses its partition in place.
    """
    if placement.stage < 3 or (work.world_size == 1 and placement.parameters == "none"):
        return 0, 0
    total = sizes.elements() - sizes.elements_up_to(buckets.persistence)
    kept = min(buckets.max_reuse // 2, buckets.max_live)
    prefetched = min(total, buckets.prefetch, buckets.max_live)
    gathered = min(total, kept + sizes.facts.largest + prefetched)
    return gathered * work.width, prefetched * work.width if work.world_size > 1 else 0
