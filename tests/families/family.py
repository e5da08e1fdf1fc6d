"""What a family of models is to the tests: how to build one, and batches that suit it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Sample = dict[str, Tensor]
Batch = dict[str, Any]
Kind = Literal["shifted", "targets", "samples", "sum", "attended", "terms", "unknown"]


def stack(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal shapes: each tensor becomes [batch, ...]."""
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


@dataclass(frozen=True)
class Family:
    """A tiny model with ragged data.

    Attributes:
        name: unique among the families.
        build: returns the model, in fp32, with the same weights at every call and no dropout.
        samples: returns so many samples, always the same, of equal shapes but unequal numbers of
            targets, so that any part of them can be collated.
        kind: what the model's loss is, as read from its source. "shifted": the mean over labels
            that are not ignored and not the first of their sequence; "targets": over labels that
            are not ignored; "samples": over rows; "sum": no mean; "attended": over the ones of
            the attention mask; "terms": a sum of means over different counts; "unknown": the
            weight cannot be told from the labels.
        labels: the label columns, in the words of ``TrainingArguments.label_names``; None for
            those that the model's signature tells.
        collate: makes a batch of samples.
        coupled: why a row's loss depends on the other rows of its batch, so that no weight can make
            splits equal; empty where it does not.
        ignored: the label without a target.
    """

    name: str
    build: Callable[[], nn.Module]
    samples: Callable[[int], list[Sample]]
    kind: Kind
    labels: tuple[str, ...] | None = None
    collate: Callable[[Sequence[Sample]], Batch] = stack
    coupled: str = ""
    ignored: int = -100


def table(families: Sequence[Family]) -> dict[str, Family]:
    """Return the families by name; a name comes once."""
    found = {family.name: family for family in families}
    assert len(found) == len(families), "a family's name comes twice"
    return found
