"""Callbacks and trackers: transformers' events in its order, at the right moments."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import wandb_file
from tests.distributed.runs import make_trainer, whole_weights
from tests.models import tiny_llama


def _recorder(events: list[str]) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        """Writes down every event."""

    def method(name: str) -> Callable[..., None]:
        return lambda self, args, state, control, **kwargs: events.append(name)

    for name in dir(TrainerCallback):
        if name.startswith("on_"):
            setattr(Recorder, name, method(name))
    return Recorder


@pytest.mark.ranks(2)
def test_events_come_in_the_documented_order(tmp_path: Path) -> None:
    """Two steps per epoch of two micro-batches; evaluation and logs where they are asked for."""
    events: list[str] = []
    trainer = make_trainer(
        tmp_path,
        train=16,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        logging_steps=2,
        eval_strategy="epoch",
        eval_on_start=True,
        evaluation=4,
        per_device_eval_batch_size=2,
        callbacks=[_recorder(events)],
    )
    trainer.train()
    trainer.close()
    step = [
        "on_step_begin",
        "on_substep_end",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_step_end",
    ]
    evaluation = ["on_prediction_step", "on_log", "on_evaluate"]
    epoch = ["on_epoch_begin", *step, *step, "on_log", "on_epoch_end", *evaluation]
    expected = [
        "on_init_end",
        "on_train_begin",
        *evaluation,
        *epoch,
        *epoch,
        "on_log",
        "on_train_end",
    ]
    assert events == expected


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_change_between_the_two_optimizer_events(stage: int, tmp_path: Path) -> None:
    """on_pre_optimizer_step still sees the old weights, on_optimizer_step the new ones."""
    from transformers import TrainerCallback

    changed: list[tuple[bool, bool]] = []
    last: dict[str, torch.Tensor] = {}

    def moved() -> bool:
        now = whole_weights(trainer)
        different = any(not torch.equal(now[n], last[n]) for n in last)
        last.update(now)
        return different

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            last.update(whole_weights(trainer))

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            changed.append((moved(), False))

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            changed[-1] = (changed[-1][0], moved())

    trainer = make_trainer(tmp_path, stage=stage, max_steps=2, callbacks=[Watch])
    trainer.train()
    trainer.close()
    assert changed == [(False, True)] * 2


@pytest.mark.ranks(2)
def test_a_callback_can_stop_the_run_and_ask_for_things(tmp_path: Path) -> None:
    """should_training_stop ends the run at that step on all ranks."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3
            control.should_evaluate = state.global_step == 2

    trainer = make_trainer(tmp_path, train=32, callbacks=[Stop()])
    output = trainer.train()
    assert output.global_step == 3
    evaluated = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluated == [2]
    trainer.close()


@pytest.mark.ranks(2)
def test_tensorboard_and_wandb_record_the_run(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real trackers: an event file that TensorBoard reads back, and an offline W&B run."""
    wandb_file.go_offline(tmp_path, monkeypatch)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.setattr(sys, "argv", [sys.argv[0], "--hub_token", "marked-c0ffee", "--lr", "1"])
    trainer = make_trainer(
        tmp_path,
        stage=3,
        report_to=["tensorboard", "wandb"],
        logging_dir=str(tmp_path / "tb"),
        run_name="a run",
    )
    trainer.train()
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    trainer.close()
    if rank:
        return
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb.finish()
    reader = EventAccumulator(str(tmp_path / "tb"))
    reader.Reload()
    written = [s.value for s in reader.Scalars("train/loss")]
    assert written == pytest.approx(logged, rel=1e-5)
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= set(
        reader.Tags()["scalars"]
    )
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wandb_file.wait_until_written(file)
    assert wandb_file.history(file, "train/loss") == pytest.approx(logged)
    assert wandb_file.history(file, "train/global_step")[: len(logged)] == [1, 2, 3, 4]
    config = wandb_file.config(file)
    assert config["learning_rate"] == 1e-3
    assert config["run_name"] == "a run"
    # The command is sent too, without credentials.
    assert b"<HUB_TOKEN>" in file.read_bytes()
    assert b"marked-c0ffee" not in file.read_bytes()
    # transformers counts no parameter once ZeRO-3 has partitioned them
    assert config["model/num_parameters"] == sum(p.numel() for p in tiny_llama().parameters())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("what", ["end", "checkpoint"])
def test_wandb_uploads_the_whole_model_where_it_is_asked_to(
    what: str, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' callback would save it with its own Trainer on rank 0: empty at stage 3.

    Checkpoints are there when a callback is told of them, though saves could be in the background.
    """
    import wandb

    wandb_file.go_offline(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_LOG_MODEL", what)
    logged: dict[str, list[str]] = {}

    class Watched(wandb.Artifact):
        def add_dir(self, local_path: str, *args: Any, **kwargs: Any) -> None:
            logged[Path(local_path).name] = sorted(p.name for p in Path(local_path).iterdir())
            super().add_dir(local_path, *args, **kwargs)

    monkeypatch.setattr(wandb, "Artifact", Watched)
    trainer = make_trainer(
        tmp_path / "out", stage=3, report_to=["wandb"], save_strategy="steps", save_steps=4
    )
    trainer.train()
    trainer.close()
    if rank:
        assert not logged
        return
    wandb.finish()
    assert (
        set(logged)
        == {"end": {".wandb-model"}, "checkpoint": {".wandb-model", "checkpoint-4"}}[what]
    )
    for files in logged.values():
        assert {"config.json", "model.safetensors"} <= set(files)
    assert not (tmp_path / "out" / ".wandb-model").exists()


_WAITS = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_step_waits_for_the_device_between_logs(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two logging steps our code reads no value of a device tensor.

    Labels are counted in host memory before they go to the device, so reads inside
    ``Denominator.count`` are fine. So are looks at columns without a target, which leave out what
    is on a device, and reads of what ranks tell each other on the host about signals; DeepSpeed's
    own reads are its own. The first step of a run is left out: what its loss is a mean over is read
    off its forward pass.
    """
    from transformers import TrainerCallback

    reads: list[str] = []

    class Start(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step <= 1:
                reads.clear()

    trainer = make_trainer(
        tmp_path, stage=stage, train=48, max_steps=10, logging_steps=5, callbacks=[Start]
    )

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            stack = traceback.extract_stack()[:-1]
            nearest = next(f for f in reversed(stack) if "/torch/" not in f.filename)
            if "/dstrain/" in nearest.filename:
                reads.append(f"{Path(nearest.filename).name}:{nearest.name} at {_step(trainer)}")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in _WAITS:
        watch(name)
    trainer.train()
    monkeypatch.undo()
    trainer.close()
    on_host = (
        "rule.py:count",
        "order.py:",
        "preemption.py:answer",
        "batches.py:_has_no_target",
    )
    outside = [r for r in reads if not r.startswith(on_host)]
    at_logs = [r for r in outside if r.endswith(("at 5", "at 10"))]
    assert at_logs, "the watch itself works: logging steps do read"
    assert outside == at_logs


def _step(trainer: Any) -> int:
    return int(trainer.state.global_step)
