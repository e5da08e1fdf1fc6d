"""Rules by which the losses of micro-batches make up the loss of the global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import MaxLen

from dstrain.core.adapters import inner_model
from dstrain.core.documents import Count, Flag, Integer, Number, Text
from dstrain.data.compat import causal_lm_names
from dstrain.data.samples import batch_size, column, with_column

IGNORED = -100
SHIFTED_LABELS = "shift_labels"


@dataclass(frozen=True)
class Denominator:
    """The count that a mean loss is divided by, for batches that are still in host memory.

    Attributes:
        column: the batch key of the labels; None counts samples.
        shifted: whether the model predicts token t from tokens before t, so that the first label
            of a sequence is no target. A batch that brings ``shift_labels`` is shifted already.
        ignored: the label that is no target; None: each label is one, but for NaN.
        mask: the batch key of a mask; only labels where it is not 0 are targets.
        bound: the batch key whose second dimension bounds labels that are positions in it; those
            at or beyond the bound are no targets (answers outside of a cut text).
    """

    column: Text | None = None
    shifted: Flag = False
    ignored: Integer | None = IGNORED
    mask: Text | None = None
    bound: Text | None = None

    def count(self, inputs: Any, num_samples: int) -> int:
        """Count the targets in a batch of ``num_samples`` samples; nothing waits for a device."""
        found = self.targets(inputs)
        return num_samples if found is None else int(found[1].sum())

    def targets(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find the labels of a batch, and which of them are targets.

        Returns:
            labels and booleans of the same shape, the first label of a sequence cut off where the
            model shifts them; None where samples are counted: without a column, or where the batch
            has no such labels, or has floats where a class is what would be ignored.
        """
        labels = self._labels(inputs)
        if labels is None or labels.dim() == 0:
            return None
        if self.ignored is not None and labels.is_floating_point():
            return None
        is_shifted = column(inputs, SHIFTED_LABELS) is not None
        shifts = self.shifted and labels.dim() > 1 and not is_shifted
        valid = torch.ones_like(labels, dtype=torch.bool)
        if self.ignored is not None:
            valid = labels != self.ignored
        elif labels.is_floating_point():
            valid = ~labels.isnan()  # what a finite mean has left out
        mask = column(inputs, self.mask)
        if mask is not None and mask.shape == labels.shape[: mask.dim()]:
            # One entry of a mask may be about a whole row of labels, such as the floats of a frame.
            valid &= (mask != 0).reshape(*mask.shape, *[1] * (labels.dim() - mask.dim()))
        limit = column(inputs, self.bound)
        if limit is not None and limit.dim() > 1:
            valid &= labels < limit.shape[1]
        return (labels[..., 1:], valid[..., 1:]) if shifts else (labels, valid)

    def without_ignored(self, inputs: Any) -> Any:
        """Return the batch with valid labels everywhere, for a batch that carries no weight.

        The mean over no target is 0/0, and NaN times a weight of 0 stays NaN.
        """
        if not isinstance(inputs, Mapping) or self.column is None:
            return inputs
        changed: Any = inputs
        for name in (self.column, SHIFTED_LABELS):
            labels = column(changed, name)
            if labels is None:
                continue
            if labels.is_floating_point():
                # The gradient of what a mask leaves out is NaN as well where the label is.
                if bool((unknown := labels.isnan()).any()):
                    changed = with_column(changed, name, labels.masked_fill(unknown, 0))
            elif self.ignored is not None:
                changed = with_column(changed, name, labels.masked_fill(labels.eq(self.ignored), 0))
        mask = column(changed, self.mask)
        if mask is not None:
            changed = with_column(changed, str(self.mask), torch.ones_like(mask))
        return changed

    def _labels(self, inputs: Any) -> torch.Tensor | None:
        if self.column is None:
            return None
        names = (SHIFTED_LABELS, self.column) if self.shifted else (self.column,)
        return next((c for n in names if (c := column(inputs, n)) is not None), None)

    def __str__(self) -> str:
        """Name what is counted, for a log line."""
        if self.column is None:
            return "samples"
        after = " after the first of a sequence" if self.shifted else ""
        but = "" if self.ignored is None else f" that are not {self.ignored}"
        where = "" if self.mask is None else f", where {self.mask} is not 0"
        inside = "" if self.bound is None else f", inside of {self.bound}"
        return f"{self.column}{after}{but}{where}{inside}"


