"""The rule of a run's loss: guessed at first, found in the first forward passes, then fixed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dstrain.core.adapters import inner_model
from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, gather_objects
from dstrain.data.loss_calls import Explanation, explain, explain_nothing, possible_rules
from dstrain.data.loss_rule import (
    IGNORED,
    Candidate,
    Denominator,
    LossFindings,
    LossRule,
    expected_rule,
)
from dstrain.data.loss_watch import LossCalls, ToldCount
from dstrain.data.samples import column, columns_of

logger = get_logger(__name__)

_MOST_SHOWN = 24  # of the elements of a row
_MOST_OPEN = 8  # optimizer steps after which a rule is settled that none of them made clear
_MOST_WATCHED = 64  # the same where the rules that are left have counted different numbers
_LOOK_AGAIN = 64  # optimizer steps between two looks at a loss that a user's own code makes
_SAME_RATIO = 1e-5
_OWN_CODE = ("transformers.", "liger_kernel.")  # whose losses are what the class says


@dataclass(frozen=True)
class _Seen:
    """The findings of a rank in the forward passes that it watched since ranks agreed last.

    Attributes:
        loss: whether there was a loss.
        calls: whether it came of torch's loss functions.
        used_count: whether the count that the user's code is told was used.
        rules: those that explain every loss, and how loosely; None where no batch could tell.
        certain: a rule that needs no other batch.
        ratios: of losses to the means that torch's functions took.
        marks: a number for each rule, by all that it has counted.
    """

    loss: bool = False
    calls: bool = False
    used_count: bool = False
    rules: dict[LossRule, int] | None = None
    certain: LossRule | None = None
    ratios: tuple[float | None, ...] = ()
    marks: Mapping[LossRule, int] = field(default_factory=dict)


class LossTargets:
    """Knows what a model's loss is a mean over, and so what a micro-batch weighs.

    The first forward passes are watched until one rule is left that explains them. Most often that
    is the first pass alone. Where several are left that have counted the same in each of eight
    steps (no mask has left anything out so far), one of them is used, and the others are its
    rivals: the first batch in which they count something else is watched again.

    Attributes:
        labels: batch keys that are labels.
        rule: the rule by which targets are counted.
        settled: whether it is final, which all ranks come to know together.
        is_exact: whether it is known to be the model's own; a guess, or samples for want of one,
            is not.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        labels: Sequence[str],
        *,
        rule: LossRule | None = None,
        watch: bool = True,
        own_loss: bool = True,
        is_told: bool = False,
    ) -> None:
        """Guess the rule from the model's class.

        Args:
            module: the model.
            labels: batch keys that are labels.
            rule: the rule, where it is known for certain.
            watch: whether forward passes may be watched (a compiled one may not).
            own_loss: whether the loss is the one that the model returns, not one of the user's.
            is_told: whether the model or the user's function takes the count, to divide by it. What
                cannot be watched is believed to do so.
        """
        self.labels = tuple(labels)
        self._guess = expected_rule(module, labels)
        # Of several columns any may be what a loss is about, and the next batch may be without it.
        self._while_open = self._guess if len(self.labels) < 2 else LossRule()
        self.rule = rule or self._while_open
        self.settled = self.is_exact = rule is not None
        self._is_clear = True  # unless batches could not tell the rule from others
        self._model = type(inner_model(module)).__name__
        known = own_loss and bool(labels) and _runs_code_of(module, _OWN_CODE)
        self._may_guess = known or (is_told and not watch)
        self._watches = watch
        self._seen = _Seen()
        self._candidates: dict[LossRule, int] | None = None
        self._ratios: list[float] = []
        self._num_open = 0
        self._has_calls = False
        self._marks: dict[LossRule, int] = {}
        self._rivals: tuple[LossRule, ...] = ()
        self._is_reopened = False  # whether this rank has watched a batch since the rule settled
        self._is_known_code, self._is_taken_up = known, False
        self._is_given = rule is not None
        self._watched: tuple[LossCalls, dict[str, torch.Tensor]] | None = None
        self._said: set[str] = set()

    def for_evaluation(self) -> LossTargets:
        """Return a copy for evaluations, which starts from what is certain in training.

        Before that, or where batches of training could not tell, evaluations are watched for
        themselves: their batches may tell more or less. Training learns nothing from them.
        """
        other = copy.copy(self)
        other._seen, other._watched = _Seen(), None
        other._candidates, other._ratios, other._num_open = None, [], 0
        other._has_calls, other._marks = False, {}
        other._rivals, other._is_reopened = (), False
        if not self._is_clear:
            other.settled = other.is_exact = False
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
        is_found = self._candidates is not None and len(self.labels) < 2
        return counts if is_found or any(counts) else LossRule().counts(inputs, num_samples)

    @property
    def is_open(self) -> bool:
        """Tell whether a batch may show more of the rule; the same on all ranks.

        What the class of a model of transformers says is confirmed by any batch.
        """
        if not self._watches or (self._is_known_code and self._candidates is None):
            return False
        return not self.settled or bool(self._rivals)

    @property
    def has_rivals(self) -> bool:
        """Tell whether the rule is used without being the only one left; the same on all ranks."""
        return bool(self._rivals)

    @property
    def can_count(self) -> bool:
        """Tell whether the rule is settled for the batches that this rank has seen.

        Ranks may differ in it; they agree in ``settle``.
        """
        return self.settled and not self._is_reopened

    def is_told_by(self, inputs: Any, num_samples: int | None = None) -> bool:
        """Return whether a batch can tell the rule from its rivals: they count something else.

        Takes time with the rivals, some ten at most, and waits for no device.
        """
        if not self._rivals:
            return False
        counts = self.rule.counts(inputs, num_samples)
        return any(rival.counts(inputs, num_samples) != counts for rival in self._rivals)

    def tells(self, inputs: Any, num_samples: int | None = None) -> int:
        """Return how many groups of the rules that may be the right one a batch tells apart.

        Takes time with the rules: some ten once a loss has been seen, before that a hundred or so
        for a batch of five columns. Waits for no device.
        """
        if self.settled:
            rules: Iterable[LossRule] = (self.rule, *self._rivals)
        else:
            rules = self._candidates or possible_rules(inputs)
        return len({rule.counts(inputs, num_samples) for rule in rules})

    def looks_again_at(self, step: int, *, is_first: bool) -> bool:
        """Return whether an optimizer step is watched to confirm the rule; the same on all ranks.

        A loss of a user's own code may change its form during training (a curriculum), and before
        a run goes on.

        Args:
            step: optimizer steps that have been done.
            is_first: whether the step is the first one of this run.
        """
        if not self.settled or not self._watches or self._candidates is None:
            return False
        is_due = step % _LOOK_AGAIN == _LOOK_AGAIN - 1
        return (self._is_taken_up and is_first) or (is_due and not self._is_known_code)

    def findings(self) -> LossFindings | None:
        """Return what a run that goes on from here must know; None where nothing was found out."""
        is_new = self._candidates is None and not self.settled
        if self._is_given or is_new or not self._watches:
            return None
        return LossFindings(
            labels=list(self.labels),
            rule=self.rule,
            settled=self.settled,
            is_exact=self.is_exact,
            is_clear=self._is_clear,
            num_open=self._num_open,
            ratios=list(self._ratios),
            candidates=[
                Candidate(rule, how, self._marks.get(rule, 0), rule in self._rivals)
                for rule, how in (self._candidates or {}).items()
            ],
        )

    def take_up(self, findings: LossFindings, ranks: Ranks) -> None:
        """Go on with what a run found out; the first forward pass is watched to confirm a rule.

        Args:
            findings: of the run that goes on.
            ranks: this process among the others.
        """
        if self.settled or not self._watches or findings.labels != list(self.labels):
            return
        self.rule = findings.rule
        self.settled, self.is_exact = findings.settled, findings.is_exact
        self._is_clear, self._num_open = findings.is_clear, findings.num_open
        self._ratios, self._has_calls, self._is_taken_up = list(findings.ratios), True, True
        self._candidates = {c.rule: c.looseness for c in findings.candidates} or None
        self._marks = {c.rule: c.mark for c in findings.candidates}
        self._rivals = tuple(c.rule for c in findings.candidates if c.is_rival)
        if self.settled and not self.is_exact:
            self._go_by_samples(ranks, "was found to be no mean over labels before")

    def told(
        self, inputs: Any, num_samples: int | None = None, *, counts: Sequence[int] | None = None
    ) -> ToldCount:
        """Count the labels of a batch, for code that divides its loss by them (at least 1).

        These are labels in the whole run, also where losses are weighted by samples.

        Args:
            inputs: a batch in host memory.
            num_samples: its samples, where they are known.
            counts: what ``counts`` gave for it, where that has been asked.
        """
        has_labels = self.rule.parts[0].column is not None and not self.rule.is_sum
        if not has_labels or counts is None:
            rule = self.rule if has_labels else self._guess
            counts = rule.counts(inputs, num_samples)
        return ToldCount(max(1, *counts))

    def without_ignored(self, inputs: Any) -> Any:
        """Return the batch with valid labels everywhere, for one that carries no weight."""
        if self.is_exact:
            return self.rule.without_ignored(inputs)
        names = [name for name, _ in columns_of(inputs) if name.split(".")[0] in self.labels]
        for name in names:
            inputs = Denominator(name).without_ignored(inputs)
        return inputs

    def so_far(self, loss: Any) -> LossRule:
        """Return the rule as this rank sees it so far, inside of ``watching``.

        Args:
            loss: what came of the forward pass up to here.
        """
        if self._watched is None or loss is None:
            return self.rule
        calls, batch = self._watched
        found = self._explain(calls, loss, batch, None)
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
            a list for the loss that came of the forward pass; left empty, nothing is learned.
        """
        loss: list[Any] = []
        is_open = not self.settled or again or self.is_told_by(inputs, num_samples)
        if not is_open or not self._watches:
            yield loss
            self._note_loss(loss)
            return
        batch = {name: tensor.clone() for name, tensor in columns_of(inputs)}
        calls = LossCalls(dict(columns_of(inputs if given is None else given)))
        self._watched = calls, batch
        try:
            with calls:
                yield loss
        finally:
            self._watched = None
        if loss and isinstance(loss[0], torch.Tensor):
            self._is_reopened = self.settled
            found = None
            if calls.calls:
                found = self._explain(calls, loss[0], batch, num_samples)
            elif self._has_calls or self._seen.calls:
                # Other batches had calls. Losses that call no function may be 0 at the start too.
                is_zero = float(loss[0].detach().double().mean()) == 0
                found = explain_nothing(batch) if is_zero else None
            self._seen = _together(self._seen, calls, found)

    def _note_loss(self, loss: list[Any]) -> None:
        if not self.settled and loss and loss[0] is not None:
            self._seen = replace(self._seen, loss=True)

    def settle(self, ranks: Ranks, *, final: bool, is_told: bool = True) -> None:
        """Agree on the rule with all ranks, by what each has seen; a collective.

        A rank that has seen nothing (it had no sample) goes by what the others have seen. As long
        as several rules explain all batches the best of them counts, and later ones are watched.
        Where the rule was settled, it is left or confirmed by what has been watched since.

        Args:
            ranks: this process among the others.
            final: whether to go by the guess where no rank has seen a loss.
            is_told: whether a batch that was watched tells the rule from its rivals; else what was
                watched can only confirm a rule that is settled, or not.
        """
        if self.settled and self._candidates is None:
            return
        seen, self._seen = gather_objects(self._seen), _Seen()
        self._is_reopened = False
        clear = [s for s in seen if s.rules is not None]
        if self.settled:
            if any(s.used_count for s in seen) or not clear:
                return
            if not all(self._explains(s.rules or {}) for s in clear):
                self._begin_anew(ranks)
            elif not is_told:
                return
        used_count = any(s.used_count for s in seen)
        self._has_calls = self._has_calls or any(s.calls for s in seen)
        if clear:
            self._narrow(ranks, clear, used_count=used_count)
        elif used_count:
            self._choose(ranks, self._guess)
        elif any(s.calls for s in seen):
            self._num_open += 1
            if final and self._num_open >= _MOST_OPEN:
                self._go_by_samples(ranks, "could not be told from the first batches")
        elif final or any(s.loss for s in seen):
            self._keep_guess(ranks, "is made without a loss function whose targets can be counted")

    def _explains(self, rules: Mapping[LossRule, int]) -> bool:
        return any(rule in rules for rule in (self.rule, *self._rivals))

    def _begin_anew(self, ranks: Ranks) -> None:
        """Forget the rule: neither it nor a rival of it explains a loss that was watched later."""
        if ranks.is_main:
            logger.warning(
                "the loss of %s was %s, and is not any more: how its micro-batches are weighted is "
                "found out again",
                self._model,
                self.rule,
            )
        self.rule, self._rivals, self._candidates = self._while_open, (), None
        self.settled = self.is_exact = False
        self._marks, self._ratios, self._num_open = {}, [], 0
        self._said.clear()

    def _narrow(self, ranks: Ranks, seen: list[_Seen], *, used_count: bool) -> None:
        """Keep the rules that explain what all ranks have seen, and settle where it is clear."""
        self._num_open += 1
        explained = [s.rules or {} for s in seen]
        if self._candidates is not None:
            explained.insert(0, self._candidates)
        left = {
            rule: sum(rules[rule] for rules in explained)
            for rule in explained[0]
            if all(rule in rules for rules in explained)
        }
        if used_count and (not left or self._guess in left):
            self._choose(ranks, self._guess)
            return
        if not left:
            why = "is no mean over labels of the batch, or several at once"
            self._go_by_samples(ranks, why)
            return
        self._candidates = left
        ratios = [*self._ratios, *(r for s in seen for r in s.ratios if r is not None)]
        self._ratios = ratios if len(ratios) < 2 else [min(ratios), max(ratios)]
        certain = [s.certain for s in seen if s.certain in left]
        is_clear = bool(certain) or len(left) == 1
        self._marks = {
            rule: hash((self._marks.get(rule, 0), *(s.marks.get(rule, 0) for s in seen)))
            for rule in left
        }
        best = certain[0] if certain else min(left, key=lambda rule: left[rule])
        self.rule = best if is_clear or len(self.labels) < 2 else self._while_open
        factor_is_clear = not self._has_factor() or len(self._ratios) > 1
        others = [rule for rule in left if self._marks[rule] != self._marks[best]]
        longest = _MOST_WATCHED if others and best != LossRule() else _MOST_OPEN
        if (is_clear and factor_is_clear) or self._num_open >= longest:
            self._choose(ranks, best, among=() if is_clear else others)
            self._is_clear = is_clear
            same = [r for r in left if r != best and self._marks[r] == self._marks[best]]
            self._rivals = () if is_clear else tuple(same)
            self._candidates = {rule: left[rule] for rule in (best, *self._rivals)}

    def _choose(self, ranks: Ranks, rule: LossRule, *, among: Sequence[LossRule] = ()) -> None:
        self.rule = rule
        self.settled = self.is_exact = True
        self._is_clear = not among
        if not ranks.is_main or not self._is_new(f"is {rule}"):
            return
        logger.info("the loss of %s is %s", self._model, rule)
        if among:
            logger.warning(
                "%d steps cannot tell it from %s: if it is that, how a global batch is split "
                "changes loss and gradients%s",
                self._num_open,
                ", or ".join([str(other) for other in among][:3]),
                "; a micro-batch of several samples tells" if rule == LossRule() else "",
            )
        if self._has_factor() and not self._is_constant():
            logger.warning(
                "the loss of %s has other terms beside %s: they are weighted as it is, so how a "
                "global batch is split may change loss and gradients",
                self._model,
                rule,
            )

    def _has_factor(self) -> bool:
        return any(abs(ratio - 1) > _SAME_RATIO for ratio in self._ratios)

    def _is_constant(self) -> bool:
        """Tell whether all losses are the same multiple of the means that torch computed."""
        largest = max(map(abs, self._ratios))
        return max(self._ratios) - min(self._ratios) <= _SAME_RATIO * largest

    def _keep_guess(self, ranks: Ranks, why_not: str) -> None:
        if self._may_guess:
            self.rule = self._guess
            self.settled = self.is_exact = True
        else:
            self._go_by_samples(ranks, why_not)

    def _explain(
        self, calls: LossCalls, loss: Any, inputs: Any, num_samples: int | None
    ) -> Explanation | None:
        return explain(
            calls.calls,
            loss,
            inputs,
            expected=self._guess if self.rule == LossRule() else self.rule,
            labels=self.labels,
            num_samples=num_samples,
            by_rows=calls.by_rows,
            mixed=calls.mixed,
        )

    def _is_new(self, what: str) -> bool:
        """Tell whether this is said for the first time, in training or in an evaluation."""
        new = what not in self._said
        self._said.add(what)
        return new

    def _check_columns(self, inputs: Any) -> None:
        """Warn once that a batch lacks the labels to count, so that its samples are counted."""
        for part in self.rule.parts:
            name = part.column
            if name is None or name in self._said or not isinstance(inputs, Mapping):
                continue
            if column(inputs, name) is None:
                self._said.add(name)
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

    def _go_by_samples(self, ranks: Ranks, why: str) -> None:
        self.rule, self.settled, self._is_clear = LossRule(), True, False
        self._candidates, self._rivals = None, ()
        if ranks.is_main and self._is_new(why):
            logger.warning(
                "the loss of %s %s: micro-batches are weighted by their samples, so how a global "
                "batch is split may change loss and gradients",
                self._model,
                why,
            )


def _together(seen: _Seen, calls: LossCalls, found: Explanation | None) -> _Seen:
    """Add one forward pass with a loss to what a rank has seen."""
    seen = replace(
        seen,
        loss=True,
        calls=seen.calls or bool(calls.calls),
        used_count=seen.used_count or calls.used_count,
    )
    if found is None:
        return seen
    rules = found.rules
    if seen.rules is not None:
        both = seen.rules.keys() & rules.keys()
        rules = {r: max(how, rules[r]) for r, how in seen.rules.items() if r in both}
    ratios = (*seen.ratios, found.ratio)
    marks = {
        rule: hash((seen.marks.get(rule, 0), found.counts.get(rule, ()), rule.is_sum))
        for rule in rules
    }
    certain = seen.certain or found.certain
    return replace(seen, rules=rules, certain=certain, ratios=ratios, marks=marks)


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
