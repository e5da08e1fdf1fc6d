"""A run that ends inside of an epoch goes on there, whenever it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.models import tiny_llama

BATCH, ROWS = 4, 37  # on two ranks 5 steps an epoch, the last with 5 samples
CUT, END = 8, 13


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Token ids that no two rows share."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 60, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The same rows, read from the start in each epoch."""

    def __iter__(self) -> Any:
        return (Rows()[index] for index in range(ROWS))


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Ends training after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the training as an early stop does."""
        control.should_training_stop |= state.global_step == CUT


def losses(folder: Path, data: Any, resume: bool, *callbacks: Any, **arguments: Any) -> list[float]:
    """Return the loss of each step that this run has trained."""
    from dstrain import Trainer, TrainingArguments

    arguments = {"save_strategy": "epoch", **arguments}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **arguments,
    )
    trainer = Trainer(tiny_llama(), args, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == CUT or trainer.state.global_step == END
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.close()
    return history


@pytest.mark.ranks(2)
@pytest.mark.parametrize("how", ["max_steps", "part_of_an_epoch", "callback", "stream"])
def test_a_run_that_ended_inside_of_an_epoch_goes_on_at_the_same_sample(
    how: str, tmp_path: Path
) -> None:
    """Saved at the end of what there is of the last epoch: its rest is trained later."""
    data = Stream() if how == "stream" else Rows()
    ends: dict[str, Any] = {"max_steps": CUT}
    goes_on: dict[str, Any] = {"max_steps": END}
    if how == "part_of_an_epoch":
        ends, goes_on = {"num_train_epochs": 1.5}, {"num_train_epochs": 2.5}
    callbacks = []
    if how == "callback":
        ends, callbacks = goes_on, [StopAt()]
    straight = losses(tmp_path / "straight", data, False, save_strategy="no", **goes_on)
    assert len(straight) == END
    losses(tmp_path / "run", data, False, *callbacks, **ends)
    resumed = losses(tmp_path / "run", data, True, **goes_on)
    assert resumed == straight


class ShortEpochs(TrainerCallback):  # type: ignore[misc]
    """Ends each epoch after two steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the end of the epoch, in every second step."""
        control.should_epoch_stop |= state.global_step % 2 == 0


@pytest.mark.ranks(2)
@pytest.mark.parametrize("resumes", [False, True])
def test_epochs_that_a_callback_cuts_short_count(resumes: bool, tmp_path: Path) -> None:
    """Three epochs of two steps, as in transformers; they went on for as many steps as three whole
    epochs have."""
    from dstrain import Trainer, TrainingArguments

    def train(num_epochs: float, resume: bool) -> Any:
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=BATCH,
            num_train_epochs=num_epochs,
            save_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_llama(), args, train_dataset=Rows(), callbacks=[ShortEpochs()])
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return trainer.state

    if resumes:
        assert train(2, False).global_step == 4
    state = train(3, resumes)
    assert state.global_step == 6
    assert state.epoch == pytest.approx(2.4)


@pytest.mark.ranks(1)
def test_a_stream_counts_its_epochs_as_transformers_does(tmp_path: Path) -> None:
    """``max_steps`` count as one epoch, from the begin of each: 10 steps, then 2 of 12."""
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=BATCH,
        max_steps=12,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(tiny_llama(), args, train_dataset=Stream())
    trainer.train()
    trainer.close()
    epochs = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [step / 12 for step in range(1, 11)] + [1 + 1 / 12, 1 + 2 / 12]
    assert epochs == pytest.approx(expected, abs=1e-3)
