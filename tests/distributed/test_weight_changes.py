"""Weights that a user's code changes in place during training: as in plain torch, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import default_collate
from transformers import TrainerCallback

from tests.distributed.runs import losses, whole_weights
from tests.distributed.test_formats import data, trainer_of

IN_PARTS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Lets stage 3 keep no parameter whole between steps, however small."""
STAGES = [(0, {}), (2, {}), (3, {}), (3, {"deepspeed": IN_PARTS})]

Change = Callable[["Net"], None]


class Clamped(nn.Linear):
    """Keeps its weight small; 15 elements, of which two ranks have parts of 8 and 7."""

    limit: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.limit is not None:
            self.weight.data.clamp_(-self.limit, self.limit)
        return super().forward(x)


class Net(nn.Module):
    """Two layers and, as in CLIP, a scale of shape (), which may be clamped in each forward."""

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle, self.head = nn.Linear(4, 5), Clamped(5, 3), nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.middle.limit = self.limit = limit

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.limit is not None:
            with torch.no_grad():
                self.scale.clamp_(0, 3 * self.limit)
                self.first.weight.clamp_(-self.limit, self.limit)
        x = torch.tanh(self.first(x.to(self.scale.dtype)))
        seen = self.head(torch.tanh(self.middle(x))).squeeze(-1) * self.scale.exp()
        return {"loss": nn.functional.mse_loss(seen.float(), labels)}


def by_hand(model: Net, **changes: Change) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Four epochs of one step in plain torch, with what callbacks would do."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    found = []
    for _ in range(4):
        changes.get("on_epoch_begin", _nothing)(model)
        loss = model(**default_collate(data()))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        changes.get("on_step_end", _nothing)(model)
    changes.get("on_train_end", _nothing)(model)
    return found, {name: p.detach().clone() for name, p in model.named_parameters()}


def _nothing(_: Net) -> None:
    """Change nothing."""


class Changing(TrainerCallback):
    """Changes the model at the events of these names."""

    def __init__(self, **changes: Change) -> None:
        def at(name: str) -> Any:
            return lambda args, state, control, model=None, **_: changes[name](model)

        for name in changes:
            setattr(self, name, at(name))


def trained(
    folder: Path, stage: int, limit: float | None = None, settings: Any = None, **changes: Change
) -> Any:
    trainer = trainer_of(folder, Net(limit), stage, **{"save_strategy": "no", **(settings or {})})
    trainer.add_callback(Changing(**changes))
    return trainer


def check_equal(trainer: Any, expected: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    torch.testing.assert_close(losses(trainer), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole_weights(trainer), expected[1], rtol=1e-5, atol=1e-6)


# --- what changes weights -------------------------------------------------------------------------


@torch.no_grad()
def in_many_ways(model: Net) -> None:
    """Change each parameter in a way of its own."""
    model.first.weight.data.clamp_(-0.2, 0.2)
    model.first.bias.data = model.first.bias.data.clamp(-0.1, 0.1)
    model.middle.weight[0] = 0.25
    model.middle.bias -= 0.05
    torch._foreach_mul_([model.head.weight, model.head.bias], 0.9)
    nn.init.constant_(model.scale, 0.3)


@torch.no_grad()
def clamp(model: Net) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.2, 0.2)


def reset(model: Net) -> None:
    torch.manual_seed(7)
    model.head.reset_parameters()


def gathered(change: Change) -> Change:
    """What the error at stage 3 says: the main rank changes what all ranks gather."""

    def change_gathered(model: Net) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                change(model)

    return change_gathered


