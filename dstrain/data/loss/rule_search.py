"""Search for the rule of a run's loss, made by all ranks together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks
from dstrain.data.loss.evidence import Evidence
from dstrain.data.loss.rule import Candidate, LossFindings, LossRule

logger = get_logger(__name__)

_MOST_OPEN = 8  # optimizer steps after which the best of several possible rules is settled
_MOST_WATCHED = 64  # the same limit if the remaining rules have counted different numbers
_SAME_RATIO = 1e-5


class RuleSearch:
    """Search that narrows the possible rules by the evidence of all ranks, until one is settled.

    Attributes:
        rule: the rule in use.
        settled: whether the rule is final; the same on all ranks.
        is_exact: whether the rule is known to be the model's own, not a guess, or samples as a
            substitute where no rule fits.
        is_clear: whether batches have excluded all other rules.
        candidates: rules that explain every loss, with their looseness; None before the first loss.
        rivals: rules that have counted the same as the settled rule so far, and may replace it.
        has_calls: whether some rank has recorded calls of torch's loss functions.
        said: messages logged so far, shared with the searches of evaluations.
    """

    def __init__(
        self,
        model: str,
        guess: LossRule,
        *,
        rule: LossRule | None,
        has_one_label: bool,
        may_guess: bool,
    ) -> None:
        """Start with a guess.

        Args:
            model: the name of the model's class, for messages.
            guess: the rule that the class suggests.
            rule: the rule, if it is known for certain; else None.
            has_one_label: whether there is at most one label column. With several columns, a loss
                may be a mean over any of them, and the next batch may lack that column.
            may_guess: whether to use the guess if no loss function is called.
        """
        self.guess = guess
        self._while_open = guess if has_one_label else LossRule()
        self.rule = rule or self._while_open
        self.settled = self.is_exact = rule is not None
        self.is_clear = True
        self.candidates: dict[LossRule, int] | None = None
        self.rivals: tuple[LossRule, ...] = ()
        self.has_calls = False
        self.said: set[str] = set()
        self._model, self._has_one_label, self._may_guess = model, has_one_label, may_guess
        self._ratios: list[float] = []
        self._marks: dict[LossRule, int] = {}
        self._num_open = 0

    def for_evaluation(self) -> RuleSearch:
        """Return a separate search that starts from the certain findings of this one."""
        other = copy.copy(self)
        other.candidates, other.rivals, other.has_calls = None, (), False
        other._ratios, other._marks, other._num_open = [], {}, 0
        if not self.is_clear:
            other.settled = other.is_exact = False
        return other

    def findings(self, labels: Sequence[str]) -> LossFindings | None:
        """Return the findings for a checkpoint; None without any.

        Args:
            labels: the label columns.
        """
        if self.candidates is None and not self.settled:
            return None
        return LossFindings(
            labels=list(labels),
            rule=self.rule,
            settled=self.settled,
            is_exact=self.is_exact,
            is_clear=self.is_clear,
            num_open=self._num_open,
            ratios=list(self._ratios),
            candidates=[
                Candidate(rule, how, self._marks.get(rule, 0), rule in self.rivals)
                for rule, how in (self.candidates or {}).items()
            ],
        )

    def restore(self, findings: LossFindings, ranks: Ranks) -> None:
        """Restore the findings of an earlier run.

        Args:
            findings: findings of the earlier run.
            ranks: rank facts of this process.
        """
        self.rule = findings.rule
        self.settled, self.is_exact = findings.settled, findings.is_exact
        self.is_clear, self._num_open = findings.is_clear, findings.num_open
        self._ratios, self.has_calls = list(findings.ratios), True
        self.candidates = {c.rule: c.looseness for c in findings.candidates} or None
        self._marks = {c.rule: c.mark for c in findings.candidates}
        self.rivals = tuple(c.rule for c in findings.candidates if c.is_rival)
        if self.settled and not self.is_exact:
            self._go_by_samples(ranks, "was found to be no mean over labels before")

    def weigh(
        self, evidence: Sequence[Evidence], ranks: Ranks, *, final: bool, is_distinguished: bool
    ) -> None:
        """Update the search by the evidence of all ranks; the same on all of them.

        Args:
            evidence: evidence of each rank.
            ranks: rank facts of this process.
            final: whether to settle on the guess if no rank has seen a loss.
            is_distinguished: whether a watched batch tells the rule from its rivals; if not, the
                evidence can only confirm a settled rule, or refute it.
        """
        clear = [seen for seen in evidence if seen.rules is not None]
        if self.settled:
            if any(seen.used_count for seen in evidence) or not clear:
                return
            if not all(self._is_explained_by(seen.rules or {}) for seen in clear):
                self._begin_anew(ranks)
            elif not is_distinguished:
                return
        used_count = any(seen.used_count for seen in evidence)
        has_calls = any(seen.has_calls for seen in evidence)
        self.has_calls = self.has_calls or has_calls
        if clear:
            self._narrow(ranks, clear, used_count=used_count)
        elif used_count:
            self._settle(ranks, self.guess)
        elif has_calls:
            self._num_open += 1
            if final and self._num_open >= _MOST_OPEN:
                self._go_by_samples(ranks, "could not be told from the first batches")
        elif final or any(seen.has_loss for seen in evidence):
            self._keep_guess(ranks, "is made without a loss function whose targets can be counted")

    def is_new(self, what: str) -> bool:
        """Record a message as logged; tell whether it was new in training and evaluations."""
        new = what not in self.said
        self.said.add(what)
        return new

    def _is_explained_by(self, rules: Mapping[LossRule, int]) -> bool:
        return any(rule in rules for rule in (self.rule, *self.rivals))

    def _begin_anew(self, ranks: Ranks) -> None:
        """Reset the search, as neither the rule nor a rival explains a loss watched later."""
        if ranks.is_main:
            logger.warning(
                "the loss of %s was %s, and is not any more: the weights of its micro-batches are "
                "found out again",
                self._model,
                self.rule,
            )
        self.rule, self.rivals, self.candidates = self._while_open, (), None
        self.settled = self.is_exact = False
        self._marks, self._ratios, self._num_open = {}, [], 0
        self.said.clear()

    def _narrow(self, ranks: Ranks, evidence: Sequence[Evidence], *, used_count: bool) -> None:
        """Keep the rules that explain all ranks' evidence; settle if one is clear or time is up."""
        self._num_open += 1
        explained = [seen.rules or {} for seen in evidence]
        if self.candidates is not None:
            explained.insert(0, self.candidates)
        left = {
            rule: sum(rules[rule] for rules in explained)
            for rule in explained[0]
            if all(rule in rules for rules in explained)
        }
        if used_count and (not left or self.guess in left):
            self._settle(ranks, self.guess)
            return
        if not left:
            why = "is no mean over labels of the batch, or several at once"
            self._go_by_samples(ranks, why)
            return
        self.candidates = left
        ratios = [*self._ratios, *(r for seen in evidence for r in seen.ratios if r is not None)]
        self._ratios = ratios if len(ratios) < 2 else [min(ratios), max(ratios)]
        certain = [seen.certain for seen in evidence if seen.certain in left]
        is_clear = bool(certain) or len(left) == 1
        self._marks = {
            rule: hash((self._marks.get(rule, 0), *(seen.marks.get(rule, 0) for seen in evidence)))
            for rule in left
        }
        best = certain[0] if certain else min(left, key=lambda rule: left[rule])
        self.rule = best if is_clear or self._has_one_label else self._while_open
        factor_is_clear = not self._has_factor() or len(self._ratios) > 1
        others = [rule for rule in left if self._marks[rule] != self._marks[best]]
        longest = _MOST_WATCHED if others and best != LossRule() else _MOST_OPEN
        if (is_clear and factor_is_clear) or self._num_open >= longest:
            self._settle(ranks, best, among=() if is_clear else others)
            self.is_clear = is_clear
            same = [r for r in left if r != best and self._marks[r] == self._marks[best]]
            self.rivals = () if is_clear else tuple(same)
            self.candidates = {rule: left[rule] for rule in (best, *self.rivals)}

    def _settle(self, ranks: Ranks, rule: LossRule, *, among: Sequence[LossRule] = ()) -> None:
        """Settle on a rule; log on the main rank the rules that batches could not exclude."""
        self.rule = rule
        self.settled = self.is_exact = True
        self.is_clear = not among
        if not ranks.is_main or not self.is_new(f"is {rule}"):
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
        """Tell whether all losses are the same multiple of the means computed by torch."""
        largest = max(map(abs, self._ratios))
        return max(self._ratios) - min(self._ratios) <= _SAME_RATIO * largest

    def _keep_guess(self, ranks: Ranks, why_not: str) -> None:
        if self._may_guess:
            self.rule = self.guess
            self.settled = self.is_exact = True
        else:
            self._go_by_samples(ranks, why_not)

    def _go_by_samples(self, ranks: Ranks, why: str) -> None:
        self.rule, self.settled, self.is_clear = LossRule(), True, False
        self.candidates, self.rivals = None, ()
        if ranks.is_main and self.is_new(why):
            logger.warning(
                "the loss of %s %s: micro-batches are weighted by their samples, so how a global "
                "batch is split may change loss and gradients",
                self._model,
                why,
            )
