"""Rules for the sizes of DeepSpeed's communication buffers, from the parameters' shapes alone.

The resolver writes these sizes into the config, and the planner counts their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.config.memory.placement import Buckets
from dstrain.config.memory.sizes import ModelFacts

# DeepSpeed allocates a bucket whole, whatever the size of the model (5e8 elements by default). A
# bucket of 5e7 elements (100 MB in 16 bits) is far above the size at which links saturate. A larger
# parameter is not copied to the bucket but sent in one message (stage_1_and_2.py:
# extra_large_param_to_reduce; stage3.py: __add_grad_to_ipg_bucket), so the bucket needs no room for
# it: for the embedding of a 70B model that would be GiBs.
BUCKET_ELEMENTS = 50_000_000
SMALL_PARAMETER_ELEMENTS = 10_000
KEPT_PARAMETER_ELEMENTS = 1_000_000


@dataclass(frozen=True)
class BucketSize:
    """Size of a bucket in elements, and its formula with numbers."""

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
    """Return how many elements of parameters stage 3 gathers ahead of their use; None below it."""
    if stage < 3:
        return None
    return BucketSize(
        _even(min(model.num_parameters, BUCKET_ELEMENTS)),
        f"min(parameters {model.num_parameters:,}, {BUCKET_ELEMENTS:,}) elements, made even",
    )


def persistence_threshold(model: ModelFacts, stage: int) -> BucketSize | None:
    """Return the size of the largest parameter that stage 3 keeps gathered; None below it."""
    if stage < 3:
        return None
    return BucketSize(
        min(max(model.largest_vector, SMALL_PARAMETER_ELEMENTS), KEPT_PARAMETER_ELEMENTS),
        f"max(largest norm or bias {model.largest_vector:,}, {SMALL_PARAMETER_ELEMENTS:,}) "
        "elements: cheaper kept than gathered",
    )


def derived_buckets(model: ModelFacts, stage: int) -> Buckets:
    """Return the sizes that a config gets if the user sets none."""
    usual = Buckets()

    def elements(size: BucketSize | None, default: int) -> int:
        return default if size is None else size.elements

    return Buckets(
        reduce=elements(reduce_bucket(model, stage), usual.reduce),
        prefetch=elements(prefetch_bucket(model, stage), usual.prefetch),
        persistence=elements(persistence_threshold(model, stage), usual.persistence),
    )


def _even(elements: int) -> int:
    """Round up to an even number, which DeepSpeed requires of the all-gather bucket (for NCCL)."""
    return max(2, elements + elements % 2)
