"""Rules for the sizes of DeepSpeed's communication buffers, from the parameters' shapes alone.

The resolver writes these sizes into the config, and the planner counts their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.config.memory.placement import Buckets
from dstrain.config.memory.sizes import ModelFacts

# DeepSpeed's own default bucket (5e8 elements) is allocated whole, whatever the model's size; at
# 5e7 elements (100 MB in 16 bits) a bucket is already far above the size at which links saturate.
# A larger parameter passes by the bucket, uncopied and in one message (stage_1_and_2.py:
# extra_large_param_to_reduce; stage3.py: __add_grad_to_ipg_bucket), so nothing is won by making
# room for it: the embedding of a 70B model would cost GiBs of buffers.
BUCKET_ELEMENTS = 50_000_000
SMALL_PARAMETER_ELEMENTS = 10_000
KEPT_PARAMETER_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class BucketSize:
    """A size in elements, and the formula with its numbers."""

    elements: int
    formula: str


def reduce_bucket(model: ModelFacts, stage: int) -> BucketSize | None:
    """Return the size of the bucket in which gradients are reduced; None without ZeRO."""
    if stage == 0:
        return None
    return BucketSize(
        _even(min(model.num_trainable, BUCKET_ELEMENTS)),
        f"min(trainable {model.num_trainable:,}, {BUCKET_ELEMENTS:,}) elements, made even",
    )


def allgather_bucket(model: ModelFacts, stage: int) -> BucketSize | None:
    """Return the size of the bucket in which updated weights are gathered at stages 1 and 2."""
    return reduce_bucket(model, stage) if stage in (1, 2) else None


def prefetch_bucket(model: ModelFacts, stage: int) -> BucketSize | None:
    """Return the size of the parameters that stage 3 gathers ahead of their use."""
    if stage < 3:
        return None
    return BucketSize(
        _even(min(model.num_parameters, BUCKET_ELEMENTS)),
        f"min(parameters {model.num_parameters:,}, {BUCKET_ELEMENTS:,}) elements, made even",
    )


def persistence_threshold(model: ModelFacts, stage: int) -> BucketSize | None:
    """Return the size up to which stage 3 leaves parameters gathered."""
    if stage < 3:
        return None
    return BucketSize(
        min(max(model.largest_vector, SMALL_PARAMETER_ELEMENTS), KEPT_PARAMETER_ELEMENTS),
        f"max(largest norm or bias {model.largest_vector:,}, {SMALL_PARAMETER_ELEMENTS:,}) "
        "elements: cheaper kept than gathered",
    )


def derived_buckets(model: ModelFacts, stage: int) -> Buckets:
    """Return the sizes that a config gets where the user sets none of them."""
    usual = Buckets()

    def elements(size: BucketSize | None, default: int) -> int:
        return default if size is None else size.elements

    return Buckets(
        reduce=elements(reduce_bucket(model, stage), usual.reduce),
        prefetch=elements(prefetch_bucket(model, stage), usual.prefetch),
        persistence=elements(persistence_threshold(model, stage), usual.persistence),
    )


def _even(elements: int) -> int:
    """Round up to an even number: DeepSpeed asserts it of the all-gather bucket (for NCCL)."""
    return max(2, elements + elements % 2)
