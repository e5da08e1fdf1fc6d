"""What zero_stage="auto" and an offload of "auto" become: the planner's choice, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, Machine, ResolvedConfig, resolve
from dstrain.config.memory.closed_forms import closed_form
from dstrain.config.memory.footprint import GIB
from dstrain.config.memory.planner import speed_rank
from dstrain.config.memory.sizes import ModelSizes, Tensors
from dstrain.config.resolution.automatic import ACTIVATION_SHARE, choose_placement
from dstrain.config.resolution.rules import readable_arguments
from dstrain.core.errors import ConfigError

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TIB = 1024 * GIB


def llama_8b() -> ModelSizes:
    found = closed_form(LLAMA_8B)
    assert found is not None
    return found


def facts(gpu_gib: float, *, host: int | None = TIB, **others: Any) -> Facts:
    """Return facts: eight ranks on one machine that train the 8B model, unless told otherwise."""
    sizes = others.pop("sizes", llama_8b())
    usual: dict[str, Any] = {"world_size": 8, "sequence_length": 2048}
    return Facts(
        **{**usual, **others},
        model=sizes.facts,
        sizes=sizes,
        machine=Machine(8, int(gpu_gib * GIB), host),
    )


def chosen(known: Facts, config: Any = None, **arguments: Any) -> ResolvedConfig:
    usual = {"bf16": True, "per_device_train_batch_size": 1}
    return resolve(TrainingArguments(deepspeed=config, **{**usual, **arguments}), known)


def with_auto(known: Facts, **asked: str) -> dict[str, str]:
    """Choose where arguments are "auto", also those whose own choices do not list it yet."""
    arguments = readable_arguments(TrainingArguments(bf16=True, per_device_train_batch_size=1))
    explicit: dict[str, Any] = {}
    return dict(choose_placement({**arguments, **asked}, known, explicit).values)


EVERYTHING = {"zero_stage": "auto", "offload_optimizer": "auto", "offload_param": "auto"}


def test_less_memory_moves_the_choice_along_the_order_and_the_reason_says_what_lacked():
    stages = []
    for gpu_gib in (192, 80, 64, 48, 40):
        got = chosen(facts(gpu_gib))
        reason = got.provenance["zero_optimization.stage"]
        assert reason.source == "derived"
        assert f"of {gpu_gib:.2f} GiB per rank" in reason.detail
        for stage in range(1, got.stage):
            assert f"stage {stage} lacks" in reason.detail
        stages.append(got.stage)
        assert got.arguments["zero_stage"] == str(got.stage)
    assert stages == sorted(stages)
    assert stages[0] == 1
    assert stages[-1] == 3


def test_everything_auto_goes_on_to_offload():
    """Each choice comes later in the order than that for more memory; the last needs the host."""
    places = []
    for gpu_gib in (192, 64, 12, 9):
        found = with_auto(facts(gpu_gib, sequence_length=64), **EVERYTHING)
        places.append((found["offload_optimizer"], found["offload_param"], found["zero_stage"]))
    assert places[0] == ("none", "none", "1")
    assert places[2][0] == "cpu"
    assert places == sorted(places, key=lambda p: (p[0] == "cpu", p[1] == "cpu", p[2]))


def test_parameters_leave_the_accelerator_only_after_the_optimizer():
    """They cross the bus in every micro-batch, optimizer states once per step."""
    for gpu_gib in (40, 20, 12, 9, 6):
        found = with_auto(facts(gpu_gib, sequence_length=64), **{**EVERYTHING, "zero_stage": "3"})
        if found["offload_param"] != "none":
            assert found["offload_optimizer"] != "none"
    only = with_auto(facts(6, sequence_length=64), zero_stage="3", offload_param="auto")
    assert only == {"offload_param": "cpu"}


def test_only_what_is_auto_is_decided():
    """An offload of "none" stays so, even where nothing fits without it; that is then a warning."""
    small = facts(8)
    got = chosen(small)
    assert got.arguments["offload_optimizer"] == "none"
    assert "zero_optimization.offload_optimizer.device" not in got.values
    (warning,) = got.warnings
    assert "does not fit" in warning
    assert "lacks least" in warning
    assert with_auto(small, zero_stage="2", offload_optimizer="auto") == {
        "offload_optimizer": "cpu"
    }
    assert with_auto(facts(192), zero_stage="3", offload_param="auto") == {"offload_param": "none"}
    assert (
        choose_placement(
            {"zero_stage": "1", "offload_optimizer": "none", "offload_param": "none"}, small, {}
        ).values
        == {}
    )


@pytest.mark.parametrize(
    ("asked", "stage"),
    [
        ({"offload_param": "cpu"}, 3),
        ({"offload_optimizer": "nvme"}, 3),
        ({"offload_optimizer": "cpu"}, 1),
    ],
)
@pytest.mark.parametrize("known", [facts(1000), Facts()], ids=["facts", "no facts"])
def test_the_users_offload_limits_the_stage(asked, stage, known):
    found = with_auto(known, zero_stage="auto", **asked)
    assert list(found) == ["zero_stage"]
    assert int(found["zero_stage"]) >= stage


def test_without_facts_stage_2_and_why():
    for known, missing in (
        (Facts(), "the model's sizes and the memory of the machine are not known"),
        (dataclasses.replace(facts(80), machine=None), "the memory of the machine is not known"),
        (dataclasses.replace(facts(80), sizes=None), "the model's sizes are not known"),
    ):
        got = chosen(known)
        assert got.stage == 2
        assert missing in got.provenance["zero_optimization.stage"].detail
    assert with_auto(Facts(), **EVERYTHING) == {
        "zero_stage": "2", "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip


def test_unknown_activations_get_a_share_that_is_named():
    """A plain Trainer does not know how long a sample is."""
    known = facts(80, sequence_length=None)
    reason = chosen(known).provenance["zero_optimization.stage"].detail
    assert f"{ACTIVATION_SHARE:.0%} of it kept for activations" in reason
    assert "tokens per sample" in reason
    assert (
        "kept for activations" not in chosen(facts(80)).provenance["zero_optimization.stage"].detail
    )
    plain = ModelSizes("Net", "the model", (Tensors("other", (1000, 1000)),), 0, None)
    reason = chosen(facts(80, sizes=plain)).provenance["zero_optimization.stage"].detail
    assert "form of the layers" in reason
    # The share counts: without it the states would just fit at stage 1.
    needed = GIB * 44.8
    assert chosen(facts(needed / GIB, sequence_length=None)).stage > 1
    assert chosen(facts(needed / GIB / (1 - ACTIVATION_SHARE), sequence_length=None)).stage == 1


def test_the_workload_counts():
    """Longer samples and larger micro-batches need a later choice; 16 bits an earlier one."""
    known = facts(56)
    assert chosen(known).stage < chosen(known, per_device_train_batch_size=4).stage
    longer = facts(56, sequence_length=16384)
    assert chosen(known).stage < chosen(longer).stage
    assert chosen(known).stage < chosen(known, bf16=False).stage


def test_the_users_config_counts():
    """An open stage is decided with the values of its other keys, and an explicit one is kept."""
    assert chosen(facts(192), {"zero_optimization": {"stage": "auto"}}).stage == 1
    assert chosen(facts(192), {"zero_optimization": {"stage": 3}}).stage == 3
    huge = {"zero_optimization": {"reduce_bucket_size": 20_000_000_000}}
    assert chosen(facts(80)).stage == 1
    assert "stage 1 lacks" in chosen(facts(80), huge).provenance["zero_optimization.stage"].detail


def test_states_in_bf16_need_an_earlier_choice():
    """``bf16_optimizer_states`` halves the optimizer, and masters take half as well."""
    masters = {"bf16_master_weights_and_grads": True}
    lean = chosen(facts(40), {"bf16": {**masters, "bf16_optimizer_states": True}})
    assert lean.stage < chosen(facts(40)).stage
    with_states = {"bf16": masters}
    placed = chosen(facts(192), with_states, offload_optimizer="auto", offload_param="auto")
    assert placed.arguments["offload_optimizer"] == "cpu", "only DeepSpeedCPUAdam has fp32 states"


def test_on_the_cpu_memory_is_the_hosts_and_nothing_is_offloaded_to_it():
    tiny = closed_form(
        {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}
    )
    known = Facts(world_size=2, device="cpu", sizes=tiny, machine=Machine(2, 8 * GIB, 16 * GIB))
    found = with_auto(known, **EVERYTHING)
    assert found == {"zero_stage": "1", "offload_optimizer": "none", "offload_param": "none"}
    large = dataclasses.replace(known, sizes=llama_8b())
    got = chosen(large)
    assert "host memory per rank" in got.provenance["zero_optimization.stage"].detail
    assert "GPU" not in got.provenance["zero_optimization.stage"].detail


def test_a_partitioned_model_stays_at_stage_3():
    """A second training, or one after an evaluation, must not want the parameters back whole."""
    for known in (facts(192, partitioned=True), Facts(partitioned=True)):
        got = chosen(known)
        assert got.stage == 3
        assert "partitioned already" in got.provenance["zero_optimization.stage"].detail
    assert chosen(facts(192, partitioned=True), zero_stage="2").stage == 2


@pytest.mark.parametrize("known", [facts(1000), Facts()], ids=["facts", "no facts"])
def test_what_only_stage_3_has_chooses_it(known):
    usual = readable_arguments(TrainingArguments())
    for name, value in (("hpz_partition_size", 8), ("quantized_weights", True)):
        found = choose_placement({**usual, name: value}, known, {})
        assert found.values == {"zero_stage": "3"}
        assert f"{name}={value} needs stage 3" in found.how
    assert choose_placement({**usual, "quantized_weights": False}, known, {}).values != {
        "zero_stage": "3"
    }


@pytest.mark.parametrize("known", [Facts(), facts(80)], ids=["unknown", "planned"])
@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    [
        ({"optimizer": {"type": "Lamb"}}, {"quantized_weights": True}, "ZeRO stages 1 to 3 give"),
        ({"optimizer": {"type": "Lamb"}}, {"hpz_partition_size": 2}, "ZeRO stages 1 to 3 give"),
        (None, {"optim": "sgd", "offload_optimizer": "nvme"}, "DeepSpeed's swapper to disk"),
        (None, {"optim": "lamb", "offload_param": "cpu"}, "ZeRO stages 1 to 3 give"),
    ],
)
def test_an_optimizer_that_does_not_run_at_the_only_stage_left_is_refused(
    known, config, arguments, said
):
    """Catches a choice among none: what asks for stage 3 excludes where the optimizer runs."""
    with pytest.raises(ConfigError, match=said):
        chosen(known, config, **arguments)


def test_deciding_is_repeatable_and_accepted_by_the_rules_that_follow():
    known = facts(32)
    first, second = chosen(known), chosen(known)
    assert first == second
    assert "zero_optimization.stage3_prefetch_bucket_size" in first.values


def test_the_order_is_one_order():
    from dstrain.config.memory.planner import ORDER

    ranks = [speed_rank(placement) for placement, _ in ORDER]
    assert ranks == sorted(ranks)


def test_a_run_that_does_not_fit_is_told_what_checkpointing_would_change():
    """It is the first thing to try, so the warning looks for itself."""
    got = chosen(facts(28))
    (warning,) = got.warnings
    assert warning.endswith("with gradient_checkpointing stage 3 fits")
    tiny = chosen(facts(6))
    assert tiny.warnings[0].endswith("`dstrain plan` shows what would help")


def test_the_reason_stands_once_where_arguments_are_decided_together():
    got = chosen(facts(30), **EVERYTHING)
    why = {name: got.provenance[f"zero_optimization.{name}"].detail
           for name in ("stage", "offload_optimizer.device", "offload_param.device")}  # fmt: skip
    assert "lacks" in why["stage"]
    for place in ("optimizer", "param"):
        expected = f"offload_{place}='auto': decided together with zero_stage"
        assert why[f"offload_{place}.device"] == expected
