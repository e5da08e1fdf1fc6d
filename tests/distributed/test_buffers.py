"""Buffers that training changes: one set of values for training, evaluation and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from tests.distributed.buffers import STATE, assert_equal, buffers_of, on_all_ranks
from tests.distributed.runs import STAGES, losses, whole_weights
from tests.statistics import Statistics, rows, trainer_of


def by_ddp(model: nn.Module, order: list[int], rank: int, *, accumulation: int) -> list[float]:
    """Train with torch's DistributedDataParallel by hand; return the mean loss of every step."""
    import contextlib

    import torch.distributed as dist

    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    data, found, micro = rows(24), [], 2 * 2
    for first in range(0, len(order), micro * accumulation):
        total = torch.zeros(())
        for part in range(accumulation):
            begin = first + part * micro + 2 * rank
            batch = default_collate([data[k] for k in order[begin : begin + 2]])
            waits = contextlib.nullcontext() if part == accumulation - 1 else ddp.no_sync()
            with waits:
                loss = ddp(**batch)["loss"] / accumulation
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        found.append(total.item() / 2)
    return found


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_goes_the_course_of_ddp(
    stage: int, accumulation: int, tmp_path: Path, rank: int
) -> None:
    """With buffers in place of which DDP knows; it does not notice one that was replaced."""
    from dstrain.data import EpochOrder

    trainer = trainer_of(
        tmp_path, Statistics(replaces=False), stage, lr_scheduler_type="constant",
        max_grad_norm=0.0, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train()
    trainer.close()
    order = EpochOrder(24, seed=42, shuffle=True).indices(0).tolist()
    twin = Statistics(replaces=False)
    expected = by_ddp(twin, order, rank, accumulation=accumulation)
    assert losses(trainer) == pytest.approx(expected, rel=2e-5)
    theirs = buffers_of(twin)
    if rank == 0:
        for name, values in buffers_of(trainer.model).items():
            assert torch.allclose(values, theirs[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_the_saved_model_and_all_ranks_agree(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """The loss is that of the saved file in plain torch; so is an evaluation in training."""
    from safetensors.torch import load_file

    trainer = trainer_of(
        tmp_path, Statistics(), stage, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    one, two = on_all_ranks(trainer.model)
    one.pop("cache"), two.pop("cache")  # each rank's own
    assert one == two
    trainer.save_model(str(tmp_path / "saved"))
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    passing = {name: getattr(trainer.model, name) for name in ("passing", "count")}
    trainer.close()
    batch = default_collate(rows(12, seed=5))

    def alone(file: Path, beside: dict[str, torch.Tensor]) -> float:
        twin = Statistics()
        assert not twin.load_state_dict(load_file(file)).missing_keys
        for name, values in beside.items():
            setattr(twin, name, values)
        with torch.no_grad():
            return twin.eval()(**batch)["loss"].item()

    assert alone(tmp_path / "saved/model.safetensors", passing) == pytest.approx(after, rel=1e-6)
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        beside = load_file(folder / "state/other_buffers.safetensors")
        assert set(beside) == {"passing", "count"}
        assert alone(folder / "model.safetensors", beside) == pytest.approx(
            evaluated[step], rel=1e-6
        )


@pytest.mark.ranks(2, timeout=240)
def test_the_saved_model_is_the_main_ranks(tmp_path: Path, rank: int) -> None:
    """Where each rank has its own: in a checkpoint, by ``save_model``, with and without engine."""
    from safetensors.torch import load_file

    from dstrain.core.ranks import gather_objects

    trainer = trainer_of(
        tmp_path, Statistics(), 2, ddp_broadcast_buffers=False, save_strategy="steps", save_steps=6
    )
    trainer.train()
    own = buffers_of(trainer.model)
    expected = gather_objects(own)[0]
    trainer.save_model(str(tmp_path / "one"))
    trainer.close()
    trainer.save_model(str(tmp_path / "two"))
    assert_equal(buffers_of(trainer.model), own)
    for folder in ("one", "two", "checkpoint-6"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        for name in ("mean", "norm.running_var", "average"):
            assert torch.equal(saved[name], expected[name]), (folder, name)
    assert (rank == 1) is not torch.equal(own["mean"], expected["mean"])


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("apart", [False, True])
def test_evaluations_do_not_change_training(apart: bool, tmp_path: Path) -> None:
    """Not even where the model gathers in evaluation mode too."""
    settings = {"ddp_broadcast_buffers": not apart}
    without = trainer_of(tmp_path, Statistics(in_evaluation=True), 2, **settings)
    without.train()
    weights, buffers = whole_weights(without), buffers_of(without.model)
    without.close()
    with_them = trainer_of(
        tmp_path, Statistics(in_evaluation=True), 2, eval_strategy="steps", eval_steps=1, **settings
    )
    with_them.train()
    assert losses(with_them) == losses(without)
    assert_equal(whole_weights(with_them), weights)
    assert_equal(buffers_of(with_them.model), buffers, but={"cache"})
    with_them.close()


class Spy:
    """Counts the collectives that begin while it watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch.distributed as dist

        self.counts: dict[str, int] = {}
        for name in ("broadcast", "all_gather_object"):
            monkeypatch.setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("kind", ["llama", "statistics", "apart"])
def test_what_a_step_costs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where no buffer changes; one broadcast per step, whatever the micro-batches, else."""
    from transformers import TrainerCallback

    from tests.distributed.runs import make_trainer

    seen: dict[int, dict[str, int]] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            spy.counts.clear()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            seen[state.global_step + 1] = dict(spy.counts)

    settings = {"max_steps": 9, "gradient_accumulation_steps": 2, "preemption": "ignore"}
    settings |= {"callbacks": [Look()], "logging_steps": 100, "num_train_epochs": 3}
    if kind == "llama":
        trainer = make_trainer(tmp_path, train=24, **settings)
    else:
        apart = kind == "apart"
        trainer = trainer_of(tmp_path, Statistics(), 2, ddp_broadcast_buffers=not apart, **settings)
    spy = Spy(monkeypatch)
    trainer.train()
    sends = int(kind == "statistics")
    assert sorted(seen) == list(range(1, 10))
    for step, counts in seen.items():
        looks = step == 1
        assert counts.get("broadcast", 0) == sends, step
        assert (counts.get("all_gather_object", 0) > 0) is looks, step
    expected = set() if kind == "llama" else STATE
    assert set(trainer._engines.training.buffers.found()["state"]) == expected
    trainer.close()


class Late(Statistics):
    """One rank begins to gather in another buffer later on."""

    def __init__(self) -> None:
        super().__init__(replaces=False)
        self.register_buffer("late", torch.zeros(2))

    def gather(self, hidden: torch.Tensor) -> None:
        import torch.distributed as dist

        super().gather(hidden)
        if self.count >= 3:
            self.late += 1 + dist.get_rank()


@pytest.mark.ranks(2, timeout=240)
def test_a_buffer_that_begins_to_change_later_is_found(tmp_path: Path) -> None:
    """By the next evaluation or checkpoint."""
    trainer = trainer_of(tmp_path, Late(), 2, max_steps=3)
    trainer.train()
    one, two = on_all_ranks(trainer.model)
    assert (one["late"], two["late"]) == ([1.0, 1.0], [2.0, 2.0])
    trainer.evaluate()
    one, two = on_all_ranks(trainer.model)
    assert one["late"] == two["late"] == [1.0, 1.0]
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_that_ran_out_of_memory_leaves_no_trace(
    step: int, tmp_path: Path, rank: int
) -> None:
    """Its micro-batches had changed statistics, and are run again with smaller ones."""
    short: dict[str, Any] = {"failures": 0}

    def check(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        late = module.training and short["trainer"].state.global_step >= step
        if rank == 1 and late and output.shape[0] > 2:
            short["failures"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Pretended.")

    settings = {"max_grad_norm": 0.0, "per_device_train_batch_size": 4, "max_steps": 3}
    model = Statistics(replaces=False)
    model.last.register_forward_hook(check)
    trainer = trainer_of(tmp_path, model, 2, auto_find_batch_size=True, **settings)
    short["trainer"] = trainer
    trainer.train()
    assert short["failures"] == rank
    # Two micro-batches per step from the one on that broke off, and none of that one.
    assert model.norm.num_batches_tracked.item() == step + 2 * (3 - step)
    one, two = on_all_ranks(model)
    assert {name: one[name] for name in STATE - {"average"}} == {
        name: two[name] for name in STATE - {"average"}
    }
    trainer.close()
