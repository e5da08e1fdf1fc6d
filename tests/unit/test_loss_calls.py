"""What a loss is a mean over, read off a forward pass: the weight of a micro-batch."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dstrain.data import Denominator, LossRule, LossTargets, label_columns
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


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - BY_SAMPLES))
def test_the_weighted_mean_of_two_halves_is_the_whole(name: str):
    """For losses and gradients, of halves of any size with ragged targets."""
    reader = Reader(name)
    for seed in range(2):
        rows = list(range(SAMPLES))
        random.Random(seed).shuffle(rows)
        cut = 3 - seed
        loss, gradient = torch.zeros(()), torch.zeros(())
        wholes, totals = reader.parts(rows)
        for half in (rows[:cut], rows[cut:]):
            parts, counts = reader.parts(half)
            weights = [
                1.0 if reader.targets.rule.is_sum else n / max(1, total)
                for n, total in zip(counts, totals, strict=True)
            ]
            kept = [index for index, weight in enumerate(weights) if weight]
            gradients = reader.gradient(parts)
            for index in kept:
                loss = loss + weights[index] * parts[index].detach()
                gradient = gradient + weights[index] * gradients[index]
        whole = reader.gradient(wholes).sum(0)
        assert loss.item() == pytest.approx(wholes.sum().item(), rel=3e-6)
        # Measured: rounding up to 1.2e-5 (dpt, two threads), a wrong weight 4e-3 or more.
        assert torch.linalg.norm(gradient - whole) < 1e-4 * torch.linalg.norm(whole)


@pytest.mark.parametrize("name", sorted(n for n in FAMILIES if LossTerms.of(FAMILIES[n].build())))
def test_the_terms_of_a_loss_add_up_to_the_models_own(name: str):
    family = FAMILIES[name]
    model, rows = family.build().eval(), family.samples(SAMPLES)
    terms, batch = LossTerms.of(model), family.collate(rows)
    assert terms is not None
    with torch.no_grad():
        parts, outputs = terms(model, batch)
        own = loss_of(model(**batch))
    assert parts.sum().item() == pytest.approx(own.item(), rel=1e-6)
    assert "loss" not in outputs or outputs["loss"] is None
    assert len(terms.rule().counts(batch)) == len(parts)


def test_models_whose_rule_cannot_be_read_are_named_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        reader = Reader("two_heads", steps=1)
        assert not reader.targets.settled, "its first samples have labels for one head alone"
        reader.parts(list(range(SAMPLES)))
        reader.targets.agree(MAIN, final=True)
    assert reader.targets.rule == LossRule()
    assert not reader.targets.is_exact
    (record,) = caplog.records
    assert "TwoHeads" in record.message
    assert "weighted by their samples" in record.message


# --- losses of the user's own --------------------------------------------------------------------


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


# --- batches that cannot tell --------------------------------------------------------------------


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
