"""A signal during an evaluation of training: all end it between two batches, and do it again."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resumed_runs import Stream, assert_same, noisy_llama, run_file
from tests.distributed.runs import history, make_trainer, whole_weights
from tests.distributed.test_preemption import send
from tests.models import PAD_TOKEN_ID, RaggedTokens, tiny_t5

AT_BATCH = 3
NUM_BATCHES = 9  # of each set, on each rank


@pytest.fixture(autouse=True)
def _asks_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask after every batch: those of these runs are too short for twice a second."""
    from dstrain.training import preemption

    monkeypatch.setattr(preemption, "_EXCHANGE_SECONDS", 0.0)


def interrupting(step: int, *, which: int, here: bool) -> Any:
    """Send a signal in the ``which``-th evaluation of a step, and count its batches after that."""
    from transformers import TrainerCallback

    class Interrupting(TrainerCallback):
        batches = evaluations = after = 0
        sent = False

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step != step:
                return
            self.after += self.sent
            self.batches += 1
            if self.batches == AT_BATCH and self.evaluations == which and not self.sent:
                self.sent = True
                send(signal.SIGTERM, here=here)()

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                self.evaluations += 1
                self.batches = 0

    return Interrupting()


class BatchMetric:
    """With ``batch_eval_metrics``: the number of rows, and the sum of what was predicted."""

    def __init__(self) -> None:
        self.rows = self.total = 0

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        self.rows += len(prediction.predictions)
        self.total += int(prediction.predictions.sum())
        if not compute_result:
            return {}
        result = {"rows": float(self.rows), "total": float(self.total)}
        self.rows = self.total = 0
        return result


def collected_metric(prediction: Any) -> dict[str, float]:
    """Compute a metric of all predictions; the smaller, the "better"."""
    return {"odd": float(prediction.predictions.mean())}


def t5_collate(examples: Sequence[Any]) -> dict[str, Any]:
    """Make a batch of token ids that the tiny T5 has."""
    from tests.models import pad_collate

    batch = pad_collate(examples)
    batch["input_ids"] = batch["input_ids"] % 62 + 2
    batch["labels"] = batch["labels"].clamp(min=PAD_TOKEN_ID) % 62 + 2
    return batch


def generating(folder: Path, *, callbacks: Any, **settings: Any) -> Any:
    """Make a trainer that draws random numbers in training and when it generates."""
    from dstrain import Seq2SeqTrainer, Seq2SeqTrainingArguments

    trainer = Seq2SeqTrainer(
        tiny_t5(),
        Seq2SeqTrainingArguments(
            str(folder), zero_stage="3", per_device_train_batch_size=2,
            per_device_eval_batch_size=1,
            predict_with_generate=True, generation_max_length=6, report_to="none", logging_steps=1,
            disable_tqdm=True, batch_eval_metrics=True, **settings,
        ),
        data_collator=t5_collate,
        train_dataset=RaggedTokens(22),
        eval_dataset=RaggedTokens(2 * NUM_BATCHES - 1, seed=99),
        compute_metrics=BatchMetric(),
        callbacks=callbacks,
    )  # fmt: skip
    trainer.model.generation_config.do_sample = True
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return trainer