SAMPLES = Denominator()


@dataclass(frozen=True)
class LossRule:
    """The kind of a loss: a mean, a sum of means over different targets, or a sum over samples.

    Attributes:
        parts: the denominator of each mean; most losses have one.
        is_sum: whether the loss is no mean but a sum over samples: losses are then added up.
    """

    parts: tuple[Denominator, ...] = (SAMPLES,)
    is_sum: Flag = False

    def counts(self, inputs: Any, num_samples: int | None = None) -> tuple[int, ...]:
        """Count what each part of the loss of a batch is divided by: its weight.

        Args:
            inputs: a batch in host memory.
            num_samples: its samples, where they are known; else the first dimension of a tensor.
        """
        if self.is_sum:
            return (1,)
        if num_samples is None:
            num_samples = batch_size(inputs)
        return tuple(part.count(inputs, num_samples) for part in self.parts)

    def without_ignored(self, inputs: Any) -> Any:
        """Return the batch with valid labels everywhere, for a batch that carries no weight."""
        for part in self.parts:
            inputs = part.without_ignored(inputs)
        return inputs

    def __str__(self) -> str:
        """Name what the loss is taken over, for a log line."""
        if self.is_sum:
            return "a sum over samples"
        return " + ".join(f"a mean over {part}" for part in self.parts)


@dataclass(frozen=True)
class Candidate:
    """A rule that explains all losses that were watched.

    Attributes:
        rule: the rule.
        looseness: how loosely it explains them (see ``loss_calls.Explanation``), added up.
        mark: a number made of all that it has counted: rules that have counted the same have the
            same.
        is_rival: whether it may still turn out to be the right one instead of the rule in use.
    """

    rule: LossRule
    looseness: Count
    mark: Integer
    is_rival: Flag


@dataclass(frozen=True)
class LossFindings:
    """The findings of a run about its loss, for a run that goes on from its checkpoint.

    Attributes:
        labels: the batch keys that are labels.
        rule: in use.
        settled: whether it is final, unless a later batch tells it from a rival.
        is_exact: whether it is the loss's own. Samples, which are counted where no rule fits, are
            not.
        is_clear: whether it is the only one left.
        num_open: optimizer steps that it took, or has taken so far.
        ratios: smallest and largest ratio of losses to the means that torch's functions took, one
            of them where there was one, or none.
        candidates: the rules that are left; none where losses go by samples.
    """

    labels: list[Text]
    rule: LossRule
    settled: Flag
    is_exact: Flag
    is_clear: Flag
    num_open: Count
    ratios: Annotated[list[Number], MaxLen(2)]
    candidates: list[Candidate]


def expected_rule(module: torch.nn.Module, labels: Sequence[str]) -> LossRule:
    """Guess a model's rule from its class, before its loss has been seen.

    Args:
        module: the model.
        labels: its label columns; the first one counts.
    """
    if not labels:
        return LossRule()
    return LossRule((Denominator(labels[0], shifted=shifts_labels(module)),))


def shifts_labels(module: torch.nn.Module) -> bool:
    """Guess whether a model shifts labels itself: the causal ones of transformers, by ancestry.

    A subclass is named as its author likes, so all its ancestors are asked.
    """
    inner = inner_model(module)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    names = {kind.__name__ for kind in type(inner).__mro__}
    loss_type = getattr(inner, "loss_type", None)
    causal = ("ForCausalLM", "ForConditionalGeneration")
    return loss_type in causal or not names.isdisjoint(causal_lm_names())
