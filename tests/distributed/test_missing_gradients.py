"""Parameters that get a gradient on some ranks only, or in some micro-batches of a window only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.distributed.routed import (
    OFFLOAD,
    ROUTES,
    WIDTH,
    Routed,
    check,
    data,
    trainer_of,
    zero,
)

BELOW_3: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"overlap_comm": True},
    "small buckets": zero(reduce_bucket_size=100),  # smaller than the weights of a block
    "small, overlap": {"overlap_comm": True, **zero(reduce_bucket_size=100)},
    "not contiguous": {"contiguous_gradients": False, **zero(reduce_bucket_size=100)},
    "round robin": {"round_robin_gradients": True},
    "offload": OFFLOAD,
    "all": {"overlap_comm": True, "round_robin_gradients": True, **OFFLOAD},
}


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_each_option_trains_as_plain_torch(stage: int, accumulation: int, tmp_path: Path) -> None:
    for options in BELOW_3.values():
        arguments = {"gradient_accumulation_steps": accumulation, **options}
        check(tmp_path, {"zero_stage": str(stage), **arguments})


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_16_bit_formats_train_as_plain_torch(stage: int, tmp_path: Path) -> None:
    """As far as their rounding lets one see; gradients added to others differ by far more."""
    for options in ({}, {"grad_accum_dtype": "bf16"}, {"overlap_comm": True}, OFFLOAD):
        if stage == 0 and options:
            continue
        arguments = {"bf16": True, "gradient_accumulation_steps": 3, **options}
        check(tmp_path, {"zero_stage": str(stage), **arguments}, rel=0.03)


class Checkpointed(Routed):
    """Blocks are computed again in the backward pass; the body is used twice, and its weight too.

    Attributes:
        reentrant: whether that is done by a backward pass inside the backward pass, per block.
    """

    reentrant = (False, False, False)

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(WIDTH, WIDTH)
        self.twin.weight = self.body.weight

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        from torch.utils.checkpoint import checkpoint

        hidden = torch.tanh(self.body(x))
        blocks, head = ROUTES[int(route)]
        for number in blocks:
            step = checkpoint(self.block[number], hidden, use_reentrant=self.reentrant[number])
            hidden = hidden + step
        if blocks:
            hidden = self.twin(self.body(hidden))
        return {"loss": functional.mse_loss(self.head[head](hidden).squeeze(-1), labels)}


class Reentrant(Checkpointed):
    reentrant = (True, True, True)


class Mixed(Checkpointed):
    reentrant = (True, False, True)


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("model", [Checkpointed, Reentrant, Mixed])
def test_checkpointed_and_tied_parts_train_as_plain_torch(
    model: type[nn.Module], tmp_path: Path
) -> None:
    for stage in ("1", "2"):
        for options in ({"overlap_comm": True}, zero(reduce_bucket_size=100)):
            check(tmp_path, {"zero_stage": stage, **options}, model=model)


@pytest.mark.ranks(1)
def test_a_part_that_becomes_reentrant_is_told(tmp_path: Path) -> None:
    """Its gradient has been taken for a missing one, as torch does not know of the inner pass."""
    from dstrain.core.errors import TrainingError

    class Late(Checkpointed):
        calls = 0

        def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
            self.calls += 1
            self.reentrant = (self.calls > 2, False, False)
            return super().forward(x, torch.tensor([1 if self.calls < 3 else 0]), labels)

    trainer = trainer_of(tmp_path, Late(), zero_stage="2")
    with pytest.raises(TrainingError, match=r"block\.0\.2\.\w+ came.*\n.*\n.*use_reentrant"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(1)
def test_a_part_that_is_computed_again_twice_is_refused_by_deepspeed_as_ever(
    tmp_path: Path,
) -> None:
    """Its gradient comes twice in one pass; the second part is not dropped without a word."""

    class Twice(Routed):
        def __init__(self) -> None:
            super().__init__()
            del self.unused, self.block[1:], self.head[0]

        def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
            from torch.utils.checkpoint import checkpoint

            hidden = torch.tanh(self.body(x))
            for _ in range(2):
                hidden = checkpoint(self.block[0], hidden, use_reentrant=True)
            return {"loss": functional.mse_loss(self.head[0](hidden).squeeze(-1), labels)}

    trainer = trainer_of(tmp_path, Twice(), zero_stage="2")
    with pytest.raises(AssertionError, match="already been reduced"):
        trainer.train()
    trainer.close()


class Leaf(Routed):
    """The parts that samples choose from stand in a module of their own, which all run."""

    class Choice(nn.Module):
        def __init__(self, block: nn.ModuleList, head: nn.ModuleList) -> None:
            super().__init__()
            self.block, self.head = block, head

        def forward(self, hidden: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
            blocks, head = ROUTES[int(route)]
            for number in blocks:
                hidden = hidden + self.block[number](hidden)
            return self.head[head](hidden)

    def __init__(self) -> None:
        super().__init__()
        self.choice = Leaf.Choice(self.block, self.head)
        del self.block, self.head

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        scores = self.choice(torch.tanh(self.body(x)), route)
        return {"loss": functional.mse_loss(scores.squeeze(-1), labels)}


AT_3: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing kept": {
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": 100,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            }
        }
    },
    "offload": {"offload_optimizer": "cpu", "offload_param": "cpu"},
}


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_leaf_trains_as_plain_torch_at_stage_3(accumulation: int, tmp_path: Path) -> None:
    for options in AT_3.values():
        arguments = {"gradient_accumulation_steps": accumulation, "leaf_modules": ["Choice"]}
        check(tmp_path, {"zero_stage": "3", **arguments, **options}, model=Leaf)


@pytest.mark.ranks(2)
def test_a_leaf_is_evaluated_and_saved(tmp_path: Path, rank: int) -> None:
    """While and after it trains; the loss is that of the saved file in plain torch."""
    from safetensors.torch import load_file

    trainer = trainer_of(
        tmp_path, Leaf(), zero_stage="3", leaf_modules=["Choice"], max_steps=4, eval_steps=2,
        eval_strategy="steps", per_device_eval_batch_size=1, evaluation=data()[:7],
        **AT_3["nothing kept"],
    )  # fmt: skip
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    during = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    trainer.close()
    assert len(during) == 3
    assert during[1:] == [pytest.approx(loss, rel=1e-6)] * 2
    if rank == 0:
        twin = Leaf()
        twin.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
        rows = [{k: v[None] for k, v in row.items()} for row in data()[:7]]
        expected = sum(twin(**row)["loss"].item() for row in rows) / len(rows)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.ranks(1, timeout=240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_trains_as_plain_torch(stage: int, tmp_path: Path) -> None:
    """A step in which a parameter has no gradient does not use that of the step before."""
    for options in ({}, OFFLOAD):
        for accumulation in (1, 3):
            arguments = {"gradient_accumulation_steps": accumulation, **options}
            check(tmp_path, {"zero_stage": str(stage), **arguments})
