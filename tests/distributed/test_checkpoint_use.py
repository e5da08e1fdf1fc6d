"""Checkpoints for users: reading them, how many are kept, failed writes, states of callbacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resumed_runs import from_rank_zero
from tests.distributed.runs import make_trainer, whole_weights
from tests.models import tiny_llama


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_from_pretrained_reads_a_checkpoint(stage: int, asynchronous: bool, tmp_path: Path) -> None:
    """The model of that step, in the format it trains in, with its config."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(
        tmp_path, stage=stage, bf16=True, max_steps=2, save_strategy="steps", save_steps=2,
        save_async=asynchronous,
    )  # fmt: skip
    trainer.train()
    expected = whole_weights(trainer)
    trainer.close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.ranks(2, timeout=300)
def test_what_is_kept_and_left_out(tmp_path: Path) -> None:
    """save_total_limit, save_only_model, save_weights_with_checkpoint, a share as save_steps."""
    from dstrain.checkpoint import committed, verify
    from dstrain.core.errors import CheckpointError

    def trained(name: str, **settings: Any) -> list[Path]:
        trainer = make_trainer(
            tmp_path / name, max_steps=4, save_strategy="steps", evaluation=0, **settings
        )
        trainer.train()
        trainer.close()
        found = committed(tmp_path / name)
        assert all(verify(f.folder)[1] == [] for f in found)
        return [f.folder for f in found]

    assert [f.name for f in trained("limit", save_steps=1, save_total_limit=2)] == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert [f.name for f in trained("share", save_steps=0.5)] == ["checkpoint-2", "checkpoint-4"]
    (only,) = trained("only", save_steps=4, save_only_model=True)
    assert not (only / "state").exists()
    assert (only / "model.safetensors").exists()
    trainer = make_trainer(tmp_path / "only", max_steps=4)
    with pytest.raises(CheckpointError, match="model alone"):
        trainer.train(str(only))
    (without,) = trained("without", save_steps=4, save_weights_with_checkpoint=False)
    assert not list(without.glob("*.safetensors"))
    trainer = make_trainer(tmp_path / "without", max_steps=6)
    trainer.train("auto")
    assert trainer.state.global_step == 6
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    """All differences at once, before anything is changed."""
    from dstrain.core.errors import CheckpointError

    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.close()
    trainer = make_trainer(tmp_path, model=tiny_llama(hidden_size=32, num_hidden_layers=1))
    with pytest.raises(
        CheckpointError, match=r"(?s)only the checkpoint has.*has shape \(259, 32\)"
    ):
        trainer.train(True)
    trainer.close()
    model = tiny_llama()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = make_trainer(tmp_path, model=model, optimizers=(sgd, None))
    with pytest.raises(CheckpointError, match="SGD needs"):
        trainer.train(True)
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_of_one_rank_stops_or_not_and_leaves_nothing(
    asynchronous: bool, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk of one rank, as the system reports it."""
    from dstrain.checkpoint import capture, committed
    from dstrain.core.errors import CheckpointError

    real = capture.write_tensor_file
    full = {"at": 2}

    def sometimes(path: Path, *args: Any) -> Any:
        if rank == 1 and f"checkpoint-{full['at']}." in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *args)

    monkeypatch.setattr(capture, "write_tensor_file", sometimes)
    settings = {
        "save_strategy": "steps", "save_steps": 1, "max_steps": 4, "evaluation": 0,
        "save_async": asynchronous,
    }  # fmt: skip
    trainer = make_trainer(tmp_path / "stop", **settings)
    with pytest.raises(CheckpointError, match="rank 1: OSError.*No space left"):
        trainer.train()
    trainer.close()
    assert [f.step for f in committed(tmp_path / "stop")] == [1]
    assert not list((tmp_path / "stop").glob(".checkpoint*"))
    trainer = make_trainer(tmp_path / "go", save_failure="continue", **settings)
    trainer.train()
    trainer.close()
    assert [f.step for f in committed(tmp_path / "go")] == [1, 3, 4]
    full["at"] = 0
    trainer = make_trainer(tmp_path / "stop", **settings)
    trainer.train("auto")
    trainer.close()
    assert [f.step for f in committed(tmp_path / "stop")] == [1, 2, 3, 4]


@pytest.mark.ranks(2, timeout=300)
def test_the_newest_that_verifies_is_resumed(tmp_path: Path, rank: int) -> None:
    """A damaged newest checkpoint costs its steps, not the run."""
    settings = {"save_strategy": "steps", "save_steps": 2, "evaluation": 0}
    trainer = make_trainer(tmp_path, max_steps=4, **settings)
    trainer.train()
    trainer.close()
    if rank == 0:
        os.truncate(tmp_path / "checkpoint-4/state/rank-00001.safetensors", 100)
    from_rank_zero("")
    steps = []

    class Watch(make_callback()):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    trainer = make_trainer(tmp_path, max_steps=5, callbacks=[Watch], **settings)
    trainer.train(True)
    assert steps == [3, 4, 5]
    trainer.close()


def make_callback() -> Any:
    from transformers import TrainerCallback

    return TrainerCallback


@pytest.mark.ranks(2, timeout=300)
def test_states_of_callbacks_come_back_when_asked_for(tmp_path: Path) -> None:
    """Early stopping and the like must not start counting anew."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Counting(TrainerCallback, ExportableState):
        def __init__(self, patience: int = 1) -> None:
            self.patience, self.count = patience, 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.count += 1

        def state(self) -> dict[str, Any]:
            return {"args": {"patience": self.patience}, "attributes": {"count": self.count}}

    common = {"save_strategy": "steps", "save_steps": 2, "evaluation": 0}
    for restores in (False, True):
        trainer = make_trainer(
            tmp_path / str(restores), callbacks=[Counting(7)], max_steps=2, **common
        )
        trainer.train()
        trainer.close()
        trainer = make_trainer(
            tmp_path / str(restores),
            callbacks=[Counting(1)],
            max_steps=3,
            restore_callback_states_from_checkpoint=restores,
            **common,
        )
        trainer.train(True)
        (here,) = [c for c in trainer.events.handler.callbacks if isinstance(c, Counting)]
        assert (here.patience, here.count) == ((7, 3) if restores else (1, 1))
        trainer.close()
