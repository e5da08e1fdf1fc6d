"""A small model whose buffers training changes in every way there is, and data for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models import SEED

FEATURES, HIDDEN = 6, 8


class Statistics(nn.Module):
    """A regression that depends on what its buffers have gathered.

    Attributes:
        norm: BatchNorm, whose kernels change statistics without a trace.
        mean: changed in place; persistent.
        code: changed through ``.data``; persistent.
        average: of shape (), replaced by another tensor; persistent.
        passing: changed in place; in no state_dict.
        count: integer, changed in place; in no state_dict.
        cache: replaced by another tensor; in no state_dict.
        places: never changed.
    """

    def __init__(self, *, replaces: bool = True, in_evaluation: bool = False) -> None:
        """Initialise weights from the seed.

        Args:
            replaces: whether ``average`` and ``cache`` are used.
            in_evaluation: gather in evaluation mode too.
        """
        super().__init__()
        self.replaces, self.in_evaluation = replaces, in_evaluation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.first, self.last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 1)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.register_buffer("mean", torch.zeros(HIDDEN))
        self.register_buffer("code", torch.zeros(3))
        self.register_buffer("average", torch.tensor(0.0))
        self.register_buffer("passing", torch.zeros(HIDDEN), persistent=False)
        self.register_buffer("count", torch.tensor(0), persistent=False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("places", torch.arange(5))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map x [batch, features] to the mean squared error of a prediction [batch]."""
        x = x.to(self.first.weight.dtype)
        hidden = self.norm(torch.tanh(self.first(x)) + 0.1 * self.mean + 0.1 * self.passing)
        if self.training or self.in_evaluation:
            self.gather(hidden.detach().float())
        hidden = hidden * (1 + self.code.sum() + self.average + 0.01 * self.count)
        prediction = self.last(hidden.to(x.dtype)).squeeze(-1)
        return {"loss": (prediction.float() - labels).square().mean()}

    @torch.no_grad()
    def gather(self, hidden: torch.Tensor) -> None:
        """Let hidden [batch, hidden] change the buffers."""
        self.mean.lerp_(hidden.square().mean(0), 0.1)
        self.passing.mul_(0.9).add_(hidden.amax(0), alpha=0.1)
        self.code.data.mul_(0.9).add_(hidden.flatten()[:3], alpha=0.02)
        self.count += 1
        if self.replaces:
            self.average = 0.9 * self.average + 0.01 * hidden.amax()
            self.cache = hidden.flatten()[:2].clone()


def rows(count: int, *, seed: int = SEED) -> list[dict[str, torch.Tensor]]:
    """Return that many rows, whose inputs drift so that every batch has other statistics."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(FEATURES, generator=draw) * (1 + k % 3) + k / count,
            "labels": torch.randn((), generator=draw),
        }
        for k in range(count)
    ]


def trainer_of(folder: Any, model: nn.Module, stage: int, **settings: Any) -> Any:
    """Make a trainer of the model on 24 rows, with 12 to evaluate on."""
    from dstrain import Trainer, TrainingArguments

    train = settings.pop("train", rows(24))
    callbacks = settings.pop("callbacks", None)
    arguments = {
        "zero_stage": str(stage), "per_device_train_batch_size": 2, "num_train_epochs": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "linear", "report_to": "none",
        "logging_steps": 1, "disable_tqdm": True, "remove_unused_columns": False,
        "save_strategy": "no", "per_device_eval_batch_size": 3, **settings,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=train,
        eval_dataset=rows(12, seed=5),
        callbacks=callbacks,
    )
