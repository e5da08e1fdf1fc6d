"""Losses of batches of one sample, of masks, and of labels in unusual places."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional

from dstrain.data import Denominator, LossRule
from tests.unit.data.loss.losses import IDS, LABELS, divided, flat_cross_entropy, settled

ONE = {"input_ids": IDS[:1], "labels": LABELS[:1]}


def of_one_sample(make: Any) -> Any:
    """Compute a loss from the cross-entropy of each token, where the batch has one sample."""

    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        tokens = functional.cross_entropy(
            scores.flatten(0, 1), batch["labels"].flatten(), reduction="none"
        )
        return make(tokens.view(batch["labels"].shape), (batch["labels"] != -100).float())

    return loss


@pytest.mark.parametrize(
    "make",
    [
        lambda tokens, valid: ((tokens * valid).sum(1) / valid.sum(1)).mean(),
        lambda tokens, valid: (tokens * valid).sum() / len(tokens),
        lambda tokens, valid: (tokens * valid).sum() / torch.tensor(1.0 * len(tokens)),
        lambda tokens, valid: (tokens * valid).sum(1).mean(),
        lambda tokens, valid: torch.stack([t.sum() for t in tokens * valid]).mean(),
        lambda tokens, valid: sum(t.sum() for t in tokens * valid) / len(tokens),
        lambda tokens, valid: (
            sum(t.sum() / v.sum() for t, v in zip(tokens * valid, valid, strict=True)) / len(tokens)
        ),
    ],
)
def test_a_mean_over_the_samples_of_a_batch_of_one_is_seen_by_how_it_is_taken(make: Any):
    """Its value is that of a mean over targets, or of a sum."""
    targets = settled([of_one_sample(make)] * 8, [ONE] * 8)
    assert targets.settled
    assert targets.rule == LossRule()


def test_the_mean_of_each_samples_own_mean_is_one_over_samples():
    """As a loss that calls torch's function once for each row."""

    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        rows = zip(scores, batch["labels"], strict=True)
        return torch.stack([functional.cross_entropy(s, labels) for s, labels in rows]).mean()

    assert settled([loss] * 8, [ONE] * 8).rule == LossRule()


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda tokens, valid: tokens.sum(), LossRule(is_sum=True)),
        (lambda tokens, valid: 1.0 * tokens.sum(), LossRule(is_sum=True)),
        (
            lambda tokens, valid: (tokens * valid).sum() / valid.sum(),
            LossRule((Denominator("labels"),)),
        ),
    ],
)
def test_other_losses_of_one_sample_stay_what_they_are(make: Any, rule: LossRule):
    assert settled([of_one_sample(make)] * 8, [ONE] * 8).rule == rule


