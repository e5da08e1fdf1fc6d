"""Rules for combining the losses of micro-batches into the loss of the global batch."""

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
    """Definition of the targets by whose number a mean loss divides.

    Targets are counted in batches that are still in host memory.

    Attributes:
        column: batch key of the labels; None counts samples.
        shifted: whether the model predicts token t from tokens before t, so that the first label
            of a sequence is no target. A batch with ``shift_labels`` is shifted already.
        ignored: label that is no target; None if every label except NaN is a target.
        mask: batch key of a mask; only labels where it is not 0 are targets.
        bound: batch key of a column whose second dimension bounds labels that are positions in it;
            labels at or beyond the bound are no targets (answers outside a truncated text).
    """

    column: Text | None = None
    shifted: Flag = False
    ignored: Integer | None = IGNORED
    mask: Text | None = None
    bound: Text | None = None

    def count(self, inputs: Any, num_samples: int) -> int:
        """Count the targets in a batch of ``num_samples`` samples in host memory."""
        found = self.targets(inputs)
        return num_samples if found is None else int(found[1].sum())

    def targets(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the labels of a batch, and a mask of the labels that are targets.

        Returns:
            Labels and a boolean mask of the same shape, without the first label of each sequence if
            the model shifts them; None if samples are counted: without a column, for a batch
            without such labels, or for float labels where ``ignored`` is a class.
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
            valid = ~labels.isnan()  # a finite mean cannot include NaN
        mask = column(inputs, self.mask)
        if mask is not None and mask.shape == labels.shape[: mask.dim()]:
            # An entry of a mask may apply to a whole row of labels, such as the floats of a frame.
            valid &= (mask != 0).reshape(*mask.shape, *[1] * (labels.dim() - mask.dim()))
        limit = column(inputs, self.bound)
        if limit is not None and limit.dim() > 1:
            valid &= labels < limit.shape[1]
        return (labels[..., 1:], valid[..., 1:]) if shifts else (labels, valid)

    def without_ignored(self, inputs: Any) -> Any:
        """Replace ignored labels and NaN by valid labels, for a batch with weight 0.

        A mean over no target is 0/0, and NaN times a weight of 0 stays NaN.
        """
        if not isinstance(inputs, Mapping) or self.column is None:
            return inputs
        changed: Any = inputs
        for name in (self.column, SHIFTED_LABELS):
            labels = column(changed, name)
            if labels is None:
                continue
            if labels.is_floating_point():
                # Where the label is NaN, the gradient of a masked element is NaN as well.
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
        """Describe the counted targets, for a log line."""
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
    """Kind of a loss: a mean, a sum of means over different targets, or a sum over samples.

    Attributes:
        parts: the denominator of each mean; most losses have a single part.
        is_sum: whether the loss is a sum over samples, so that losses of micro-batches are added.
    """

    parts: tuple[Denominator, ...] = (SAMPLES,)
    is_sum: Flag = False

    def counts(self, inputs: Any, num_samples: int | None = None) -> tuple[int, ...]:
        """Return the denominator of each part of a batch's loss, which is the part's weight.

        Args:
            inputs: a batch in host memory.
            num_samples: number of its samples; None infers it with ``batch_size``.
        """
        if self.is_sum:
            return (1,)
        if num_samples is None:
            num_samples = batch_size(inputs)
        return tuple(part.count(inputs, num_samples) for part in self.parts)

    def without_ignored(self, inputs: Any) -> Any:
        """Replace ignored labels and NaN by valid labels, for a batch with weight 0."""
        for part in self.parts:
            inputs = part.without_ignored(inputs)
        return inputs

    def __str__(self) -> str:
        """Describe the loss, for a log line."""
        if self.is_sum:
            return "a sum over samples"
        return " + ".join(f"a mean over {part}" for part in self.parts)


@dataclass(frozen=True)
class Candidate:
    """Rule that explains all watched losses.

    Attributes:
        rule: the rule.
        looseness: its looseness (see ``explanation.Explanation``), summed over batches.
        mark: hash of all its counts of targets, equal for rules that counted the same numbers.
        is_rival: whether it may still turn out to be right instead of the rule in use.
    """

    rule: LossRule
    looseness: Count
    mark: Integer
    is_rival: Flag


@dataclass(frozen=True)
class LossFindings:
    """Findings of a run about its loss, saved for a run that resumes from its checkpoint.

    Attributes:
        labels: batch keys of labels.
        rule: the rule in use.
        settled: whether the rule is final, unless a later batch tells it from a rival.
        is_exact: whether the rule is the loss's own, not samples as a substitute where no rule
            fits.
        is_clear: whether no other rule is possible.
        num_open: optimizer steps watched before the rule was settled, or so far.
        ratios: smallest and largest ratio of losses to the means computed by torch's loss
            functions; a single number after one ratio, empty without any.
        candidates: the remaining rules; empty if losses are weighted by samples.
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
    """Guess a model's rule from its class, before any loss was computed.

    Args:
        module: the model.
        labels: its label columns; the first one counts.
    """
    if not labels:
        return LossRule()
    return LossRule((Denominator(labels[0], shifted=shifts_labels(module)),))


def shifts_labels(module: torch.nn.Module) -> bool:
    """Guess whether a model shifts labels itself, as transformers' causal language models do.

    Subclasses can have any name, so the names of all base classes are compared.
    """
    inner = inner_model(module)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    names = {kind.__name__ for kind in type(inner).__mro__}
    loss_type = getattr(inner, "loss_type", None)
    causal = ("ForCausalLM", "ForConditionalGeneration")
    return loss_type in causal or not names.isdisjoint(causal_lm_names())
