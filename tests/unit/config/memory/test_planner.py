"""The choice between stages and offloads: the fastest that fits, with its reason."""

from __future__ import annotations

import json

import pytest

from dstrain.config import ModelFacts
from dstrain.config.memory.activations import Batch
from dstrain.config.memory.bucket_rule import derived_buckets
from dstrain.config.memory.closed_forms import closed_form
from dstrain.config.memory.footprint import GIB
from dstrain.config.memory.placement import Buckets, Placement, Work
from dstrain.config.memory.planner import (
    ORDER,
    SHOWN,
    Choice,
    Limits,
    Plan,
    fastest_choice,
    plan,
)
from dstrain.config.memory.report import as_dict
from dstrain.config.memory.sizes import ModelSizes

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TB = 10**12


def sizes() -> ModelSizes:
    found = closed_form(LLAMA_8B)
    assert found is not None
    return found


def planned(gpu_gib: float, *, ranks: int = 8, host: int | None = TB, nvme: int | None = None,
            **batch: bool) -> Plan:  # fmt: skip
    limits = Limits(int(gpu_gib * GIB), host, nvme)
    return plan(sizes(), Work(ranks), Batch(1, 2048, 2, **batch), limits)


def test_every_choice_has_a_row_and_stage_0_is_shown_but_never_taken():
    """Stage 1 does all that stage 0 does with as much communication and less memory."""
    assert tuple(row.placement for row in planned(80).rows) == SHOWN
    assert Placement(0) in SHOWN
    assert Placement(0) not in dict(ORDER)


def test_the_less_memory_there_is_the_later_the_choice():
    """Going down in memory walks down the order, and each choice fits."""
    positions = []
    order = [placement for placement, _ in ORDER]
    for gpu_gib in (200, 80, 60, 50, 45, 40, 35, 30, 25):
        found = planned(gpu_gib)
        choice = fastest_choice(found)
        if not choice.fits:
            break
        assert found.row(choice.placement).fits
        positions.append(order.index(choice.placement))
    assert positions == sorted(positions)
    assert positions[0] == 0
    assert len(set(positions)) > 1


def test_the_reason_names_what_the_faster_ones_lack():
    found = planned(40)
    choice = fastest_choice(found)
    before = [p for p, _ in ORDER[: [p for p, _ in ORDER].index(choice.placement)]]
    assert before
    for placement in before:
        assert f"{placement} lacks" in choice.reason
    assert f"{choice.placement} fits: " in choice.reason


def test_nothing_fits_and_what_would_help_is_true():
    choice = fastest_choice(planned(16))
    assert isinstance(choice, Choice)
    assert not choice.fits
    assert "nothing fits" in choice.reason
    assert any("--gradient_checkpointing" in remedy for remedy in choice.remedies)
    assert fastest_choice(planned(16, checkpointing=True)).fits


def test_more_gpus_are_proposed_where_nothing_else_helps():
    choice = fastest_choice(planned(9, ranks=1, host=None, checkpointing=True))
    assert not choice.fits
    assert any("GPUs" in remedy for remedy in choice.remedies)
    assert any("--host_memory" in remedy for remedy in choice.remedies)


def test_offload_is_not_chosen_into_unknown_or_too_little_host_memory():
    for host in (None, 10**9):
        found = planned(30, host=host, checkpointing=True)
        choice = fastest_choice(found)
        assert (choice.placement.optimizer, choice.placement.parameters) == ("none", "none")
        assert "host memory" in found.row(Placement(2, "cpu")).lacking


def test_disks_are_used_only_where_there_are_some():
    assert "disk" in planned(80).row(Placement(3, "nvme", "cpu")).lacking
    assert planned(80, nvme=7 * TB).row(Placement(3, "nvme", "cpu")).fits


def test_host_memory_is_that_of_all_ranks_of_a_machine():
    one = plan(sizes(), Work(8, 1), Batch(1, 2048, 2), Limits(80 * GIB, 60 * GIB))
    eight = plan(sizes(), Work(8, 8), Batch(1, 2048, 2), Limits(80 * GIB, 60 * GIB))
    assert one.row(Placement(2, "cpu")).fits
    assert not eight.row(Placement(2, "cpu")).fits


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buckets_are_those_of_the_resolver(stage):
    from dstrain.arguments import TrainingArguments
    from dstrain.config import Facts, resolve

    facts = ModelFacts(10_000_000, 10_000_000, 1_000_000, 1000)
    got = derived_buckets(facts, stage)
    values = resolve(
        TrainingArguments(output_dir="x", zero_stage=str(stage)), Facts(world_size=4, model=facts)
    ).values
    expected = values.get("zero_optimization.reduce_bucket_size", Buckets().reduce)
    assert got.reduce == expected
    if stage == 3:
        assert got.persistence == values["zero_optimization.stage3_param_persistence_threshold"]


def test_a_model_without_known_layers_is_planned_by_its_states():
    import dataclasses

    unknown = dataclasses.replace(sizes(), block=None)
    found = plan(unknown, Work(8), Batch(1, 2048, 2), Limits(80 * GIB, TB))
    assert found.row(Placement(2)).footprint.kinds["activations"] == 0
    assert fastest_choice(found).fits


def test_the_plan_is_json():
    found = planned(80)
    data = json.loads(json.dumps(as_dict(found, fastest_choice(found))))
    assert len(data["rows"]) == len(SHOWN)
    assert data["model"]["num_parameters"] == 8_030_261_248
    assert data["choice"]["fits"] is True