def llama(folder: Path, **settings: Any) -> Any:
    """Make a trainer of a stage, on one evaluation set or two, with or without metrics."""
    from dstrain import Trainer

    metric = settings.pop("metric", None)

    class Measuring(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, compute_metrics=metric)

    sets = settings.pop("sets", ())
    one = RaggedTokens(2 * NUM_BATCHES - 1, seed=99)
    return make_trainer(
        folder, cls=Measuring, model=noisy_llama(), train=22, per_device_eval_batch_size=1,
        evaluation={name: one for name in sets} or one, **settings,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Where the signal comes, and in what kind of run."""

    step: int
    which: int = 0
    make: Any = llama
    settings: dict[str, Any] = field(default_factory=dict)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "odd", "greater_is_better": False}
CASES = {
    "with what is saved, judged and followed at the step": Case(
        4,
        settings={
            "stage": 1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, **BEST,
            "metric": collected_metric, "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}, "max_steps": 8,
            "data": Stream(22),
        },
    ),
    "the second of two sets, at an epoch's end": Case(
        6,
        which=1,
        settings={
            "stage": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "sets": ("a", "b"),
            "max_steps": 8, "metric_for_best_model": "a_loss", "load_best_model_at_end": True,
            "restore_callback_states_from_checkpoint": True, "report_to": "tensorboard",
        },
    ),
    "after the last step": Case(
        5, settings={"stage": 3, "eval_strategy": "steps", "eval_steps": 5, "max_steps": 5}
    ),
    "before the first step": Case(
        0, settings={"stage": 1, "eval_on_start": True, "max_steps": 3}
    ),
    "of text that is drawn, batch by batch": Case(
        2, make=generating, settings={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    ),
}  # fmt: skip


def outcome(trainer: Any, folder: Path) -> dict[str, Any]:
    """Return the outcome of a run, without times and speeds."""
    from dstrain.checkpoint import committed, read_manifest

    last = committed(folder)[-1].folder
    files = read_manifest(last).files
    found = {
        "weights": whole_weights(trainer),
        "history": history(trainer),
        "state": {name: r for name, r in files.items() if name.endswith(".safetensors")},
        "run": run_file(last),
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
        "best folder": Path(trainer.state.best_model_checkpoint or "").name,
        "saved": {c.step: content(c.folder) for c in committed(folder)},
    }
    trainer.close()
    return found


def content(folder: Path) -> Any:
    """Read a checkpoint's metrics, position, state of ranks, weights and optimizer."""
    from dstrain.checkpoint import read_manifest

    manifest = read_manifest(folder)
    names = [n for n in manifest.files if n.endswith(".safetensors") or "/rank-" in n]
    metrics = [n for n in manifest.metrics if "second" not in n and "runtime" not in n]
    return (
        {n: manifest.metrics[n] for n in metrics},
        run_file(folder),
        {n: manifest.files[n] for n in names},
    )


def callbacks_of(case: Case) -> list[Any]:
    """Make a callback that counts evaluations which found nothing better, and never stops."""
    from transformers import EarlyStoppingCallback

    if "metric_for_best_model" not in case.settings:
        return []
    return [EarlyStoppingCallback(early_stopping_patience=9)]


def evaluated_points(folder: Path) -> list[tuple[str, int]]:
    """Return what TensorBoard was told of evaluations by the runs in a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return sorted(
        (value.tag, event.step)
        for path in folder.glob("runs/*/events.out.tfevents*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag.startswith("eval/")
    )


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("name", CASES)
def test_the_evaluation_ends_soon_and_the_next_run_does_it_again(
    name: str, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same batch of all ranks; the run that goes on is the one that was never stopped."""
    from dstrain.checkpoint import committed
    from dstrain.core.ranks import gather_objects

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # which is set for the tracker to read
    case = CASES[name]
    settings = {"save_strategy": "steps", "save_steps": 100, **case.settings}
    counts = callbacks_of(case)
    trainer = case.make(tmp_path / "whole", callbacks=counts, **settings)
    trainer.train()
    patience = [c.early_stopping_patience_counter for c in counts]
    whole = outcome(trainer, tmp_path / "whole")

    watch = interrupting(case.step, which=case.which, here=rank == 1)
    trainer = case.make(
        tmp_path / "again", callbacks=[*callbacks_of(case), watch], preemption="return", **settings
    )
    assert trainer.train().global_step == case.step
    assert trainer.preempted
    assert watch.sent
    assert gather_objects(watch.after) == [watch.after] * 2
    assert 0 < watch.after <= 2
    saved = [found.step for found in committed(tmp_path / "again")]
    assert saved[-1:] == [case.step] * bool(case.step)
    assert not [e for e in history(trainer) if e["step"] == case.step and "eval_loss" in e]
    trainer.close()

    counts = callbacks_of(case)
    trainer = case.make(tmp_path / "again", callbacks=counts, **settings)
    trainer.train("auto")
    restored = [c for c in trainer.events.exportable() if hasattr(c, "early_stopping_patience")]
    if settings.get("restore_callback_states_from_checkpoint"):
        assert [c.early_stopping_patience_counter for c in restored] == patience
    again = outcome(trainer, tmp_path / "again")
    assert_same(again, whole)
    for key in ("best", "best folder"):
        assert again[key] == whole[key], key
    if "report_to" in settings and rank == 0:
        points = evaluated_points(tmp_path / "whole")
        assert evaluated_points(tmp_path / "again") == points
        assert len(set(points)) == len(points) > 0
    for step, expected in whole["saved"].items():
        assert again["saved"][step] == expected, step


@pytest.mark.ranks(2, timeout=120)
def test_an_error_on_one_rank_is_still_raised_on_all(tmp_path: Path, rank: int) -> None:
    """No rank waits in an exchange for one that waits for predictions."""
    settings = {"stage": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = llama(
        tmp_path, metric=collected_metric, eval_accumulation_steps=4, **settings
    )  # fmt: skip
    step, calls = trainer.prediction_step, []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 6 and rank == 1:
            raise MemoryError("rank 1 alone")
        return step(*args, **kwargs)

    trainer.prediction_step = breaks
    with pytest.raises(MemoryError, match="rank 1 alone"):
        trainer.train()
    trainer.close()
