"""ZeRO options on real ranks: the running engine has them, and training stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.runs import losses, make_trainer
from tests.models import VOCAB_SIZE

STEPS = 3


def run(
    folder: Path, *, look: Callable[[Any], None] = lambda engine: None, **arguments: Any
) -> list[float]:
    """Train shortly, call ``look`` with DeepSpeed's engine; return the losses."""
    settings = {"max_steps": STEPS, "train": 24, "evaluation": 0, **arguments}
    trainer = make_trainer(folder, **settings)
    trainer.train()
    look(trainer.deepspeed)
    trainer.close()
    return losses(trainer)


def close(a: list[float], b: list[float], tolerance: float) -> None:
    assert len(a) == len(b) == STEPS
    assert all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True)), (a, b)


def has_optimizer(**expected: Any) -> Callable[[Any], None]:
    """Return a check of attributes of the engine's ZeRO optimizer."""

    def look(engine: Any) -> None:
        for name, value in expected.items():
            assert getattr(engine.optimizer, name) == value, name

    return look


def has_config(**expected: Any) -> Callable[[Any], None]:
    """Return a check of the engine's own ZeRO config."""

    def look(engine: Any) -> None:
        for name, value in expected.items():
            assert getattr(engine._config.zero_config, name) == value, name

    return look


def has_autocast(engine: Any) -> None:
    assert engine.torch_autocast_enabled()
    assert engine.torch_autocast_dtype() is torch.bfloat16
    assert next(engine.module.parameters()).dtype is torch.float32


def has_bf16_optimizer(engine: Any) -> None:
    assert type(engine.optimizer).__name__ == "BF16_Optimizer"
    assert engine.optimizer.grad_acc_dtype is torch.float32


def has_hpz(engine: Any) -> None:
    assert {p.ds_secondary_tensor_group_size for p in engine.module.parameters()} == {2}
    assert all(p.ds_zero_param_process_group is not None for p in engine.module.parameters())


def has_sub_groups(engine: Any) -> None:
    assert engine.optimizer.sub_group_size == 5000
    assert len(engine.optimizer.fp16_partitioned_groups_flat) > 4


# arguments, what the engine must then have, how far losses may differ from the plain run's
Option = tuple[dict[str, Any], Callable[[Any], None], float]

# Smaller than most parameters of the model, which then pass by the bucket.
SMALL_BUCKET: Option = (
    {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 500}}},
    has_config(reduce_bucket_size=500),
    1e-5,
)
BELOW_3: list[Option] = [
    SMALL_BUCKET,
    ({"overlap_comm": True}, has_optimizer(overlap_comm=True), 1e-5),
    ({"contiguous_gradients": False}, has_optimizer(contiguous_gradients=False), 1e-5),
    ({"round_robin_gradients": True}, has_optimizer(round_robin_gradients=True), 1e-5),
    (
        {"communication_dtype": "bf16"},
        has_optimizer(communication_data_type=torch.bfloat16),
        1e-2,
    ),
    ({"torch_autocast": True}, has_autocast, 5e-2),
]
AT_3: list[Option] = [
    SMALL_BUCKET,
    ({"overlap_comm": False}, has_config(overlap_comm=False), 1e-5),
    ({"contiguous_gradients": False}, has_optimizer(contiguous_gradients=False), 1e-5),
    ({"sub_group_size": 5000}, has_sub_groups, 1e-5),
    ({"hpz_partition_size": 2}, has_hpz, 1e-5),
    (
        {"communication_dtype": "bf16"},
        has_optimizer(communication_data_type=torch.bfloat16),
        1e-2,
    ),
    ({"torch_autocast": True}, has_autocast, 5e-2),
]


