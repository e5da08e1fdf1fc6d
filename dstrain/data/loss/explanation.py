"""Inference of a loss's denominator from the calls of torch's functions that computed it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from dstrain.data.loss.recorder import ELEMENTWISE, LossCall
from dstrain.data.loss.rule import IGNORED, SAMPLES, Denominator, LossRule
from dstrain.data.samples import batch_size, columns_of

_OFTEN_IGNORED = (IGNORED, -1, 0)  # 0 is often padding
_MOST_IGNORED = 4  # negative numbers in a column of classes; a column with more holds no classes
_AS_MANY = 2  # looseness of a rule that agrees in the number of targets alone
_AMBIGUOUS_SUM = 3  # looseness of a sum over a single target, which equals its mean


@dataclass(frozen=True)
class Explanation:
    """Rules that can explain the loss of a batch.

    Attributes:
        rules: all rules that fit, an expected rule first, each with its looseness: 0 if the loss
            calls were given the rule's labels at the same positions, 1 if in the same order, 2 if
            only equally many. Empty if none fits.
        certain: the right rule, if the calls themselves took the mean over known targets; None
            otherwise. If a mean was taken later, by a division, a rule may fit only because it
            counts equally many targets in this batch.
        ratio: the loss divided by the mean, if a single call computed it. A ratio other than 1
            comes from a factor or from other terms, which only another batch can tell apart.
        counts: number of targets that each rule counts in the batch.
    """

    rules: dict[LossRule, int]
    certain: LossRule | None = None
    ratio: float | None = None
    counts: Mapping[LossRule, tuple[int, ...]] = field(default_factory=dict)


NOTHING = Explanation({})


def explain(
    calls: Sequence[LossCall],
    loss: Any,
    inputs: Any,
    *,
    expected: LossRule,
    labels: Sequence[str],
    num_samples: int | None,
    by_rows: bool = False,
    mixed: frozenset[str] = frozenset(),
) -> Explanation | None:
    """Find the rules by which a batch's loss can follow from the loss calls of its forward pass.

    Args:
        calls: recorded loss calls of the forward pass.
        loss: the loss that the pass returned, one element.
        inputs: the batch as the loader gave it, in which targets will be counted.
        expected: the rule to try first.
        labels: the label columns.
        num_samples: samples of the batch; None if unknown.
        by_rows: whether the loss seems to be a mean over samples, in a batch of one sample.
        mixed: columns of tensors that were combined with the results of the calls.

    Returns:
        An explanation; None if the batch cannot tell: a column without any label may hold the
        targets of a part of the loss that is missing in this batch.
    """
    value = float(torch.as_tensor(loss).detach().double().mean())
    calls = _joined(_calls_of_loss(calls, value))
    batch = {k: v.cpu() for k, v in columns_of(inputs)}
    samples = batch_size(inputs) if num_samples is None else num_samples
    of_labels = [column for name, column in batch.items() if name.split(".")[0] in labels]
    if any(bool((column == IGNORED).all()) for column in of_labels):
        return None
    if not calls or any(call.weighted and call.reduction == "mean" for call in calls):
        return NOTHING
    if any(call.function is functional.ctc_loss for call in calls):
        # Its mean over samples is taken of each sample's mean over its labels.
        rule = LossRule(is_sum=calls[0].reduction == "sum")
        return Explanation({rule: 0}, certain=rule) if len(calls) == 1 else NOTHING
    fitting: dict[LossRule, int] = {}
    may_be_sum = len(calls) == 1 and _is_sum(calls[0], value)
    by_rows = by_rows and samples == 1
    if may_be_sum and (_is_untouched(calls[0], loss) or (calls[0].num_targets > 1 < samples)):
        return Explanation({LossRule(is_sum=True): 0}, certain=LossRule(is_sum=True))
    ignored = {c.ignored for c in calls} | _ignored_in(batch)
    tried = dict.fromkeys([*expected.parts[:1], *_denominators(batch, ignored, mixed)])
    trials = [_CallInBatch(call, batch, samples, value) for call in calls]
    fits = [{d: how for d in tried if (how := trial.looseness(d)) is not None} for trial in trials]
    fits = [_preferred(ways, call, mixed) for ways, call in zip(fits, calls, strict=True)]
    for denominator in tried:
        if all(denominator in ways for ways in fits):
            fitting[LossRule((denominator,))] = max(ways[denominator] for ways in fits)
    if all(trial.is_over_samples() for trial in trials):
        fitting.setdefault(LossRule(), _AS_MANY)
    if may_be_sum:  # a sum over a single target or sample equals its mean; a later batch may tell
        fitting[LossRule(is_sum=True)] = _AMBIGUOUS_SUM if calls[0].num_targets < 2 else 0
    if by_rows:
        # In a batch of one sample, any count of targets also fits a mean over samples.
        fitting = {rule: how + 1 for rule, how in fitting.items()} | {LossRule(): 0}
    certain = [r for r, how in fitting.items() if not how and _is_certain(r, calls)]
    ratio = _ratio(calls[0], value) if len(calls) == 1 else None
    counts = {rule: rule.counts(inputs, samples) for rule in fitting}
    return Explanation(fitting, certain[0] if certain else None, ratio, counts)


def explain_zero_loss(inputs: Any) -> Explanation | None:
    """Find the rules that count no target in a batch whose loss is 0 without a loss call.

    Code that selects rows with labels calls no loss function for a batch without labels.
    """
    batch = {k: v.cpu() for k, v in columns_of(inputs)}
    denominators = _denominators(batch, _ignored_in(batch), frozenset())
    empty = {LossRule((d,)): 0 for d in denominators if d.targets(batch) is not None}
    counts = {rule: rule.counts(inputs, 1) for rule in empty}
    empty = {rule: how for rule, how in empty.items() if not any(counts[rule])}
    return Explanation(empty, counts={rule: counts[rule] for rule in empty}) if empty else None


def possible_rules(inputs: Any) -> list[LossRule]:
    """List all rules by which a loss may be a mean over labels of some column of a batch."""
    batch = {k: v.cpu() for k, v in columns_of(inputs)}
    return [LossRule((d,)) for d in _denominators(batch, _ignored_in(batch), frozenset())]


def _ignored_in(batch: Mapping[str, torch.Tensor]) -> set[int | None]:
    """Return labels that may mean "ignore": the usual numbers, and a batch's negative numbers."""
    whole = [c for c in batch.values() if not c.is_floating_point() and not c.is_complex()]
    negative = [c[c < 0].unique().tolist() for c in whole if c.dtype != torch.bool]
    few = [numbers for numbers in negative if len(numbers) <= _MOST_IGNORED]
    return {*_OFTEN_IGNORED, None}.union(*few)


