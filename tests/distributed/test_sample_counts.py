"""Speeds and losses per sample count samples, whatever the first dimension of a batch is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed.runs import make_trainer

PATCHES = 3


class Patches(nn.Module):
    """Images as patches, all of a batch in one tensor, as in Qwen2-VL: three to a sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 2)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.head(pixel_values).unflatten(0, (len(labels), PATCHES)).mean(1)
        return nn.functional.cross_entropy(logits, labels), logits


def _samples(number: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {"patches": torch.randn(PATCHES, 4, generator=draw), "label": i % 2} for i in range(number)
    ]


def _collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.cat([s["patches"] for s in samples]),
        "labels": torch.tensor([s["label"] for s in samples]),
    }


def _trainer(folder: Path, cls: Any = None, **arguments: Any) -> Any:
    from dstrain import Trainer

    trainer = make_trainer(
        folder,
        cls=cls or Trainer,
        model=Patches(),
        data=_samples(11),
        evaluation=_samples(10),
        remove_unused_columns=False,
        per_device_eval_batch_size=4,
        **arguments,
    )
    trainer.data_collator = _collate
    return trainer


@pytest.mark.ranks(2)
def test_losses_of_an_evaluation_are_one_per_sample(tmp_path: Path, rank: int) -> None:
    """Not one per patch, of which there are three times as many."""
    seen: list[Any] = []

    def metric(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    trainer = _trainer(tmp_path, include_for_metrics=["loss"])
    trainer.compute_metrics = metric
    metrics = trainer.evaluate()
    speed = metrics["eval_samples_per_second"] * metrics["eval_runtime"]
    assert speed == pytest.approx(10, rel=0.05)
    if rank == 0:
        (prediction,) = seen
        assert prediction.losses.shape == prediction.label_ids.shape == (10,)
        assert np.mean(prediction.losses) == pytest.approx(metrics["eval_loss"], rel=1e-6)
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("own_loader", [False, True])
def test_the_speed_of_training_counts_samples(own_loader: bool, tmp_path: Path, rank: int) -> None:
    """Of a user's own loader too, whose batches are not those of the arguments."""
    from dstrain import Trainer

    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            sampler = torch.utils.data.DistributedSampler(
                self.train_dataset, num_replicas=2, rank=rank, drop_last=True
            )
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_size=5, sampler=sampler, collate_fn=_collate
            )

    trainer = _trainer(tmp_path, OwnLoader if own_loader else None, skip_memory_metrics=True)
    metrics = trainer.train().metrics
    speed = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert speed == pytest.approx(10 if own_loader else 11, rel=0.02)
    trainer.close()
