"""The targets of a model's loss: which they are, and how many a batch has."""

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

_MOST_SHOWN = 24  # of the elements of a row
_STEPS_BETWEEN_LOOKS = 64  # at a loss that a user's own code makes, once its rule is settled
_LIBRARIES = ("transformers.", "liger_kernel.")  # whose losses are what the class says


class LossTargets:
    """Knows what a model's loss is a mean over, and so what a micro-batch weighs.

    The first forward passes are watched until one rule is left that explains them. Most often that
    is the first pass alone. Where several are left that have counted the same in each of eight
    steps (no mask has left anything out so far), one of them is used, and the others are its
    rivals: the first batch in which they count something else is watched again.

    Attributes:
        labels: batch keys that are labels.
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
            labels: batch keys that are labels.
            rule: the rule, where it is known for certain.
            watch: whether forward passes may be watched (a compiled one may not).
            model_loss: whether the loss is the one that the model returns, not one of the user's.
            receives_count: whether the model or the user's function takes the count of targets, to
                divide by it. Code that cannot be watched is believed to do so.
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
        """Tell whether the rule is final, which all ranks come to know together."""
        return self._search.settled

    @property
    def is_exact(self) -> bool:
        """Tell whether the rule is known to be the model's own.

        A guess is not; nor are samples, which are counted where no rule fits.
        """
        return self._search.is_exact

    def for_evaluation(self) -> LossTargets:
        """Return a copy for evaluations, which starts from what is certain in training.

        Before that, or where batches of training could not tell, evaluations are watched for
        themselves: their batches may tell more or less. Training learns nothing from them.
        """
        other = copy.copy(self)
        other._search = self._search.for_evaluation()
        other._evidence, other._watched, other._is_reopened = Evidence(), None, False
        return other

    def counts(self, inputs: Any, num_samples: int | None = None) -> tuple[int, ...]:
        """Count what each part of a batch's loss is divided by; see ``LossRule.counts``.

        As long as the rule is a guess, a batch is empty only if none of its label columns has a
        label: the column that was not counted may be the one that the loss is about.
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
        """Tell whether a batch may show more of the rule; the same on all ranks.

        What the class of a model of transformers says is confirmed by any batch.
        """
        if not self._watches or (self._is_library and self._search.candidates is None):
            return False
        return not self.settled or self.has_rivals

    @property
    def has_rivals(self) -> bool:
        """Tell whether the rule is used without being the only one left; the same on all ranks."""
        return bool(self._search.rivals)

    @property
    def can_count(self) -> bool:
        """Tell whether the rule is settled for the batches that this rank has seen.

        Ranks may differ in it; they agree in ``agree``.
        """
        return self.settled and not self._is_reopened

    def distinguishes_rivals(self, inputs: Any, num_samples: int | None = None) -> bool:
        """Tell whether the rule and its rivals count different numbers of targets in a batch.

        Takes time with the rivals, some ten at most, and waits for no device.
        """
        if not self.has_rivals:
            return False
        counts = self.rule.counts(inputs, num_samples)
        return any(rival.counts(inputs, num_samples) != counts for rival in self._search.rivals)

    def num_distinguished(self, inputs: Any, num_samples: int | None = None) -> int:
        """Return how many groups of the rules that may be the right one a batch tells apart.

        Takes time with the rules: some ten once a loss has been seen, before that a hundred or so
        for a batch of five columns. Waits for no device.
        """
        if self.settled:
            rules: Iterable[LossRule] = (self.rule, *self._search.rivals)
        else:
            rules = self._search.candidates or possible_rules(inputs)
        return len({rule.counts(inputs, num_samples) for rule in rules})

    def is_due_again(self, step: int, *, is_first: bool) -> bool:
        """Tell whether an optimizer step is watched to confirm the rule; the same on all ranks.

        A loss of a user's own code may change its form during training (a curriculum), and between
        a checkpoint and the run that goes on from it.

        Args:
            step: optimizer steps that have been done.
            is_first: whether the step is the first one of this run.
        """
        if not self.settled or not self._watches or self._search.candidates is None:
            return False
        is_due = step % _STEPS_BETWEEN_LOOKS == _STEPS_BETWEEN_LOOKS - 1
        return (self._is_restored and is_first) or (is_due and not self._is_library)

    def findings(self) -> LossFindings | None:
        """Return what a run that goes on from here must know; None where nothing was found out."""
        if self._is_given or not self._watches:
            return None
        return self._search.findings(self.labels)

    def restore(self, findings: LossFindings, ranks: Ranks) -> None:
        """Go on with what a run found out; the first forward pass is watched to confirm a rule.

        Args:
            findings: of the run that goes on.
            ranks: this process among the others.
        """
        if self.settled or not self._watches or findings.labels != list(self.labels):
            return
        self._search.restore(findings, ranks)
        self._is_restored = True

    def target_count(
        self, inputs: Any, num_samples: int | None = None, *, counts: Sequence[int] | None = None
    ) -> TargetCount:
        """Count the labels of a batch, for code that divides its loss by them (at least 1).

        These are labels in the whole run, also where losses are weighted by samples.

        Args:
            inputs: a batch in host memory.
            num_samples: its samples, where they are known.
            counts: what ``counts`` gave for it, where that has been asked.
        """
        has_labels = self.rule.parts[0].column is not None and not self.rule.is_sum
        if not has_labels or counts is None:
            rule = self.rule if has_labels else self._search.guess
            counts = rule.counts(inputs, num_samples)
        return TargetCount(max(1, *counts))

    def without_ignored(self, inputs: Any) -> Any:
        """Return the batch with valid labels everywhere, for a batch that carries no weight."""
        if self.is_exact:
            return self.rule.without_ignored(inputs)
        names = [name for name, _ in columns_of(inputs) if name.split(".")[0] in self.labels]
        for name in names:
            inputs = Denominator(name).without_ignored(inputs)
        return inputs

    def likely_rule(self, loss: Any) -> LossRule:
        """Return the rule as this rank sees it so far, inside of ``watching``.

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
        """Watch the forward pass inside the block, unless the rule is settled for this batch.

        Args:
            inputs: the batch as the loader gave it. What the block changes in it is no matter.
            num_samples: its samples, where they are known.
            given: the batch that the forward pass is given, where it is another one.
            again: watch it in any case.

        Yields:
            a list to put the loss of the forward pass in; left empty, nothing is learned.
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
                # Other batches had calls. Losses that call no function may be 0 at the start too.
                is_zero = float(loss[0].detach().double().mean()) == 0
                found = explain_zero_loss(batch) if is_zero else None
            self._evidence = self._evidence.with_pass(recorder, found)

    def agree(self, ranks: Ranks, *, final: bool, is_distinguished: bool = True) -> None:
        """Agree on the rule with all ranks, by what each has seen; a collective.

        A rank that has seen nothing (it had no sample) goes by what the others have seen. As long
        as several rules explain all batches the best of them counts, and later ones are watched.
        Where the rule was settled, it is left or confirmed by what has been watched since.

        Args:
            ranks: this process among the others.
            final: whether to go by the guess where no rank has seen a loss.
            is_distinguished: whether a batch that was watched tells the rule from its rivals; else
                what was watched can only confirm a rule that is settled, or refute it.
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
        """Warn once that a batch lacks the labels to count, so that its samples are counted."""
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
        """Tell whether a batch has label columns, and not a single label in them."""
        found = [c for name, c in columns_of(inputs) if name.split(".")[0] in self.labels]
        classes = [labels for labels in found if not labels.is_floating_point()]
        return bool(classes) and all(bool((labels == IGNORED).all()) for labels in classes)


def _runs_code_of(module: torch.nn.Module, packages: tuple[str, ...]) -> bool:
    """Tell whether the forward function of a model belongs to one of these packages."""
    forward = getattr(inner_model(module), "forward", None)
    return str(getattr(forward, "__module__", None)).startswith(packages)


def no_targets(inputs: Any, targets: LossTargets, *, num_steps: int) -> DataError:
    """Return the error of a run that begins with global batches without any target.

    Args:
        inputs: a batch in host memory, whose first row is shown.
        targets: the rule and the label columns.
        num_steps: global batches that had no target.
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
