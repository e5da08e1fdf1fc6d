"""Definition and counting of the targets of a model's loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dstrain.core.adapters import inner_model
from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, gather_objects
from dstrain.data.loss.evidence import Evidence
from dstrain.data.loss.explanation import (
    Explanation,
    explain,
    explain_zero_loss,
    possible_rules,
)
from dstrain.data.loss.recorder import LossCallRecorder, TargetCount
from dstrain.data.loss.rule import IGNORED, Denominator, LossFindings, LossRule, expected_rule
from dstrain.data.loss.rule_search import RuleSearch
from dstrain.data.samples import column, columns_of

logger = get_logger(__name__)

_MOST_SHOWN = 24  # most elements of a row to show in a message
_STEPS_BETWEEN_LOOKS = 64  # between watched steps of a user's own loss, once its rule is settled
_LIBRARIES = ("transformers.", "liger_kernel.")  # packages whose losses follow the model's class


class LossTargets:
    """Denominators of a model's loss, which are the weights of micro-batches.

    The first forward passes are watched until a single rule explains them; often one pass is
    enough. If several rules have counted the same in each of eight steps (no mask has excluded
    anything so far), one of them is used, and the others are its rivals: the first batch in which a
    rival counts another number is watched again.

    Attributes:
        labels: batch keys of labels.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        labels: Sequence[str],
        *,
        rule: LossRule | None = None,
        watch: bool = True,
        model_loss: bool = True,
        receives_count: bool = False,
    ) -> None:
        """Guess the rule from the model's class.

        Args:
            module: the model.
            labels: batch keys of labels.
            rule: the rule, if it is known for certain; else None.
            watch: whether forward passes may be watched (a compiled one may not).
            model_loss: whether the loss is that of the model, not of a user's function.
            receives_count: whether the model or the user's function takes the count of targets, to
                divide by it. Code that cannot be watched is assumed to do so.
        """
        self.labels = tuple(labels)
        is_library = model_loss and bool(labels) and _runs_code_of(module, _LIBRARIES)
        self._search = RuleSearch(
            type(inner_model(module)).__name__,
            expected_rule(module, labels),
            rule=rule,
            has_one_label=len(self.labels) < 2,
            may_guess=is_library or (receives_count and not watch),
        )
        self._watches = watch
        self._evidence = Evidence()
        self._is_reopened = False  # whether this rank has watched a batch since the rule settled
        self._is_library, self._is_restored = is_library, False
        self._is_given = rule is not None
        self._watched: tuple[LossCallRecorder, dict[str, torch.Tensor]] | None = None

    @property
    def rule(self) -> LossRule:
        """Return the rule by which targets are counted."""
        return self._search.rule

    @property
    def settled(self) -> bool:
        """Tell whether the rule is final; the same on all ranks."""
        return self._search.settled

    @property
    def is_exact(self) -> bool:
        """Tell whether the rule is known to be the model's own.

        It is not if the rule is a guess, or counts samples because no rule fits.
        """
        return self._search.is_exact

    def for_evaluation(self) -> LossTargets:
        """Return a copy for evaluations, which starts from the certain findings of training.

        While training has no certain rule, evaluations are watched separately, as their batches may
        exclude more or fewer rules. Training does not use evidence from evaluations.
        """
        other = copy.copy(self)
        other._search = self._search.for_evaluation()
        other._evidence, other._watched, other._is_reopened = Evidence(), None, False
        return other

    def counts(self, inputs: Any, num_samples: int | None = None) -> tuple[int, ...]:
        """Return the denominator of each part of a batch's loss; see ``LossRule.counts``.

        While the rule is a guess, the count is 0 only if none of the label columns has a label: the
        loss may be a mean over another column than the guessed one.
        """
        counts = self.rule.counts(inputs, num_samples)
        if self.is_exact:
            self._check_columns(inputs)
            return counts
        if self._has_no_label(inputs):
            return (0,)
        is_found = self._search.candidates is not None and len(self.labels) < 2
        return counts if is_found or any(counts) else LossRule().counts(inputs, num_samples)

    @property
    def is_open(self) -> bool:
        """Tell whether particular batches may reveal more about the rule; the same on all ranks.

        False for a rule that is known from a class of transformers, which any batch can confirm.
        """
        if not self._watches or (self._is_library and self._search.candidates is None):
            return False
        return not self.settled or self.has_rivals

    @property
    def has_rivals(self) -> bool:
        """Tell whether the settled rule has rivals; the same on all ranks."""
        return bool(self._search.rivals)

    @property
    def can_count(self) -> bool:
        """Tell whether the rule is settled for the batches that this rank has seen.

        The answer may differ between ranks until they call ``agree``.
        """
        return self.settled and not self._is_reopened

    def distinguishes_rivals(self, inputs: Any, num_samples: int | None = None) -> bool:
        """Tell whether the rule and its rivals count different numbers of targets in a batch.

        Takes time in proportion to the rivals, about ten at most, and does not wait for a device.
        """
        if not self.has_rivals:
            return False
        counts = self.rule.counts(inputs, num_samples)
        return any(rival.counts(inputs, num_samples) != counts for rival in self._search.rivals)

    def num_distinguished(self, inputs: Any, num_samples: int | None = None) -> int:
        """Return the number of different counts of targets that possible rules give for a batch.

        Takes time in proportion to the rules: about ten after the first loss, before that about a
        hundred for a batch of five columns. Does not wait for a device.
        """
        if self.settled:
            rules: Iterable[LossRule] = (self.rule, *self._search.rivals)
        else:
            rules = self._search.candidates or possible_rules(inputs)
        return len({rule.counts(inputs, num_samples) for rule in rules})

    def is_due_again(self, step: int, *, is_first: bool) -> bool:
        """Tell whether to watch an optimizer step to confirm the rule; the same on all ranks.

        A loss in a user's code may change its form during training (a curriculum), and between a
        checkpoint and the run that resumes from it.

        Args:
            step: number of optimizer steps done.
            is_first: whether the step is the first step of this run.
        """
        if not self.settled or not self._watches or self._search.candidates is None:
            return False
        is_due = step % _STEPS_BETWEEN_LOOKS == _STEPS_BETWEEN_LOOKS - 1
        return (self._is_restored and is_first) or (is_due and not self._is_library)

    def findings(self) -> LossFindings | None:
        """Return the findings for a checkpoint; None without any."""
        if self._is_given or not self._watches:
            return None
        return self._search.findings(self.labels)

    def restore(self, findings: LossFindings, ranks: Ranks) -> None:
        """Restore findings from a checkpoint; the first step is watched to confirm the rule.

        Args:
            findings: findings of the run that is resumed.
            ranks: rank facts of this process.
        """
        if self.settled or not self._watches or findings.labels != list(self.labels):
            return
        self._search.restore(findings, ranks)
        self._is_restored = True

    def target_count(
        self, inputs: Any, num_samples: int | None = None, *, counts: Sequence[int] | None = None
    ) -> TargetCount:
        """Count the labels of a batch, at least 1, for code that divides its loss by the count.

        Labels are counted even where losses are weighted by samples.

        Args:
            inputs: a batch in host memory.
            num_samples: number of its samples; None if unknown.
            counts: result of ``counts`` for the batch, if it is known already.
        """
        has_labels = self.rule.parts[0].column is not None and not self.rule.is_sum
        if not has_labels or counts is None:
            rule = self.rule if has_labels else self._search.guess
            counts = rule.counts(inputs, num_samples)
        return TargetCount(max(1, *counts))

    def without_ignored(self, inputs: Any) -> Any:
        """Replace ignored labels and NaN by valid labels, for a batch with weight 0."""
        if self.is_exact:
            return self.rule.without_ignored(inputs)
        names = [name for name, _ in columns_of(inputs) if name.split(".")[0] in self.labels]
        for name in names:
            inputs = Denominator(name).without_ignored(inputs)
        return inputs

    def likely_rule(self, loss: Any) -> LossRule:
        """Return the best rule by the forward pass watched now, inside ``watching``.

        Outside it, returns the rule in use.

        Args:
            loss: the loss that the forward pass has computed.
        """
        if self._watched is None or loss is None:
            return self.rule
        recorder, batch = self._watched
        found = self._explain(recorder, loss, batch, None)
        rules = {} if found is None else found.rules
        return min(rules, key=lambda rule: rules[rule], default=self.rule)

    @contextlib.contextmanager
    def watching(
        self,
        inputs: Any,
        num_samples: int | None = None,
        *,
        given: Any = None,
        again: bool = False,
    ) -> Iterator[list[Any]]:
        """Watch the forward pass in the body, unless the rule is settled for this batch.

        Args:
            inputs: the batch as the loader gave it; the body may change it.
            num_samples: number of its samples; None if unknown.
            given: the batch that the forward pass is given, if it is not ``inputs``.
            again: watch in any case.

        Yields:
            A list to which the body appends the loss; if it stays empty, the pass gives no
            evidence.
        """
        loss: list[Any] = []
        is_open = not self.settled or again or self.distinguishes_rivals(inputs, num_samples)
        if not is_open or not self._watches:
            yield loss
            if not self.settled and loss and loss[0] is not None:
                self._evidence = replace(self._evidence, has_loss=True)
            return
        batch = {name: tensor.clone() for name, tensor in columns_of(inputs)}
        recorder = LossCallRecorder(dict(columns_of(inputs if given is None else given)))
        self._watched = recorder, batch
        try:
            with recorder:
                yield loss
        finally:
            self._watched = None
        if loss and isinstance(loss[0], torch.Tensor):
            self._is_reopened = self.settled
            found = None
            if recorder.calls:
                found = self._explain(recorder, loss[0], batch, num_samples)
            elif self._search.has_calls or self._evidence.has_calls:
                # Only if other batches had calls: a loss without any calls may also be 0 at times.
                is_zero = float(loss[0].detach().double().mean()) == 0
                found = explain_zero_loss(batch) if is_zero else None
            self._evidence = self._evidence.with_pass(recorder, found)

    def agree(self, ranks: Ranks, *, final: bool, is_distinguished: bool = True) -> None:
        """Gather the evidence of all ranks and update the rule; a collective.

        A rank without evidence (it had no sample) uses that of other ranks. While several rules
        explain all batches, the best of them is used, and later batches are watched. A settled rule
        is confirmed or reset by evidence gathered since.

        Args:
            ranks: rank facts of this process.
            final: whether to settle on the guess if no rank has seen a loss.
            is_distinguished: whether a watched batch tells the rule from its rivals; if not, the
                evidence can only confirm a settled rule, or refute it.
        """
        if self.settled and self._search.candidates is None:
            return
        evidence, self._evidence = gather_objects(self._evidence), Evidence()
        self._is_reopened = False
        self._search.weigh(evidence, ranks, final=final, is_distinguished=is_distinguished)

    def _explain(
        self, recorder: LossCallRecorder, loss: Any, inputs: Any, num_samples: int | None
    ) -> Explanation | None:
        return explain(
            recorder.calls,
            loss,
            inputs,
            expected=self._search.guess if self.rule == LossRule() else self.rule,
            labels=self.labels,
            num_samples=num_samples,
            by_rows=recorder.by_rows,
            mixed=recorder.mixed,
        )

    def _check_columns(self, inputs: Any) -> None:
        """Warn once if a batch lacks the labels to count, so that its samples are counted."""
        for part in self.rule.parts:
            name = part.column
            if name is None or name in self._search.said or not isinstance(inputs, Mapping):
                continue
            if column(inputs, name) is None:
                self._search.said.add(name)
                logger.warning(
                    "a batch has no %s, which the loss is a mean over: it is weighted by its "
                    "samples (%s)",
                    name,
                    ", ".join(map(str, inputs)),
                )

    def _has_no_label(self, inputs: Any) -> bool:
        """Tell whether a batch has label columns of classes, and all their labels are ignored."""
        found = [c for name, c in columns_of(inputs) if name.split(".")[0] in self.labels]
        classes = [labels for labels in found if not labels.is_floating_point()]
        return bool(classes) and all(bool((labels == IGNORED).all()) for labels in classes)


def _runs_code_of(module: torch.nn.Module, packages: tuple[str, ...]) -> bool:
    """Tell whether the forward function of a model is defined in one of these packages."""
    forward = getattr(inner_model(module), "forward", None)
    return str(getattr(forward, "__module__", None)).startswith(packages)


def no_targets(inputs: Any, targets: LossTargets, *, num_steps: int) -> DataError:
    """Return the error for a run that begins with global batches without any target.

    Args:
        inputs: a batch in host memory, whose first row is shown.
        targets: the rule and the label columns.
        num_steps: number of global batches without a target.
    """
    rows = []
    for name, values in columns_of(inputs):
        if values.dim():
            row = values[0].flatten()
            shown = ", ".join(f"{x:g}" for x in row[:_MOST_SHOWN].tolist())
            rows.append(f"{name}: [{shown}{', ...' if row.numel() > _MOST_SHOWN else ''}]")
    return DataError(
        Problem(
            f"the first {num_steps} global batches have no target: the loss is {targets.rule}",
            "nothing can be learned from them; the first row of one is " + "; ".join(rows),
            "check the masking of labels (a prompt longer than the text is cut to, a chat template "
            "or response marker that does not match, labels that are all padding)",
        )
    )
