"""What losses of the user's own are a mean over, read off a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional

from dstrain.data import Denominator, LossRule, LossTargets
from tests.unit.data.loss.losses import (
    IDS,
    LABELS,
    MAIN,
    Scores,
    flat_cross_entropy,
    masked_mean,
    per_row,
    pieces,
    read,
    shifted,
)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda s, b: flat_cross_entropy(s, b["labels"]), Denominator("labels")),
        (shifted, Denominator("labels", shifted=True)),
        (masked_mean, Denominator("labels")),
        (pieces, Denominator("labels")),
        (
            lambda s, b: flat_cross_entropy(s[:, :-1], b["input_ids"][:, 1:], ignore_index=0),
            Denominator("input_ids", shifted=True, ignored=0),
        ),
        (
            lambda s, b: flat_cross_entropy(
                s[b["attention_mask"] == 1], b["input_ids"][b["attention_mask"] == 1]
            ),
            Denominator("input_ids", mask="attention_mask"),
        ),
        (lambda s, b: flat_cross_entropy(s, b["labels"]) + s.pow(2).mean(), Denominator("labels")),
    ],
    ids=["plain", "shifted", "unreduced", "in_pieces", "own_padding", "masked", "with_penalty"],
)
def test_the_loss_of_a_plain_module_is_read(loss: Any, expected: Denominator):
    assert read(loss) == LossRule((expected,))


def test_a_sum_is_a_sum():
    assert read(lambda s, b: flat_cross_entropy(s, b["labels"], reduction="sum")).is_sum


@pytest.mark.parametrize(
    "loss",
    [
        per_row,
        lambda s, b: s.pow(2).mean(),
        lambda s, b: flat_cross_entropy(s, b["labels"], weight=torch.rand(15)),
        lambda s, b: flat_cross_entropy(s, b["labels"]) + functional.mse_loss(s, s * 0),
    ],
    ids=["means_of_rows", "no_loss_function", "class_weights", "two_losses"],
)
def test_a_loss_that_no_count_explains_goes_by_samples(loss: Any):
    assert read(loss) is None


def test_a_second_label_column_without_labels_leaves_the_rule_open():
    """The first batch shows one head alone; the other would never train."""
    empty = torch.full((3,), -100)
    batch = {"input_ids": IDS, "labels_a": torch.tensor([1, 2, 3]), "labels_b": empty}

    def loss(scores: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        return functional.cross_entropy(scores[:, 0], batch["labels_a"])

    assert read(loss, batch, labels=("labels_a", "labels_b")) is None
    used = {**batch, "labels_b": torch.tensor([4, 5, 6])}
    assert read(loss, used, labels=("labels_a", "labels_b")) == LossRule((Denominator("labels_a"),))


def test_by_samples_a_batch_is_empty_only_without_any_label():
    targets = LossTargets(Scores(), ["labels_a", "labels_b"])
    with targets.watching({}) as seen:
        seen.append(torch.ones(()))
    targets.agree(MAIN, final=True)
    empty, some = torch.full((3,), -100), torch.tensor([1, -100, -100])
    assert targets.counts({"labels_a": empty, "labels_b": some}, 3) == (3,)
    assert targets.counts({"labels_a": empty, "labels_b": empty}, 3) == (0,)
    filled = targets.without_ignored({"labels_a": empty, "labels_b": empty})
    assert filled["labels_a"].eq(0).all()
    assert filled["labels_b"].eq(0).all()


def test_watching_changes_no_value_and_ends():
    model = Scores()
    logits = model.table(IDS)
    expected = flat_cross_entropy(logits, LABELS)
    targets = LossTargets(model, ["labels"])
    with targets.watching({"labels": LABELS}) as seen:
        loss = flat_cross_entropy(logits, LABELS)
        seen.append(loss)
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    targets.agree(MAIN, final=True)
    with targets.watching({"labels": LABELS}) as unseen:
        flat_cross_entropy(logits, LABELS)
    assert unseen == []


def test_heads_of_as_many_labels_are_not_taken_for_one():
    """Each of two rows has the label of another head: both means are over one target."""
    batch = {
        "input_ids": IDS[:2],
        "labels_a": torch.tensor([3, -100]),
        "labels_b": torch.tensor([-100, 4]),
    }

    def loss(scores: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        heads = (batch["labels_a"], batch["labels_b"])
        return sum(functional.cross_entropy(scores[:, 0], labels) for labels in heads)

    assert read(loss, batch, labels=("labels_a", "labels_b")) is None
