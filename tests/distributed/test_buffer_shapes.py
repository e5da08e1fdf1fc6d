"""Buffers that training changes and whose shape or format changes, or differs between ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.buffers import STATE, assert_equal, buffers_of, on_all_ranks
from tests.distributed.runs import history, whole_weights
from tests.statistics import Statistics, trainer_of


class Growing(Statistics):
    """Appends to a buffer at every step, on each rank as many elements as it has rows."""

    def __init__(self) -> None:
        super().__init__(replaces=False)
        self.register_buffer("memory", torch.zeros(1))

    def gather(self, hidden: torch.Tensor) -> None:
        super().gather(hidden)
        self.memory = torch.cat([self.memory, hidden.flatten()[:1]])
        self.mean += 0.01 * self.memory.sum()


class Strays(Statistics):
    """Gives a buffer another form in an ordinary step, on one rank or on both."""

    def __init__(self, ranks: tuple[int, ...], form: tuple[int, ...] | None) -> None:
        super().__init__(replaces=False)
        self.ranks, self.form = ranks, form
        self.register_buffer("stray", torch.zeros(3))

    def gather(self, hidden: torch.Tensor) -> None:
        import torch.distributed as dist

        super().gather(hidden)
        if self.count == 3 and dist.get_rank() in self.ranks:
            self.stray = None if self.form is None else torch.zeros(self.form)
        if self.stray is not None:
            self.stray += 1 + dist.get_rank()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("form", [None, (2, 300)])
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_buffer_that_takes_another_form_between_two_looks(
    ranks: tuple[int, ...], form: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """It is each rank's own from then on; all other buffers stay the main rank's."""
    settings = {"save_strategy": "steps", "save_steps": 6}
    straight = trainer_of(tmp_path, Strays(ranks, form), 2, max_steps=8, **settings)
    straight.train()
    model = straight.model
    one, two = on_all_ranks(model)
    assert {name: one[name] for name in STATE} == {name: two[name] for name in STATE}
    # Three elements once per step where it stays; what was made in the third step, from then on.
    expected: list[Any] = []
    for rank in (0, 1):
        if rank in ranks:
            made = None if form is None else torch.full(form, 6.0 * (1 + rank))
        else:  # the main rank's after two steps
            made = torch.full((3,), 2.0 + 6.0 * (1 + rank) if rank else 8.0)
        expected.append(None if made is None else made.tolist())
    assert [one.get("stray"), two.get("stray")] == expected
    varies = form is not None or len(ranks) == 1
    assert straight._engines.training.buffers.found()["varying"] == ["stray"] * varies
    found = history(straight)
    straight.close()
    again = trainer_of(tmp_path / "again", Strays(ranks, form), 2, max_steps=8)
    again.train(str(tmp_path / "checkpoint-6"))
    assert history(again) == found
    assert on_all_ranks(again.model) == [one, two]
    again.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_buffer_that_changes_its_shape(stage: int, tmp_path: Path) -> None:
    """Each rank keeps its own, and gets it back with the shape that it had."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", Growing(), stage, **settings)
    whole.train()
    weights, buffers = whole_weights(whole), buffers_of(whole.model)
    one, two = on_all_ranks(whole.model)
    assert one["memory"] != two["memory"]
    assert one["mean"] == two["mean"]
    assert buffers["memory"].shape == (7,)
    whole.close()
    again = trainer_of(tmp_path / "again", Growing(), stage, **settings)
    again.train(str(tmp_path / "whole/checkpoint-3"))
    assert history(again) == history(whole)
    assert_equal(whole_weights(again), weights)
    assert_equal(buffers_of(again.model), buffers)
    again.close()


@pytest.mark.ranks(2, timeout=240)
def test_shapes_that_do_not_fit_are_an_error(tmp_path: Path, rank: int) -> None:
    """Between the ranks of a run, and between a checkpoint and the model."""
    from dstrain.core.errors import CheckpointError, ModelError

    def made(size: int) -> nn.Module:
        model = Statistics(replaces=False)
        model.register_buffer("table", torch.zeros(size))
        return model

    with pytest.raises(ModelError, match="table is not the same on rank 0 and rank 1") as caught:
        trainer_of(tmp_path, made(2 + rank), 2).train()
    assert "ddp_broadcast_buffers=False" in str(caught.value)
    trainer = trainer_of(tmp_path, made(2 + rank), 2, ddp_broadcast_buffers=False, max_steps=1)
    trainer.train()
    trainer.close()
    trainer = trainer_of(tmp_path, made(2), 2, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.close()
    trainer = trainer_of(tmp_path / "again", made(4), 2)
    with pytest.raises(CheckpointError, match=r"buffer table has shape \(4,\), in .* \(2,\)"):
        trainer.train(str(tmp_path / "checkpoint-3"))
    trainer.close()