def _preferred(
    ways: dict[Denominator, int], call: LossCall, mixed: frozenset[str]
) -> dict[Denominator, int]:
    """Drop denominators that fit worse than others, and adjust the looseness of the rest.

    If the labels of a call are found, denominators that only count equally many are dropped. If the
    code around a call took the mean, denominators with exactly the columns used in it are
    preferred: labels at the same positions do not show whether a mask was used.
    """
    used = call.columns | mixed
    fitting = {d for d in ways if {d.column, d.mask} - {None} == used}
    if not call.is_by_hand or not fitting:
        return _with_given_labels(ways) or ways
    kept = _with_given_labels(ways) | {d: ways[d] for d in fitting}
    return {d: how if d in fitting else how + _AMBIGUOUS_SUM for d, how in kept.items()}


def _is_certain(rule: LossRule, calls: Sequence[LossCall]) -> bool:
    """Tell whether the calls themselves took their means over the targets of this rule.

    Labels at the same positions are not enough: a mask, or a division after the call, may exclude
    other labels in another batch.
    """
    denominator = rule.parts[0]
    columns = {denominator.column, denominator.mask} - {None}
    return not rule.is_sum and all(
        call.reduction == "mean"
        and call.columns == columns
        and call.ignored == denominator.ignored
        and not call.is_selected
        for call in calls
    )


def _ratio(call: LossCall, loss: float) -> float | None:
    """Return the loss divided by the mean of a call; None if the call took no mean."""
    mean = float(call.values.mean())
    return loss / mean if call.reduction == "mean" and mean else None


def _calls_of_loss(calls: Sequence[LossCall], loss: float) -> list[LossCall]:
    """Return only the call whose mean is the loss, if there is one; else all calls.

    Some models compute a loss for each head and return the first.
    """
    alone = [c for c in calls if c.reduction == "mean" and float(c.values) == loss]
    return alone[:1] if alone else list(calls)


def _joined(calls: list[LossCall]) -> list[LossCall]:
    """Merge calls that each sum over a part of the batch into a single call."""
    kinds = {(call.function, call.ignored, call.weighted) for call in calls}
    summed = all(c.reduction in ("sum", "none") and c.target.dim() < 2 for c in calls)
    if len(calls) < 2 or len(kinds) > 1 or not summed:
        return calls
    target = torch.cat([call.target.flatten() for call in calls])
    values = torch.stack([call.values.sum() for call in calls])
    return [replace(calls[0], target=target, reduction="sum", values=values)]


def _is_untouched(call: LossCall, loss: Any) -> bool:
    """Tell whether the loss is the call's result itself, without a later division.

    Memory is compared, as at stage 3 the loss is another tensor in the same memory.
    """
    memory = None if call.returned is None else call.returned.data_ptr()
    return isinstance(loss, torch.Tensor) and memory == loss.data_ptr()


