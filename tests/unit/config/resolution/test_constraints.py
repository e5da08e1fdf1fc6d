"""What excludes what: each refusal names the value, the reason and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, ResolvedConfig, resolve
from dstrain.core.errors import ConfigError, Problem

CUDA_8 = Facts(world_size=8)
CPU_8 = Facts(world_size=8, device="cpu")


def resolved(
    facts: Facts = CUDA_8, config: Mapping[str, Any] | str | None = None, **arguments: Any
) -> ResolvedConfig:
    return resolve(TrainingArguments(deepspeed=config, **arguments), facts)


def problems(
    facts: Facts = CUDA_8, config: Mapping[str, Any] | str | None = None, **arguments: Any
) -> list[Problem]:
    """Return the problems of the one error; none where it resolves."""
    try:
        resolved(facts, config, **arguments)
    except ConfigError as error:
        return list(error.problems)
    return []


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


OFFLOADED = {"device": "cpu"}
# facts, config, arguments, words of the error
REFUSED: list[tuple[Facts, Any, dict[str, Any], str]] = [
    (CUDA_8, None, {"hpz_partition_size": 4, "zero_stage": 2}, "with stage 2"),
    (CUDA_8, None, {"hpz_partition_size": 3}, "8 / 3 = 2.66667"),
    (CUDA_8, None, {"hpz_partition_size": 16}, "8 / 16 = 0.5"),
    (Facts(1), zero(stage=3, zero_hpz_partition_size=8), {}, "on 1 rank"),
    (CUDA_8, None, {"quantized_weights": True, "zero_stage": 2, "bf16": True}, "only stage 3"),
    (CPU_8, None, {"quantized_weights": True, "bf16": True}, "on device cpu"),
    (CUDA_8, None, {"quantized_weights": True}, "training in fp32"),
    (CPU_8, None, {"quantized_gradients": True, "bf16": True}, "on device cpu"),
    (CUDA_8, None, {"quantized_gradients": True, "zero_stage": 1, "bf16": True}, "only stage 3"),
    (
        CUDA_8, zero(stage=3, reduce_scatter=False),
        {"quantized_gradients": True, "bf16": True}, "remove reduce_scatter",
    ),
    (CUDA_8, None, {"quantized_nontrainable_weights": True, "bf16": True}, "of fp16 only"),
    (CUDA_8, zero(stage=2, zenflow={}, offload_optimizer=OFFLOADED), {}, "zenflow"),
    (CUDA_8, None, {"super_offload": True}, "the optimizer is on none"),
    (
        CUDA_8, None, {"super_offload": True, "offload_optimizer": "cpu", "zero_stage": 2},
        "stage 2: it is of stage 3",
    ),
    (CPU_8, None, {"super_offload": True, "offload_optimizer": "cpu"}, "written for CUDA"),
    (
        CUDA_8, None, {"super_offload": True, "offload_optimizer": "cpu", "optim": "adagrad"},
        "not DeepSpeed's Adam",
    ),
    (CUDA_8, None, {"offload_optimizer": "nvme"}, "without a path"),
    (CUDA_8, None, {"offload_param": "nvme"}, "without a path"),
    (
        CUDA_8, None, {"offload_optimizer": "nvme", "nvme_path": "/x", "zero_stage": 2},
        "only stage 3 writes it to disk",
    ),
    (CUDA_8, zero(stage=1, offload_param={"device": "nvme", "nvme_path": "/x"}), {}, "stage 1"),
    (CUDA_8, None, {"nvme_path": "/x"}, "nothing would be there"),
    (CUDA_8, None, {"nvme_path": "/x", "offload_optimizer": "cpu"}, "nothing would be there"),
    (
        CUDA_8, zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/a"}),
        {"nvme_path": "/b"}, "nvme_path='/b'",
    ),
    (
        CUDA_8, None,
        {"offload_optimizer": "nvme", "nvme_path": "/x", "checkpoint_format": "deepspeed"},
        "other moments and losses",
    ),
    (
        CUDA_8, zero(stage=3, offload_optimizer={"device": "nvme", "ratio": 0.5}),
        {"nvme_path": "/x"}, "as a whole",
    ),
    (CUDA_8, None, {"bf16": True, "zero_stage": 0, "grad_accum_dtype": "fp32"}, "stage 0"),
    (CUDA_8, None, {"bf16": True, "grad_accum_dtype": "fp16"}, "training in bf16"),
    (CUDA_8, None, {"grad_accum_dtype": "bf16"}, "training in fp32"),
    (CUDA_8, {"bf16": {"enabled": True}}, {"torch_autocast": True}, "weights that stay in fp32"),
    (
        CUDA_8, {"torch_autocast": {"enabled": True, "dtype": "fp32"}}, {}, "torch_autocast_dtype",
    ),
    (
        CUDA_8, None, {"torch_autocast": True, "torch_autocast_dtype": "fp16", "zero_stage": 0},
        "no gradient norm",
    ),
    (
        CUDA_8, None, {"torch_autocast": True, "communication_dtype": "fp32"}, "would be ignored",
    ),
    (CUDA_8, None, {"round_robin_gradients": True, "zero_stage": 3}, "would be ignored"),
    (CUDA_8, None, {"round_robin_gradients": True, "zero_stage": 0}, "would be ignored"),
    (CUDA_8, None, {"sub_group_size": 10**6}, "only stage 3 reads"),
    (CUDA_8, None, {"leaf_modules": ["Block"], "zero_stage": 2}, "only stage 3 reads"),
    (CUDA_8, None, {"overlap_comm": True, "zero_stage": 0}, "would be ignored"),
    (CUDA_8, None, {"contiguous_gradients": False, "zero_stage": 0}, "would be ignored"),
    (
        CUDA_8, None,
        {"contiguous_gradients": False, "zero_stage": 2, "offload_optimizer": "cpu"},
        "turn it on again",
    ),
    (CUDA_8, {"activation_checkpointing": {"partition_activations": True}}, {}, "no two ranks"),
    (
        Facts(is_transformers=True), None, {"cpu_checkpointing": True},
        "does not call deepspeed.checkpointing",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "config", "arguments", "words"), REFUSED, ids=[case[3] for case in REFUSED]
)
def test_it_is_refused_with_reason_and_remedy(facts, config, arguments, words):
    found = problems(facts, config, **arguments)
    assert any(words in str(problem) for problem in found), found
    assert all(problem.why and problem.remedy for problem in found)


ACCEPTED: list[tuple[Facts, Any, dict[str, Any]]] = [
    (CUDA_8, None, {"hpz_partition_size": 4}),
    (CPU_8, None, {"hpz_partition_size": 8}),
    (CUDA_8, None, {"hpz_partition_size": 1, "zero_stage": 2}),
    (CUDA_8, None, {"quantized_weights": True, "quantized_gradients": True, "bf16": True}),
    (CUDA_8, None, {"quantized_nontrainable_weights": True, "fp16": True}),
    (CUDA_8, None, {"super_offload": True, "offload_optimizer": "cpu"}),
    (CUDA_8, None, {"offload_optimizer": "nvme", "nvme_path": "/x"}),
    (CUDA_8, None, {"offload_optimizer": "cpu", "offload_param": "nvme", "nvme_path": "/x"}),
    (CUDA_8, None, {"bf16": True, "zero_stage": 0, "gradient_accumulation_steps": 8}),
    (CUDA_8, None, {"bf16": True, "zero_stage": 1, "grad_accum_dtype": "fp32"}),
    (CUDA_8, None, {"torch_autocast": True, "zero_stage": 0}),
    (CUDA_8, None, {"torch_autocast": True, "torch_autocast_dtype": "fp16", "zero_stage": 1}),
    (CUDA_8, None, {"round_robin_gradients": True}),
    (CUDA_8, None, {"overlap_comm": True, "zero_stage": 1}),
    (CUDA_8, None, {"contiguous_gradients": False, "zero_stage": 2}),
    (CUDA_8, None, {"cpu_checkpointing": True}),
]


@pytest.mark.parametrize(("facts", "config", "arguments"), ACCEPTED, ids=str)
def test_what_can_run_is_accepted(facts, config, arguments):
    assert problems(facts, config, **arguments) == []


def test_all_problems_come_at_once():
    found = problems(
        CPU_8,
        zero(stage=2, zero_hpz_partition_size=3, zero_quantized_weights=True),
        offload_optimizer="nvme",
        grad_accum_dtype="bf16",
    )
    text = "\n".join(map(str, found))
    for words in ("8 / 3", "on device cpu", "only stage 3 has it", "without a path", "to disk"):
        assert words in text
    assert "training in fp32" in text


def test_tuning_of_another_stage_in_a_config_is_a_warning():
    """Configs are copied from stage to stage; a key that only tunes must not stop the run."""
    got = resolved(config=zero(stage=2, sub_group_size=10**9, leaf_module={"names": ["a"]}))
    assert [warning.split(" ")[0] for warning in got.warnings] == [
        "zero_optimization.sub_group_size",
        "zero_optimization.leaf_module",
    ]
    assert resolved(config=zero(stage=3, sub_group_size=10**9)).warnings == ()


# --- what is derived -----------------------------------------------------------------------------

ACCUMULATION = "data_types.grad_accum_dtype"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_gradients_of_bf16_add_up_in_fp32_where_the_share_is_a_ranks(stage, steps, precision):
    arguments = {} if precision == "fp32" else {precision: True}
    got = resolved(zero_stage=stage, gradient_accumulation_steps=steps, **arguments)
    expected = "fp32" if precision == "bf16" and steps > 1 and stage >= 2 else None
    assert got.values.get(ACCUMULATION) == expected
    asked = resolved(
        config={"data_types": {"grad_accum_dtype": "auto"}},
        zero_stage=stage,
        gradient_accumulation_steps=steps,
        **arguments,
    )
    assert asked.values[ACCUMULATION] == (expected or precision)


@pytest.mark.parametrize(
    ("stage", "steps", "arguments", "remedy"),
    [
        ("0", 4, {"bf16": True}, "zero_stage=2"),
        ("1", 4, {"bf16": True}, "grad_accum_dtype=fp32"),
        ("1", 1, {"bf16": True}, ""),
        ("1", 4, {"bf16": True, "grad_accum_dtype": "fp32"}, ""),
        ("1", 4, {"bf16": True, "grad_accum_dtype": "bf16"}, ""),  # asked for
        ("1", 4, {"fp16": True}, ""),
        ("2", 4, {"bf16": True}, ""),
        ("1", 4, {}, ""),
    ],
)
def test_a_sum_that_loses_bits_is_said(stage, steps, arguments, remedy):
    """The stage may have been chosen by the memory plan: nobody would know."""
    got = resolved(zero_stage=stage, gradient_accumulation_steps=steps, **arguments)
    found = [w for w in got.warnings if "micro-batches are added up in bf16" in w]
    assert len(found) == bool(remedy)
    assert all(remedy in warning for warning in found)


def test_accumulation_that_follows_from_the_global_batch_counts():
    got = resolved(config={"train_batch_size": 256}, bf16=True)
    assert got.accumulation == 4
    assert got.values[ACCUMULATION] == "fp32"
    assert "4 micro-batches" in got.provenance[ACCUMULATION].detail


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_auto_offload_stays_on_the_accelerator_and_says_why(name):
    got = resolved(**{name: "auto"})
    key = f"zero_optimization.{name}.device"
    assert got.values[key] == "none"
    assert got.provenance[key].detail == f"{name}='auto': decided together with zero_stage"
    assert f"{name}='auto'" in got.provenance["zero_optimization.stage"].detail
    assert "the model's sizes" in got.provenance["zero_optimization.stage"].detail
    alone = resolved(zero_stage="3", **{name: "auto"})
    assert "the model's sizes" in alone.provenance[key].detail
    assert got.stage == 2
    assert got.values["optimizer.params.torch_adam"] is True
    assert f"zero_optimization.{name}.pin_memory" not in got.values


def test_a_path_with_a_tilde_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    got = resolved(offload_optimizer="nvme", offload_param="nvme", nvme_path="~/swap")
    for name in ("offload_optimizer", "offload_param"):
        assert got.values[f"zero_optimization.{name}.nvme_path"] == "/home/me/swap"
    assert got.stage == 3


def test_two_disks_are_no_conflict():
    devices = {
        name: {"device": "nvme", "nvme_path": f"/{name}"}
        for name in ("offload_optimizer", "offload_param")
    }
    values = resolved(config=zero(stage=3, **devices)).values
    assert values["zero_optimization.offload_param.nvme_path"] == "/offload_param"


@pytest.mark.parametrize(
    "argument",
    [
        {"offload_param": "cpu"},
        {"offload_optimizer": "nvme", "nvme_path": "/x"},
        {"hpz_partition_size": 2},
        {"quantized_weights": True, "bf16": True},
        {"super_offload": True, "offload_optimizer": "cpu"},
    ],
    ids=str,
)
def test_what_only_stage_3_has_chooses_it(argument):
    got = resolved(**argument)
    assert got.stage == 3
    assert next(iter(argument)) in got.provenance["zero_optimization.stage"].detail


def test_expert_blocks_join_deepspeeds_own_list_at_stage_3():
    key = "zero_optimization.leaf_module.classes"
    facts = Facts(expert_blocks=("my.Block",))
    classes = resolved(facts, zero_stage=3).values[key]
    assert classes[-1] == "my.Block"
    assert "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock" in classes
    assert key not in resolved(facts, zero_stage=2).values
    assert key not in resolved(zero_stage=3).values
    assert resolved(facts, zero_stage=3, leaf_modules=["Mine"]).values[key] == ["Mine"]
    text = zero(stage=3, leaf_module={"classes": "Mine"})
    assert resolved(facts, text).arguments["leaf_modules"] == ["Mine"]


# --- the generated page --------------------------------------------------------------------------


def test_the_page_of_keys_is_the_one_that_the_code_writes():
    from dstrain.config.table import PAGE, page

    assert PAGE.read_text() == page(), "run `python -m dstrain.config.table`"


def test_the_page_has_every_key_and_only_known_arguments():
    import dataclasses
    import re

    from dstrain.config.resolution.rules import RULES
    from dstrain.config.table import page

    rows = [
        line for line in page().split("# Keys that would")[0].splitlines() if line.startswith("| `")
    ]
    assert [row.split("`")[1] for row in rows] == [rule.key for rule in RULES]
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for row in rows:
        read = row.rsplit(" | ", 2)[1]
        assert set(re.findall("`([^`]*)`", read)) <= known, row


# --- what DeepSpeed would only say with an AssertionError, after the model is built -------------

BF16_MASTERS = {"bf16": {"bf16_master_weights_and_grads": True}}
LEAN = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
FP16_MASTERS = {"fp16": {"fp16_master_weights_and_grads": True}}
NO_NORM = {"zero_optimization": {"compute_grad_norm": False}}


@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        (BF16_MASTERS, {"bf16": True}, "DeepSpeedCPUAdam"),
        (BF16_MASTERS, {"offload_optimizer": "cpu"}, "training in fp32"),
        (BF16_MASTERS, {"bf16": True, "offload_optimizer": "cpu", "optim": "sgd"}, "CPUAdam"),
        ({"bf16": {"bf16_optimizer_states": True}}, {"bf16": True}, "set both"),
        (LEAN, {"bf16": True, "zero_stage": "0"}, "stage 0"),
        (
            LEAN,
            {"bf16": True, "zero_stage": "3", "offload_optimizer": "nvme", "nvme_path": "/x"},
            "in fp32 alone",
        ),
        (FP16_MASTERS, {"fp16": True, "zero_stage": "2"}, "set offload_optimizer to cpu"),
        ({"prescale_gradients": True}, {"zero_stage": "2"}, "prescale_gradients=True"),
        ({"gradient_predivide_factor": 2.0}, {"zero_stage": "3"}, "gradient_predivide_factor=2.0"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            {"zero_stage": "2"},
            "ratio=0.5 with stage 2",
        ),
        (NO_NORM, {"zero_stage": "2"}, "set max_grad_norm to 0"),
        (NO_NORM, {"zero_stage": "3", "max_grad_norm": 0}, "only stages 1 and 2"),
        (NO_NORM, {"zero_stage": "1", "max_grad_norm": 0, "offload_optimizer": "cpu"}, "on cpu"),
    ],
    ids=str,
)
def test_what_deepspeed_asserts_is_said_before_there_is_a_model(config, arguments, named):
    with pytest.raises(ConfigError) as caught:
        resolved(config=config, **arguments)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (BF16_MASTERS, {"bf16": True, "offload_optimizer": "cpu"}),
        (LEAN, {"bf16": True}),
        (LEAN, {"bf16": True, "offload_optimizer": "cpu", "zero_stage": "3"}),
        (FP16_MASTERS, {"fp16": True, "offload_optimizer": "cpu"}),
        ({"prescale_gradients": True, "gradient_predivide_factor": 2.0}, {"zero_stage": "1"}),
        (
            {"prescale_gradients": True, "zero_optimization": {"reduce_scatter": False}},
            {"zero_stage": "2"},
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            {"zero_stage": "3"},
        ),
        (NO_NORM, {"zero_stage": "2", "max_grad_norm": 0}),
    ],
    ids=str,
)
def test_what_deepspeed_takes_passes(config, arguments):
    assert resolved(config=config, **arguments).values
