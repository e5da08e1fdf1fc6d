"""Sizes of buckets, from the sizes of the model."""

from __future__ import annotations

import pytest

from dstrain.config import Facts, ModelFacts
from dstrain.config.memory.bucket_rule import BUCKET_ELEMENTS, SMALL_PARAMETER_ELEMENTS
from tests.unit.config.resolution.resolving import (
    LARGE_MODEL,
    MODEL,
    check_complete,
    resolved,
)

# --- sizes ---------------------------------------------------------------------------------------

BUCKETS = {
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", BUCKETS)
def test_sizes_are_derived_at_the_stages_that_use_them(name, stage):
    got = resolved(facts=Facts(model=MODEL), zero_stage=stage)
    assert (f"zero_optimization.{name}" in got.values) is (stage in BUCKETS[name])


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("model", [None, MODEL])
def test_auto_sizes_resolve_at_every_stage_with_and_without_a_model(stage, model):
    """``explain`` knows no model; a preset of another stage may be edited by hand."""
    config = {"zero_optimization": {"stage": stage, **dict.fromkeys(BUCKETS, "auto")}}
    check_complete(resolved(config, Facts(model=model)))


def test_buckets_hold_no_more_than_the_model_and_100_megabytes():
    """DeepSpeed's default of 5e8 elements is allocated whole, whatever the model's size; a larger
    parameter passes by the bucket."""
    small = resolved(facts=Facts(model=MODEL), zero_stage=3)
    assert small.values["zero_optimization.reduce_bucket_size"] == MODEL.num_trainable + 1
    large = resolved(facts=Facts(model=LARGE_MODEL), zero_stage=3)
    assert large.values["zero_optimization.reduce_bucket_size"] == BUCKET_ELEMENTS
    wide = ModelFacts(10**9, 10**9, largest=10, largest_vector=1)
    values = resolved(facts=Facts(model=wide), zero_stage=3).values
    assert values["zero_optimization.reduce_bucket_size"] == BUCKET_ELEMENTS


@pytest.mark.parametrize(
    ("largest_vector", "expected"), [(7, SMALL_PARAMETER_ELEMENTS), (20_000, 20_000)]
)
def test_norms_and_biases_stay_whole_at_stage_3(largest_vector, expected):
    model = ModelFacts(10**6, 10**6, 10**5, largest_vector)
    values = resolved(facts=Facts(model=model), zero_stage=3).values
    assert values["zero_optimization.stage3_param_persistence_threshold"] == expected


def test_an_explicit_size_stays():
    config = {"zero_optimization": {"reduce_bucket_size": 1e6}}
    got = resolved(config, Facts(model=LARGE_MODEL))
    assert got.values["zero_optimization.reduce_bucket_size"] == 1_000_000


def test_model_facts_of_shapes():
    facts = ModelFacts.of_shapes([((4, 3), True), ((5,), True), ((2, 3, 4), False), ((), True)])
    assert facts == ModelFacts(12 + 5 + 24 + 1, 12 + 5 + 1, largest=24, largest_vector=5)