def _is_sum(call: LossCall, loss: float) -> bool:
    sums = call.reduction == "sum" or (call.reduction == "none" and call.num_targets > 1)
    return sums and abs(call.num_in_mean(loss) - 1) < call.tolerance


def _denominators(
    batch: Mapping[str, torch.Tensor], ignored: set[int | None], mixed: frozenset[str]
) -> Iterator[Denominator]:
    """Yield the denominators to try: label columns first, unmasked ones before masked ones."""
    names = sorted(batch, key=lambda name: "label" not in name)
    masks = [None, *(name for name in batch if "mask" in name or name in mixed)]
    for mask in masks:
        for name in names:
            for shifted in (False, True):
                for value in sorted(ignored, key=lambda v: (v is None, v)):
                    if name != mask:
                        yield Denominator(name, shifted=shifted, ignored=value, mask=mask)


def _with_given_labels(ways: dict[Denominator, int]) -> dict[Denominator, int]:
    """Return the denominators whose labels the call was given at the same positions or in order."""
    return {denominator: how for denominator, how in ways.items() if how < _AS_MANY}


@dataclass(frozen=True)
class _CallInBatch:
    """Call of a loss function, with the batch and the loss that it may explain.

    Attributes:
        call: the call.
        batch: the columns of the batch, in host memory.
        samples: number of samples in the batch.
        loss: the loss of the forward pass.
    """

    call: LossCall
    batch: Mapping[str, torch.Tensor]
    samples: int
    loss: float

    def looseness(self, denominator: Denominator) -> int | None:
        """Return the looseness with which a denominator explains the call; None if it does not."""
        tests = (
            self._is_at_the_same_places,
            self._is_in_the_same_order,
            self._has_as_many_targets,
        )
        for looseness, fits in enumerate(tests):
            if fits(denominator):
                return looseness
        return None

    def _is_at_the_same_places(self, denominator: Denominator) -> bool:
        """Compare the call's targets with the denominator's labels position by position.

        Ignored labels are compared too: if the first label of each sequence is ignored, this is the
        only way to tell whether the model shifts labels. A model that shifts drops the last
        position, or puts an ignored label there.
        """
        found = denominator.targets(self.batch)
        if found is None or not self._has_as_many_targets(denominator):
            return False
        labels = found[0].double().masked_fill(~found[1], math.inf)
        target = self.call.target.flatten().double()
        if self.call.ignored is not None:
            target = target.masked_fill(target == self.call.ignored, math.inf)
        ends = torch.nn.functional.pad(labels, (0, 1), value=math.inf)
        candidates = (labels, ends) if denominator.shifted else (labels,)
        return any(torch.equal(target, candidate.flatten()) for candidate in candidates)

    def _is_in_the_same_order(self, denominator: Denominator) -> bool:
        """Compare the targets of the call with those of the denominator, in order and in number.

        The call may have the whole sequence of targets several times: a model may predict a token
        from several positions.
        """
        found = denominator.targets(self.batch)
        if found is None:
            return False
        wanted = found[0][found[1]].double()
        target = self.call.target.flatten()
        if self.call.ignored is not None:
            target = target[target != self.call.ignored]
        times = target.numel() // max(1, wanted.numel())
        if target.numel() != times * wanted.numel():
            return False
        num_in_mean = self.call.num_in_mean(self.loss) / max(1, times)
        agree = abs(num_in_mean - wanted.numel()) <= self.call.tolerance * wanted.numel()
        return agree and bool(torch.equal(target.double(), wanted.repeat(times)))

    def _has_as_many_targets(self, denominator: Denominator) -> bool:
        """Tell whether the call's mean is over as many targets as the denominator counts.

        Returns False for targets that were not made from a column of the batch (a contrastive loss
        numbers its samples): each may depend on all samples.
        """
        if not self.call.columns:
            return False
        found = denominator.targets(self.batch)
        count = self.samples if found is None else int(found[1].sum())
        valid = None if found is None else found[1]
        if (
            found is not None
            and self.call.function in ELEMENTWISE
            and self.call.reduction == "mean"
        ):
            # Such as the divergence of two models' predictions, with a row for each token.
            return self.call.num_rows == count or self.call.num_targets == count
        return abs(self.call.num_in_mean(self.loss, valid) - count) <= self.call.tolerance * count

    def is_over_samples(self) -> bool:
        """Tell whether the call's mean is over samples, or over equally many elements of each."""
        if not self.call.columns:
            return False
        if replace(self, batch={})._has_as_many_targets(SAMPLES):
            return True
        whole = self.call.ignored is None or bool((self.call.target != self.call.ignored).all())
        rows = self.call.target.dim() > 0 and self.call.target.shape[0] == self.samples
        return self.call.reduction == "mean" and whole and rows
