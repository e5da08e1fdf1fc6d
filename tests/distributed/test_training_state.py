"""The state of an engine: captured and restored to the bit, and loaded in one block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.distributed.runs import STAGES, make_trainer, whole_weights


class AtStep(TrainerCallback):
    """Runs a check inside of training, where weights and master weights belong together."""

    def __init__(self, step: int, check: Callable[[], None]) -> None:
        self.step, self.check, self.has_run = step, check, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.check()
            self.has_run = True


def trained(folder: Path, stage: int, check: Callable[[Any], None] | None = None) -> Any:
    """Train four steps in bf16, with a check after the second."""
    trainer: Any = None
    callback = AtStep(2, lambda: None if check is None else check(trainer))
    trainer = make_trainer(folder, stage=stage, bf16=True, evaluation=0, callbacks=[callback])
    trainer.train()
    assert callback.has_run
    return trainer


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_captured_comes_back_to_the_bit(stage: int, tmp_path: Path) -> None:
    """Weights follow what is written in the block; a restored run goes on as if untouched."""

    def overwrite_and_restore(trainer: Any) -> None:
        state = trainer._engines.training.state
        before, captured = whole_weights(trainer), state.capture()
        assert len(captured.tensors) >= 3  # master weights and both moments of AdamW
        with state.loading() as shards:
            for shard in shards:
                for key in shard.tensor_keys():
                    shard.write(key, shard.start, torch.zeros(shard.numel))
        assert all(not values.any() for values in whole_weights(trainer).values())
        state.restore(captured)
        for name, values in whole_weights(trainer).items():
            assert torch.equal(values, before[name]), name
        again = state.capture()
        assert again.scalars == captured.scalars
        assert again.progress == captured.progress
        for place, values in captured.tensors.items():
            assert torch.equal(again.tensors[place], values), place

    plain = trained(tmp_path / "plain", stage)
    expected = whole_weights(plain)
    plain.close()
    restored = trained(tmp_path / "restored", stage, overwrite_and_restore)
    for name, values in whole_weights(restored).items():
        assert torch.equal(values, expected[name]), name
    restored.close()


@pytest.mark.ranks(2, timeout=300)
def test_an_error_of_one_rank_ends_loading_on_both(rank: int, tmp_path: Path) -> None:
    """No rank goes on to the collective that lets the weights follow."""
    from dstrain.core.errors import CheckpointError

    def load(trainer: Any) -> None:
        with trainer._engines.training.state.loading():
            if rank == 1:
                raise CheckpointError("a damaged slice")

    with pytest.raises(CheckpointError, match="a damaged slice"):
        trained(tmp_path, 2, load)
