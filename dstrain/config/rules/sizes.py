"""Rules of communication sizes, from the shapes of the parameters."""

from __future__ import annotations

from dstrain.config.facts import ModelFacts
from dstrain.config.rules.rule import Binding, Derivation, Derived, View

# DeepSpeed's own default bucket (5e8 elements) is allocated whole, whatever the model's size; at
# 5e7 elements (100 MB in 16 bits) a bucket is already far above the size at which links saturate.
# A larger parameter passes by the bucket, uncopied and in one message (stage_1_and_2.py:
# extra_large_param_to_reduce; stage3.py: __add_grad_to_ipg_bucket), so nothing is won by making
# room for it: the embedding of a 70B model would cost GiBs of buffers.
BUCKET_ELEMENTS = 50_000_000
SMALL_PARAMETER_ELEMENTS = 10_000
KEPT_PARAMETER_ELEMENTS = 1_000_000


def _bucket(view: View) -> Derived | None:
    model = view.facts.model
    if model is None or view.stage == 0:
        return None
    return Derived(
        _even(min(model.num_trainable, BUCKET_ELEMENTS)),
        f"min(trainable {model.num_trainable:,}, {BUCKET_ELEMENTS:,}) elements, made even",
    )


def _even(elements: int) -> int:
    """Round up to an even number: DeepSpeed asserts it of the all-gather bucket (for NCCL)."""
    return max(2, elements + elements % 2)


def _prefetch(view: View) -> Derived | None:
    model = view.facts.model
    if model is None or view.stage < 3:
        return None
    return Derived(
        _even(min(model.num_parameters, BUCKET_ELEMENTS)),
        f"min(parameters {model.num_parameters:,}, {BUCKET_ELEMENTS:,}) elements, made even",
    )


def _persistence(view: View) -> Derived | None:
    model = view.facts.model
    if model is None or view.stage < 3:
        return None
    return Derived(_persistent_below(model), _persistent_how(model))


def _persistent_below(model: ModelFacts) -> int:
    return min(max(model.largest_vector, SMALL_PARAMETER_ELEMENTS), KEPT_PARAMETER_ELEMENTS)


def _persistent_how(model: ModelFacts) -> str:
    return (
        f"max(largest norm or bias {model.largest_vector:,}, {SMALL_PARAMETER_ELEMENTS:,}) "
        "elements: cheaper kept than gathered"
    )


RULES: tuple[Binding | Derivation, ...] = (
    Derivation(
        "zero_optimization.reduce_bucket_size",
        "the model's size, at most 5e7 elements",
        (),
        _bucket,
    ),
    Derivation(
        "zero_optimization.allgather_bucket_size",
        "the model's size, at most 5e7 elements",
        (),
        lambda view: _bucket(view) if view.stage in (1, 2) else None,
    ),
    Derivation(
        "zero_optimization.stage3_prefetch_bucket_size",
        "the model's size, at most 5e7 elements",
        (),
        _prefetch,
    ),
    Derivation(
        "zero_optimization.stage3_param_persistence_threshold",
        "the largest one-dimensional parameter, at least 1e4 elements",
        (),
        _persistence,
    ),
)
