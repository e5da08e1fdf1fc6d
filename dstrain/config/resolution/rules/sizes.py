"""Rules of communication sizes, from the shapes of the parameters."""

from __future__ import annotations

from collections.abc import Callable

from dstrain.config.memory import bucket_rule
from dstrain.config.memory.bucket_rule import BucketSize
from dstrain.config.memory.sizes import ModelFacts
from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View


def _sized(
    size: Callable[[ModelFacts, int], BucketSize | None],
) -> Callable[[View], Derived | None]:
    """Return a rule that computes a size by ``size`` if the model's sizes are known."""

    def derive(view: View) -> Derived | None:
        model = view.facts.model
        found = None if model is None else size(model, view.stage)
        return None if found is None else Derived(found.elements, found.formula)

    return derive


RULES: tuple[Binding | Derivation, ...] = (
    Derivation(
        "zero_optimization.reduce_bucket_size",
        "the model's size, at most 5e7 elements",
        (),
        _sized(bucket_rule.reduce_bucket),
    ),
    Derivation(
        "zero_optimization.allgather_bucket_size",
        "the model's size, at most 5e7 elements",
        (),
        _sized(bucket_rule.allgather_bucket),
    ),
    Derivation(
        "zero_optimization.stage3_prefetch_bucket_size",
        "the model's size, at most 5e7 elements",
        (),
        _sized(bucket_rule.prefetch_bucket),
    ),
    Derivation(
        "zero_optimization.stage3_param_persistence_threshold",
        "the largest one-dimensional parameter, at least 1e4 elements",
        (),
        _sized(bucket_rule.persistence_threshold),
    ),
)
