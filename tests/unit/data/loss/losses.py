"""Models and losses whose rule the tests of losses read."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dstrain.data import LossTargets, label_columns
from dstrain.training.loss_terms import LossTerms
from dstrain.training.model_outputs import loss_of
from tests.families.zoo import FAMILIES

MAIN: Any = SimpleNamespace(is_main=True)
SAMPLES = 8

# Rows of these depend on the others of their batch (batch norm, a contrast), or their loss is
# divided by what no column says: no weight makes them equal. They go by samples, and it is said.
BY_SAMPLES = {"resnet", "segformer", "vit_masked", "clip", "siglip", "two_heads"}


class Reader:
    """Reads a family's rule off its first batch, as the trainer does."""

    def __init__(self, name: str, *, steps: int = 8) -> None:
        family = FAMILIES[name]
        self.model = family.build().train()
        self.samples, self.collate = family.samples(SAMPLES), family.collate
        self.terms = LossTerms.of(self.model)
        self.targets = LossTargets(
            self.model,
            label_columns(self.model, family.labels),
            rule=None if self.terms is None else self.terms.rule(),
        )
        for first in range(steps):  # of three samples, until the rule is settled
            self.parts([(first + i) % SAMPLES for i in range(3)])
            self.targets.agree(MAIN, final=True)

    def parts(self, rows: list[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Return the parts of the loss of some samples, and what they weigh."""
        batch = self.collate([self.samples[row] for row in rows])
        if self.terms is not None:
            loss, _ = self.terms(self.model, batch)
        else:
            with self.targets.watching(batch, len(rows)) as seen:
                loss = loss_of(self.model(**batch))
                seen.append(loss)
        return loss.reshape(-1), self.targets.counts(batch, len(rows))

    def gradient(self, parts: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of each part: (parts, numbers of the model)."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        rows = []
        for part in parts:
            grads = torch.autograd.grad(part, trained, allow_unused=True, retain_graph=True)
            zeros = (torch.zeros_like(p) for p in trained)
            flat = [(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)]
            rows.append(torch.cat(flat))
        return torch.stack(rows)


class Scores(nn.Module):
    """Scores of classes; a test says what its loss is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 15)


LABELS = torch.tensor([[3, -100, 4, 5, 1], [1, 2, -100, -100, -100], [7, 7, 2, -100, 9]])
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 10, 11, 12, 13]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def read(
    loss: Any,
    batch: Mapping[str, Any] | None = None,
    labels: Any = ("labels",),
    *,
    steps: int = 8,
) -> Any:
    """Find the rule of one loss function of (scores, batch); None for samples."""
    model = Scores()
    batch = {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK} if batch is None else batch
    targets = LossTargets(model, labels)
    for _ in range(steps):
        with targets.watching(batch) as seen:
            seen.append(loss(model.table(batch["input_ids"]), batch))
        targets.agree(MAIN, final=True)
    return targets.rule if targets.is_exact else None


def flat_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), **kwargs)


def pieces(scores: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Compute a loss row by row, to save memory."""
    rows = zip(scores, batch["labels"], strict=True)
    total = sum(flat_cross_entropy(s, t, reduction="sum") for s, t in rows)
    return total / (batch["labels"] != -100).sum()


def masked_mean(scores: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    each = flat_cross_entropy(scores, batch["labels"], reduction="none")
    return each.sum() / (batch["labels"] != -100).sum()


def shifted(scores: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    return flat_cross_entropy(scores[:, :-1], batch["labels"][:, 1:])


def per_row(scores: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Compute a mean over rows of means over their targets, which no single count weights."""
    rows = zip(scores, batch["labels"], strict=True)
    return torch.stack([functional.cross_entropy(s, t) for s, t in rows]).mean()


def settled(losses: Any, batches: Any, **kinds: Any) -> LossTargets:
    """Return what is known after a step with each of these losses and batches."""
    model = Scores()
    targets = LossTargets(model, kinds.pop("labels", ("labels",)), **kinds)
    for loss, batch in zip(losses, batches, strict=True):
        with targets.watching(batch) as seen:
            seen.append(loss(model.table(batch["input_ids"]), batch, targets.target_count(batch)))
        targets.agree(MAIN, final=True)
    return targets


def divided(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
    """Compute a loss by a sum over classes, divided by hand."""
    each = functional.cross_entropy(scores[:, 0], batch["labels"], reduction="sum")
    return each / len(batch["labels"])
