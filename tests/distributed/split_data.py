"""Numbered samples, parts of them for each rank, and a Trainer that notes what it trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from tests.distributed.runs import make_trainer
from tests.models import RaggedTokens, pad_collate

SAMPLES = RaggedTokens(40, seed=5).examples
EVEN, UNEVEN, SHORT = 24, 23, 7  # samples in all; on 2 and 3 ranks equal, unequal, a few


def rows(numbers: list[int]) -> list[dict[str, Any]]:
    """Make samples that hold their numbers."""
    return [{**SAMPLES[i], "number": i} for i in numbers]


def generate(numbers: list[int]) -> Iterator[dict[str, Any]]:
    yield from rows(numbers)


class Part(IterableDataset[Any]):
    """Every n-th sample, as the documentation of torch has it for loader processes."""

    def __init__(self, rank: int, world_size: int, size: int) -> None:
        self.numbers = list(range(rank, size, world_size))

    def __iter__(self) -> Iterator[Any]:
        return generate(self.numbers)


def hub_part(rank: int, world_size: int, size: int) -> Any:
    """Split by ``datasets``, one sample after the other."""
    from datasets import IterableDataset as HubDataset
    from datasets.distributed import split_dataset_by_node

    whole = HubDataset.from_generator(generate, gen_kwargs={"numbers": list(range(size))[:]})
    return split_dataset_by_node(whole, rank, world_size, strategy="examples")


def collate(samples: list[Any]) -> dict[str, Any]:
    """Collate samples, with their numbers."""
    return {**pad_collate(samples), "numbers": torch.tensor([s["number"] for s in samples])}


def recording() -> Any:
    """Return a trainer that notes the samples that were trained on this rank, epoch by epoch.

    Its predictions are the numbers of the samples.
    """
    from dstrain import Trainer

    class Recording(Trainer):
        trained: Any = None

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            numbers = inputs.pop("numbers").tolist()
            if self._micro_step.num_samples:  # 0: a stand-in
                self.trained[-1].append(numbers)
            return super().training_step(model, inputs, num_items_in_batch)

        def prediction_step(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            numbers = inputs.pop("numbers")
            loss, _, labels = super().prediction_step(model, inputs, *others, **named)
            return loss, numbers, labels

    return Recording


def trainer_of(folder: Path, data: Any, **settings: Any) -> Any:
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.trained.append([])

    settings = {
        "evaluation": 0, "per_device_train_batch_size": 1, "remove_unused_columns": False,
        "per_device_eval_batch_size": 2, "cls": recording(), **settings,
    }  # fmt: skip
    trainer = make_trainer(folder, data=data, callbacks=[Epochs()], **settings)
    trainer.data_collator = collate
    trainer.trained, trainer.evaluations = [], []
    trainer.compute_metrics = lambda given: trainer.evaluations.append(given.predictions) or {}
    return trainer


def everywhere(mine: list[list[int]]) -> list[int]:
    """Gather the samples of all ranks, in order of their numbers."""
    from dstrain.core.ranks import gather_objects

    return sorted(i for part in gather_objects(mine) for batch in part for i in batch)


def warnings_of(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if what in r.getMessage()]


def check_epochs(trainer: Any, size: int, num_epochs: int) -> None:
    assert len(trainer.trained) == num_epochs
    for epoch in trainer.trained:
        assert everywhere(epoch) == list(range(size))


def check_evaluations(trainer: Any, size: int, number: int) -> None:
    """Check that the main rank has predicted each sample once."""
    assert len(trainer.evaluations) == (number if trainer.ranks.is_main else 0)
    for numbers in trainer.evaluations:
        assert sorted(numbers.tolist()) == list(range(size))


class ClaimsLength(IterableDataset[Any]):
    """A stream that says a length, rightly or not."""

    def __init__(self, size: int, told: int) -> None:
        self.size, self.told = size, told

    def __len__(self) -> int:
        return self.told

    def __iter__(self) -> Iterator[Any]:
        return generate(list(range(self.size)))