@pytest.mark.ranks(2, timeout=400)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_option_is_in_the_engine_and_training_stays_the_same(
    stage: int, tmp_path: Path
) -> None:
    """Catches an option that DeepSpeed never sees, and one that breaks our way of stepping."""
    plain = run(tmp_path, stage=stage, gradient_accumulation_steps=2)
    for arguments, look, tolerance in AT_3 if stage == 3 else BELOW_3:
        got = run(tmp_path, stage=stage, gradient_accumulation_steps=2, look=look, **arguments)
        close(got, plain, tolerance)
    # What DeepSpeed keeps in its modules must not reach the next engine.
    from deepspeed.runtime.torch_autocast import is_autocast_initialized
    from deepspeed.utils import groups

    assert groups._get_zero_param_intra_parallel_group() is None
    assert not is_autocast_initialized()
    close(run(tmp_path, stage=stage, gradient_accumulation_steps=2), plain, 0.0)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_many_micro_batches_add_up_in_fp32(stage: int, tmp_path: Path) -> None:
    """The default at stages 2 and 3, and a choice at stage 1; close to one large micro-batch."""
    many = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    given = {"grad_accum_dtype": "fp32"} if stage == 1 else {}
    fp32 = torch.float32
    look = has_bf16_optimizer if stage == 1 else has_optimizer(gradient_accumulation_dtype=fp32)
    got = run(tmp_path, stage=stage, bf16=True, look=look, **many, **given)
    at_once = run(tmp_path, stage=stage, bf16=True, per_device_train_batch_size=4)
    close(got, at_once, 2e-2)
    lost = run(
        tmp_path,
        stage=stage,
        bf16=True,
        look=has_optimizer(gradient_accumulation_dtype=torch.bfloat16),
        **many,
        grad_accum_dtype="bf16",
    )
    close(lost, at_once, 5e-2)


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Choice(nn.Module):
    """Tokens choose one of the experts, which are modules of their own; idle ones do not run."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(Expert(width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            if mine.any():
                out[mine] = expert(x[mine]) * weight[mine].unsqueeze(-1)
        return x + out


class Routed(nn.Module):
    """A tiny language model with two such blocks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB_SIZE, width)
        self.blocks = nn.Sequential(Choice(width, 8), Choice(width, 8))
        self.head = nn.Linear(width, VOCAB_SIZE)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.blocks(self.embed(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def flagged(count: int) -> Callable[[Any], None]:
    def look(engine: Any) -> None:
        leaves = [m for m in engine.module.modules() if getattr(m, "_z3_leaf", False)]
        assert len(leaves) == count

    return look


@pytest.mark.ranks(2, timeout=200)
def test_experts_that_not_every_rank_runs_are_gathered_together(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the leaf a rank waits for gathers that the other never asks for, at stage 3."""
    from dstrain.engine import expert_blocks

    # All parameters are partitioned and let go at once, so that a gather cannot be avoided.
    tight = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    }
    (name,) = expert_blocks(Routed())
    assert name.endswith("test_zero_options.Choice")
    one = {"per_device_train_batch_size": 1}
    whole = run(tmp_path, model=Routed(), stage=0, **one)
    found = run(
        tmp_path, model=Routed(), deepspeed=tight, zero_stage="auto", look=flagged(2), **one
    )
    close(found, whole, 1e-4)
    told = [r.getMessage() for r in caplog.records if "gathered whole" in r.getMessage()]
    assert [line.split(":")[0] for line in told] == (["Choice"] if rank == 0 else [])


@pytest.mark.ranks(2, timeout=200)
def test_mixtral_trains_at_stage_3_where_ranks_route_differently(tmp_path: Path) -> None:
    """Experts that are slices of one parameter need no leaf; DeepSpeed's list has the block."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from dstrain.engine import expert_blocks

    def tiny() -> nn.Module:
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=8,
                num_experts_per_tok=1,
            )
        )

    assert expert_blocks(tiny()) == ()
    one = {"per_device_train_batch_size": 1}
    whole = run(tmp_path, model=tiny(), stage=0, **one)
    close(run(tmp_path, model=tiny(), stage=3, look=flagged(2), **one), whole, 1e-3)


@pytest.mark.ranks(2)
def test_a_leaf_class_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    trainer = make_trainer(tmp_path, stage=3, leaf_modules=["NoSuchBlock"])
    with pytest.raises(ModelError, match="NoSuchBlock.*\n.*LlamaDecoderLayer"):
        trainer.train()
    trainer.close()
