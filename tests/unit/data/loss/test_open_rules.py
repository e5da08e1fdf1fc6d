"""Batches that cannot tell what a loss is a mean over, and those that can."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional

from dstrain.data import Denominator, LossRule, LossTargets
from tests.families.zoo import FAMILIES
from tests.unit.data.loss.losses import (
    IDS,
    LABELS,
    MAIN,
    MASK,
    Scores,
    divided,
    flat_cross_entropy,
    settled,
)


def test_a_sum_over_one_target_is_taken_for_a_mean():
    """At micro-batch 1 each of the first batches has one; a sum would be added up eight times."""
    one = {"input_ids": IDS[:1], "labels": torch.tensor([3])}
    targets = settled([divided] * 8, [one] * 8)
    assert targets.is_exact
    assert not targets.rule.is_sum
    assert targets.counts({"input_ids": IDS, "labels": torch.tensor([3, 1, 2])}) == (3,)


def test_a_later_batch_tells_a_sum_from_a_mean():
    def summed(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        return functional.cross_entropy(scores[:, 0], batch["labels"], reduction="sum")

    one = {"input_ids": IDS[:1], "labels": torch.tensor([3])}
    three = {"input_ids": IDS, "labels": torch.tensor([3, 1, 2])}
    targets = settled([summed] * 2, [one, three])
    assert targets.rule.is_sum


@pytest.mark.parametrize("reduced", ["none", "indexed"])
def test_a_mask_that_the_first_batch_does_not_show_is_found_in_a_later_one(reduced: str):
    def masked(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        mask = batch["attention_mask"] == 1
        if reduced == "indexed":
            return functional.cross_entropy(scores[mask], batch["labels"][mask])
        each = flat_cross_entropy(scores, batch["labels"], reduction="none")
        return (each * mask.flatten()).sum() / mask.sum()

    labels = IDS.clamp(min=1)
    whole = {"input_ids": IDS, "labels": labels, "attention_mask": torch.ones_like(MASK)}
    padded = {"input_ids": IDS, "labels": labels, "attention_mask": MASK}
    targets = settled([masked] * 8, [whole, *[padded] * 7])
    assert targets.is_exact
    assert targets.counts(padded) == (int(MASK.sum()),)


def test_labels_that_the_users_code_takes_out_of_the_batch_are_still_known():
    def popped(scores: torch.Tensor, batch: Any, told: Any) -> torch.Tensor:
        return flat_cross_entropy(scores, batch.pop("labels"))

    batch = {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK}
    targets = settled([popped], [batch])
    assert targets.rule == LossRule((Denominator("labels"),))


def test_labels_that_the_users_code_changes_are_not_those_of_the_batch():
    def further_masked(scores: torch.Tensor, batch: Any, told: Any) -> torch.Tensor:
        batch["labels"][:, 2] = -100
        return flat_cross_entropy(scores, batch["labels"])

    batches = [{"input_ids": IDS, "labels": LABELS.clone()} for _ in range(8)]
    targets = settled([further_masked] * 8, batches)
    assert not targets.is_exact
    assert targets.rule == LossRule()


def test_a_count_that_is_used_is_the_denominator():
    """Whatever else the loss is made of; and it counts labels in the whole run."""

    def by_hand(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        kept = batch["labels"] != -100
        logs = scores.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
        return -(logs * kept).sum() / told

    batch = {"input_ids": IDS, "labels": LABELS}
    targets = settled([by_hand], [batch], model_loss=False)
    assert targets.is_exact
    assert targets.counts(batch) == (int((LABELS != -100).sum()),)
    unused = settled([lambda s, b, told: s.pow(2).mean()], [batch], model_loss=False)
    assert not unused.is_exact
    assert unused.target_count(batch) == int((LABELS != -100).sum())


def test_class_weights_divided_by_a_count_are_exact():
    def weighted(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        kinds = {"weight": torch.arange(15.0), "reduction": "sum"}
        return flat_cross_entropy(scores, batch["labels"], **kinds) / told

    batch = {"input_ids": IDS, "labels": LABELS}
    targets = settled([weighted], [batch], model_loss=False)
    assert targets.rule == LossRule((Denominator("labels"),))


def test_a_contrast_within_the_batch_is_no_mean_over_labels():
    def contrast(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        left, right = scores[:, 0], scores[:, 1]
        return functional.cross_entropy(left @ right.T, torch.arange(len(left)))

    batch = {"input_ids": IDS}
    assert not settled([contrast], [batch], labels=()).is_exact


def test_other_terms_are_named_and_a_factor_is_not(caplog: pytest.LogCaptureFixture):
    def with_penalty(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        return flat_cross_entropy(scores, batch["labels"]) + scores.pow(2).mean()

    def doubled(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        return 2 * flat_cross_entropy(scores, batch["labels"])

    batches = [{"input_ids": IDS[:n], "labels": LABELS[:n]} for n in (3, 2)]
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        assert settled([doubled] * 2, batches).is_exact
        assert not caplog.records
        assert settled([with_penalty] * 2, batches).is_exact
    (record,) = caplog.records
    assert "other terms" in record.message


def test_an_evaluation_is_watched_for_itself():
    """Its batches of one sample must not decide what the loss of training is."""
    one = {"input_ids": IDS[:1], "labels": torch.tensor([3])}
    three = {"input_ids": IDS, "labels": torch.tensor([3, 1, 2])}
    training = LossTargets(Scores(), ("labels",))
    evaluation = training.for_evaluation()
    with evaluation.watching(one) as seen:
        seen.append(functional.cross_entropy(torch.ones(1, 15), one["labels"], reduction="sum"))
    evaluation.agree(MAIN, final=True)
    assert not training.settled
    assert training.counts(three) == (3,)


def test_an_evaluation_goes_by_training_only_where_that_could_tell():
    one = {"input_ids": IDS[:1], "labels": torch.tensor([3])}
    three = {"input_ids": IDS, "labels": torch.tensor([3, 1, 2])}

    def mean(scores: torch.Tensor, batch: Mapping[str, Any], told: Any) -> torch.Tensor:
        return functional.cross_entropy(scores[:, 0], batch["labels"])

    clear, unclear = settled([mean], [three]), settled([divided] * 8, [one] * 8)
    assert clear.settled
    assert unclear.settled
    assert clear.for_evaluation().settled
    assert not unclear.for_evaluation().settled


def test_watching_holds_nothing_that_the_model_lets_go_of():
    """Without gradients every activation of a large model would be kept until its pass is over."""
    passed: list[weakref.ref[torch.Tensor]] = []
    targets = LossTargets(Scores(), ("labels",))
    model = Scores()
    with torch.no_grad(), targets.watching({"input_ids": IDS, "labels": LABELS}) as seen:
        hidden = model.table(IDS)
        for _ in range(5):
            hidden = hidden * 2
            passed.append(weakref.ref(hidden))
        assert sum(ref() is not None for ref in passed) == 1
        seen.append(flat_cross_entropy(hidden, LABELS))
    targets.agree(MAIN, final=True)
    assert targets.rule == LossRule((Denominator("labels"),))


def test_a_loss_of_the_users_own_that_calls_no_loss_function_goes_by_samples():
    """As a preference loss: the model's class says nothing about it."""
    family = FAMILIES["llama"]
    model = family.build()
    batch = family.collate(family.samples(2))
    for model_loss in (True, False):
        targets = LossTargets(model, ["labels"], model_loss=model_loss)
        with targets.watching(batch) as seen:
            seen.append(-functional.logsigmoid(model(batch["input_ids"]).logits.mean()))
        targets.agree(MAIN, final=True)
        assert targets.is_exact == model_loss