class Swap:
    """Lets an average take the place of the weights between two steps, as many EMA classes do."""

    def __init__(self) -> None:
        self.backup: dict[str, torch.Tensor] = {}

    def put(self, model: Net) -> None:
        for name, parameter in model.named_parameters():
            self.backup[name] = parameter.data
            parameter.data = parameter.data * 0.5

    def take_back(self, model: Net) -> None:
        for name, parameter in model.named_parameters():
            parameter.data = self.backup.pop(name, parameter.data)


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(("stage", "settings"), STAGES[1:3])
def test_callbacks_change_weights_as_in_torch(
    stage: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = trained(tmp_path, stage, settings=settings, on_step_end=in_many_ways)
    trainer.train()
    check_equal(trainer, by_hand(Net(), on_step_end=in_many_ways))
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_layer_begins_anew_in_each_epoch_as_in_torch(tmp_path: Path) -> None:
    trainer = trained(tmp_path, 2, on_epoch_end=clamp, on_epoch_begin=reset)
    trainer.train()
    check_equal(trainer, by_hand(Net(), on_step_end=clamp, on_epoch_begin=reset))
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(("stage", "settings"), STAGES[1:])
def test_forward_changes_weights_as_in_torch(
    stage: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """At stage 3 those of a module itself, and what DeepSpeed gathers because it is named."""
    trainer = trained(tmp_path, stage, 0.15, settings)
    trainer.train()
    check_equal(trainer, by_hand(Net(0.15)))
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(("stage", "settings"), [STAGES[0], STAGES[1], STAGES[2]])
def test_master_weights_follow_and_keep_their_digits(
    stage: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """In bf16: changed elements are those of the model, others are not rounded."""
    trainer = trained(tmp_path, stage, 0.15, {"bf16": True, **settings}, on_step_end=clamp)
    trainer.train()
    expected = by_hand(Net(0.15), on_step_end=clamp)
    torch.testing.assert_close(losses(trainer), expected[0], rtol=3e-2, atol=3e-2)
    weights, finer = whole_weights(trainer), 0
    for shard in trainer._engines.training.state.shards():
        master = shard.read("master")
        values = weights[shard.name].reshape(-1)[shard.start : shard.stop]
        assert torch.equal(master.to(torch.bfloat16), values)
        assert master.abs().max() <= 0.2002
        finer += int((master != values.float()).sum())
    assert finer > 5
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_change_of_parameters_in_parts_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    from dstrain.core.errors import TrainingError

    in_parts = {"deepspeed": IN_PARTS}
    whole = {name: torch.zeros_like(p) for name, p in Net().named_parameters()}
    for change, name in (
        (reset, "head.weight"),
        (clamp, "scale"),
        (lambda model: model.load_state_dict(whole), "scale"),
        (lambda model: nn.init.orthogonal_(model.middle.weight), "middle.weight"),
    ):
        trainer = trained(tmp_path, 3, settings=in_parts, on_epoch_begin=change)
        with pytest.raises(
            TrainingError, match=rf"a callback changes {name} in place .*partitioned"
        ):
            trainer.train()
        trainer.close()
    for change in (reset, in_many_ways):
        trainer = trained(tmp_path, 3, settings=in_parts, on_epoch_begin=gathered(change))
        trainer.train()
        check_equal(trainer, by_hand(Net(), on_epoch_begin=change))
        trainer.close()


class Average:
    """An average of the weights, that takes their place when training has ended."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def follow(self, model: Net) -> None:
        for name, parameter in model.named_parameters():
            self.weights.setdefault(name, parameter.clone()).lerp_(parameter, 0.1)

    @torch.no_grad()
    def put(self, model: Net) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weights[name])

    def load(self, model: Net) -> None:
        model.load_state_dict(self.weights)


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(("stage", "way"), [(2, "load"), (3, "put"), (3, "load")])
def test_an_average_that_is_put_at_the_end_stays(stage: int, way: str, tmp_path: Path) -> None:
    average, plain = Average(), Average()
    expected = by_hand(Net(), on_step_end=plain.follow, on_train_end=plain.put)
    trainer = trained(
        tmp_path, stage, on_step_end=average.follow, on_train_end=getattr(average, way)
    )
    trainer.train()
    loss = trainer.evaluate(data())["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    torch.distributed.barrier()
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    torch.testing.assert_close(saved, expected[1], rtol=1e-5, atol=1e-6)
    trainer.close(whole="cpu")
    check_equal(trainer, expected)
    with torch.no_grad():
        assert loss == pytest.approx(float(trainer.model(**default_collate(data()))["loss"]), 1e-4)


@pytest.mark.ranks(2, timeout=240)
def test_what_is_changed_after_a_training_stays(tmp_path: Path) -> None:
    """At stage 3 in small parameters, which are whole then."""
    trainer = trained(tmp_path, 3)
    trainer.train()
    clamp(trainer.model)
    expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.save_model(str(tmp_path / "saved"))
    torch.distributed.barrier()
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    torch.testing.assert_close(saved, expected, rtol=0, atol=0)
    trainer.close(whole="cpu")
    torch.testing.assert_close(whole_weights(trainer), expected, rtol=0, atol=0)


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_changed_weights_bit_for_bit(stage: int, tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "bf16": True}
    trainer = trained(tmp_path, stage, settings=saves, on_step_end=clamp)
    trainer.train()
    expected = whole_weights(trainer)
    trainer.close()
    trainer = trained(tmp_path, stage, settings=saves, on_step_end=clamp)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(whole_weights(trainer), expected, rtol=0, atol=0)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_that_are_put_back_before_the_next_step_lose_nothing(
    stage: int, tmp_path: Path
) -> None:
    swap, found = Swap(), []
    for changes in ({}, {"on_step_end": swap.put, "on_step_begin": swap.take_back}):
        trainer = trained(tmp_path, stage, settings={"bf16": True}, **changes)
        trainer.train()
        if changes:
            swap.take_back(trainer.model)
        found.append((losses(trainer), whole_weights(trainer)))
        trainer.close()
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
