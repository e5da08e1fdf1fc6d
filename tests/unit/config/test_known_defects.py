"""One test for each weakness of transformers' DeepSpeed integration that was measured.

The numbers are those of the list of facts that dstrain was designed from (section C.6). What is
said of transformers was measured there; what is tested is that it cannot happen here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dstrain.arguments import TrainingArguments
from dstrain.cli import explain
from dstrain.config import Facts, ModelFacts, ResolvedConfig, resolve
from dstrain.config.memory.bucket_rule import BUCKET_ELEMENTS
from dstrain.core.errors import ConfigError
from dstrain.core.ranks import launched_ranks
from dstrain.models import sizes_of_module
from tests.models import RegressionModel

MODEL = ModelFacts(10**9, 10**9, largest=10**8, largest_vector=20_000)


def resolved(config: Any = None, facts: Facts | None = None, **arguments: Any) -> ResolvedConfig:
    return resolve(TrainingArguments(deepspeed=config, **arguments), facts or Facts())


def refusal(config: Any = None, facts: Facts | None = None, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(config, facts, **arguments)
    return str(caught.value)


# --- 1: a key that is missing means other training, and nobody says so ---------------------------


def test_1_a_missing_key_is_filled_from_its_argument():
    """``max_grad_norm=0.25`` was ignored without a gradient_clipping key: DeepSpeed clips at 1."""
    got = resolved({"zero_optimization": {"stage": 2}}, max_grad_norm=0.25, bf16=True)
    assert got.values["gradient_clipping"] == 0.25
    # Inputs were cast to fp32 while the engine trained in bf16.
    assert got.values["bf16.enabled"] is True
    assert got.precision == "bf16"


# --- 2: a format of evaluation turns on training in it -------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_2_evaluating_in_16_bits_does_not_train_in_them(name):
    """It did: the section of the format was written, and the engine trained in it."""
    assert resolved(**{f"{name}_full_eval": True}).precision == "fp32"


# --- 3: values in another spelling are mismatches; real ones are found after the model is loaded -


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ({"lr": "5e-4"}, {"learning_rate": 5e-4}),
        ({"lr": 5e-4}, {"learning_rate": "5e-4"}),
        ({"betas": (0.8, 0.95)}, {"adam_beta1": 0.8, "adam_beta2": 0.95}),
        ({"betas": [0.8, "0.95"]}, {"adam_beta1": 0.8, "adam_beta2": 0.95}),
        ({"weight_decay": "1.0"}, {"weight_decay": 1}),
    ],
)
def test_3_another_spelling_is_no_mismatch(section, arguments):
    got = resolved({"optimizer": {"type": "AdamW", "params": section}}, **arguments)
    assert not any(isinstance(value, str) for key, value in got.values.items() if ".params" in key)


def test_3_a_mismatch_is_found_before_there_is_a_model():
    """All of them at once, by a command that needs neither torch nor a model."""
    config = {"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    words = ["--deepspeed", json.dumps(config), "--max_grad_norm", "0.1", "--learning_rate", "1"]
    with pytest.raises(ConfigError) as caught:
        explain.run(words)
    assert len(caught.value.problems) == 2


# --- 4: resolving works once, and changes what it reads ------------------------------------------


def test_4_resolving_again_follows_the_arguments_and_the_run():
    """A second train(), an evaluate() before it and set_*() gave stale values or errors."""
    config = {
        "zero_optimization": {"stage": 2},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
    }
    given = copy.deepcopy(config)
    args = TrainingArguments(deepspeed=given)
    total = "scheduler.params.total_num_steps"
    assert total not in resolve(args, Facts()).values  # an evaluation before any training
    assert resolve(args, Facts(num_training_steps=70)).values[total] == 70
    assert resolve(args, Facts(num_training_steps=90)).values[total] == 90
    args.set_training(learning_rate=1e-3, batch_size=3)
    again = resolve(args, Facts(num_training_steps=90))
    assert again.values["optimizer.params.lr"] == 1e-3
    assert again.values["train_micro_batch_size_per_gpu"] == 3
    assert given == config


# --- 5: an evaluation takes the optimizer out of the config that training shares -----------------


def test_5_every_engine_gets_a_config_of_its_own():
    config = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    got = resolved(config)
    for_evaluation = got.to_deepspeed()
    for name in ("optimizer", "scheduler"):
        del for_evaluation[name]
    assert {"optimizer", "scheduler"} <= set(got.to_deepspeed())
    assert got.has_scheduler


@pytest.mark.ranks(1)
def test_5_training_after_an_evaluation_has_its_optimizer_and_schedule(tmp_path: Path) -> None:
    from tests.distributed.runs import make_trainer

    config = {
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": "auto", "warmup_num_steps": 1, "warmup_type": "linear"},
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    trainer = make_trainer(tmp_path, stage=3, deepspeed=config, max_steps=2)
    trainer.evaluate()
    trainer.train()
    assert type(trainer.lr_scheduler).__name__ == "WarmupLR"
    assert trainer.deepspeed.basic_optimizer.defaults["lr"] == 1e-3
    trainer.close()


# --- 6: keys of another stage in a shared file ---------------------------------------------------


STAGE_3_KEYS = {
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "reduce_bucket_size": "auto",
}


def vision_language() -> nn.Module:
    """Make a model whose config has hidden sizes only deeper, not as ``config.hidden_size``."""
    import transformers

    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("stage", [2, 3])
def test_6_keys_of_stage_3_may_stay_in_a_file_for_stage_2(stage):
    """A vision-language run at stage 2 died of them."""
    sizes = sizes_of_module(vision_language())
    facts = Facts(model=sizes.facts, sizes=sizes)
    got = resolved({"zero_optimization": {"stage": stage, **STAGE_3_KEYS}}, facts)
    assert "auto" not in got.values.values()
    kept = "zero_optimization.stage3_prefetch_bucket_size" in got.values
    assert kept is (stage == 3)
    assert got.values["zero_optimization.reduce_bucket_size"] > 0


# --- 7: buckets of hidden x hidden ---------------------------------------------------------------


@pytest.mark.parametrize(("width", "layers"), [(8192, 4), (64, 400)])
def test_7_buckets_do_not_follow_the_square_of_the_width(width, layers):
    module = nn.Sequential(*[nn.Linear(width, 1024, device="meta") for _ in range(layers)])
    sizes = sizes_of_module(module)
    got = resolved(facts=Facts(model=sizes.facts), zero_stage="2")
    bucket = got.values["zero_optimization.reduce_bucket_size"]
    assert bucket != width**2
    assert min(sizes.facts.num_parameters, 10 * width**2) <= bucket <= BUCKET_ELEMENTS


def test_7_one_expert_tensor_does_not_blow_the_bucket_up():
    """transformers 5 keeps the experts of a layer in one parameter, which passes by the bucket."""
    experts = nn.ParameterList([nn.Parameter(torch.empty(64, 2048, 1408, device="meta"))])
    sizes = sizes_of_module(experts)
    got = resolved(facts=Facts(model=sizes.facts), zero_stage="3")
    assert got.values["zero_optimization.reduce_bucket_size"] == BUCKET_ELEMENTS


# --- 8: the global batch where ranks share samples -----------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"sequence_parallel_size": 2},
        {"tensor_parallel": {"autotp_size": 2}},
        {"tensor_parallel": {"tp": {"tp_size": 2}}},
    ],
)
def test_8_a_batch_is_never_counted_over_ranks_that_share_samples(config):
    """It was micro-batch x accumulation x all ranks until something patched it later."""
    assert "the same samples" in refusal(config, Facts(world_size=4))
    got = resolved(facts=Facts(world_size=4), gradient_accumulation_steps=3)
    assert got.global_batch_size == 8 * 3 * 4


def test_8_parallelism_of_one_rank_is_none():
    config = {"sequence_parallel_size": 1, "tensor_parallel": {"autotp_size": 1}}
    assert resolved(config, Facts(world_size=4)).global_batch_size == 32


# --- 9: misspelt keys ----------------------------------------------------------------------------


def test_9_misspelt_keys_are_refused_at_every_depth_with_the_nearest():
    """At the top level DeepSpeed accepts them without a word."""
    text = refusal(
        {
            "gradient_cliping": 1.0,
            "zero_optimisation": {"stage": 3},
            "zero_optimization": {"overlap_com": True},
            "optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-3}},
        }
    )
    for name in (
        "gradient_clipping",
        "did you mean zero_optimization?",
        "overlap_comm",
        "learning_rate",
    ):
        assert name in text


# --- 10: variables and hosts that turn DeepSpeed off ---------------------------------------------


def test_10_ranks_come_from_the_launcher_whatever_the_device_is(monkeypatch):
    """On a host without a GPU every process believed that it was alone."""
    launcher = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**launcher, "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    args = TrainingArguments()
    assert (args.world_size, args.process_index) == (2, 1)
    ranks = launched_ranks()
    assert (ranks.rank, ranks.world_size) == (1, 2)
    assert resolved("zero2", Facts(world_size=ranks.world_size, device="cpu")).stage == 2


@pytest.mark.ranks(2)
def test_10_a_cpu_host_trains_on_all_ranks_with_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ACCELERATE_USE_CPU`` turned DeepSpeed off, and without ``use_cpu`` the ranks were one."""
    from dstrain import Trainer

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = TrainingArguments(
        str(tmp_path), deepspeed="zero2", max_steps=1, report_to="none", disable_tqdm=True
    )
    data = [{"x": torch.ones(8), "labels": torch.tensor(1.0)}] * 32
    trainer = Trainer(RegressionModel(), args, train_dataset=data)
    trainer.train()
    assert trainer.ranks.world_size == 2
    assert type(trainer.deepspeed).__name__ == "DeepSpeedEngine"
    assert trainer.resolved.global_batch_size == 16
    trainer.close()