def test_a_loss_of_one_sample_that_nothing_explains_is_named(caplog: pytest.LogCaptureFixture):
    def focal(tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return ((1 - (-tokens).exp()) ** 2 * tokens * valid).sum() / valid.sum()

    with caplog.at_level(logging.WARNING):
        assert not settled([of_one_sample(focal)], [ONE]).is_exact
    assert "weighted by their samples" in caplog.text


def test_labels_inside_of_a_column_are_counted():
    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        return flat_cross_entropy(scores, batch["targets"]["tokens"])

    batch = {"input_ids": IDS, "targets": {"tokens": LABELS, "rows": torch.tensor([1, 2, 0])}}
    targets = settled([loss], [batch])
    assert targets.rule == LossRule((Denominator("targets.tokens"),))
    assert targets.counts(batch) == (int((LABELS != -100).sum()),)
    changed = targets.without_ignored(batch)
    assert int(changed["targets"]["tokens"].min()) >= 0
    assert torch.equal(changed["targets"]["rows"], batch["targets"]["rows"])
    assert int(LABELS.min()) == -100


def test_targets_that_are_not_numbers_are_none():
    """``mse_loss`` of the elements that are known."""
    known = torch.tensor([[0.5, float("nan"), 1.0], [2.0, 0.1, float("nan")]])

    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        valid = ~batch["labels"].isnan()
        return functional.mse_loss(scores[:2, 0, :3][valid], batch["labels"][valid])

    batch = {"input_ids": IDS[:2], "labels": known}
    targets = settled([loss], [batch])
    assert targets.rule == LossRule((Denominator("labels", ignored=None),))
    assert targets.counts(batch) == (4,)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_a_divergence_of_the_tokens_that_have_labels_is_a_mean_over_them(reduction: str):
    """As in a distillation; the divergence of whole samples stays a mean over samples."""

    def tokens(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        kept = batch["labels"] != -100
        other = (scores.detach()[kept] + 1).softmax(-1)
        return functional.kl_div(scores[kept].log_softmax(-1), other, reduction=reduction)

    def samples(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        other = functional.one_hot(batch["labels"].clamp(0), scores.shape[-1]).float()
        return functional.kl_div(scores.log_softmax(-1), other, reduction=reduction)

    batch = {"input_ids": IDS, "labels": LABELS}
    assert settled([tokens], [batch]).rule == LossRule((Denominator("labels"),))
    assert settled([samples] * 8, [batch] * 8).rule == LossRule()


def even_cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the loss of each token for a model that knows nothing: the same for all."""
    even = scores * 0
    return functional.cross_entropy(even.flatten(0, 1), labels.flatten(), reduction="none").view(
        labels.shape
    )


@pytest.mark.parametrize("name", ["mask", "kept"])
def test_a_mask_counts_from_the_first_step_though_all_tokens_have_the_same_loss(name: str):
    full = torch.tensor([[5, 6, 7, 8], [3, 4, 2, 6], [1, 2, 3, 4]])
    batch = {
        "input_ids": IDS[:, :4],
        "labels": full,
        name: torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]),
    }

    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        tokens = even_cross_entropy(scores[:, :4], batch["labels"])
        return (tokens * batch[name]).sum() / batch[name].sum()

    targets = settled([loss], [batch])
    assert targets.counts(batch) == (6,)
    assert settled([loss] * 8, [batch] * 8).rule == LossRule((Denominator("labels", mask=name),))


def test_rows_that_the_model_leaves_out_by_a_label_of_its_own_count_nothing():
    """It calls no loss function for a micro-batch without a label."""

    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        kept = batch["labels"] != -1
        if not kept.any():
            return scores.sum() * 0
        return functional.cross_entropy(scores[kept, 0], batch["labels"][kept])

    one = {"input_ids": IDS[:1], "labels": torch.tensor([3])}
    none = {"input_ids": IDS[:1], "labels": torch.tensor([-1])}
    for batches in ([one, none], [one, one, none, none]):
        targets = settled([loss] * len(batches), batches)
        assert targets.counts(none) == (0,)
        assert targets.counts(one) == (1,)
    three = {"input_ids": IDS, "labels": torch.tensor([3, -1, 2])}
    assert settled([loss], [three]).counts(three) == (2,)


def test_a_mask_of_frames_counts_the_numbers_of_each():
    batch = {
        "input_ids": IDS,
        "labels": torch.arange(24.0).view(3, 4, 2),
        "mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool(),
    }

    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        seen = scores[:, :4, :2]
        return functional.smooth_l1_loss(seen[batch["mask"]], batch["labels"][batch["mask"]])

    targets = settled([loss], [batch])
    assert targets.rule == LossRule((Denominator("labels", ignored=None, mask="mask"),))
    assert targets.counts(batch) == (14,)


def test_what_cannot_be_told_is_said_where_it_matters(caplog: pytest.LogCaptureFixture):
    """Of rules that have counted the same, nothing need be said."""
    with caplog.at_level(logging.WARNING):
        settled([divided] * 8, [{"input_ids": IDS[:2], "labels": torch.tensor([3, 1])}] * 8)
        assert not caplog.records
        settled([of_one_sample(lambda t, valid: (t * valid).sum() / len(t))] * 8, [ONE] * 8)
    assert "cannot tell it from" in caplog.text


def test_a_loss_that_is_0_at_the_start_says_nothing_of_columns_without_targets():
    """As a policy's that has not moved yet; a column of one number is no column of labels."""

    def loss(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        return scores.sum() * 0

    batch = {"input_ids": IDS, "group": torch.full((3,), -1), "labels": LABELS}
    targets = settled([loss] * 8, [batch] * 8, model_loss=False)
    assert targets.rule == LossRule()
    assert not targets.is_exact
    assert any(targets.counts(batch))


def test_a_column_of_many_negative_numbers_is_no_column_of_labels():
    batch = {"input_ids": IDS, "labels": LABELS, "offsets": -torch.arange(3000).view(3, -1)}
    targets = settled([lambda scores, b, told: flat_cross_entropy(scores, b["labels"])], [batch])
    assert targets.rule == LossRule((Denominator("labels"),))
