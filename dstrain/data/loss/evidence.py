"""Evidence about a model's loss that a rank gathers from watched forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dstrain.data.loss.explanation import Explanation
from dstrain.data.loss.recorder import LossCallRecorder
from dstrain.data.loss.rule import LossRule


@dataclass(frozen=True)
class Evidence:
    """Evidence of a rank from the forward passes watched since ranks last agreed.

    Attributes:
        has_loss: whether some pass returned a loss.
        has_calls: whether a loss came from calls of torch's loss functions.
        used_count: whether user code used the count of targets that is passed to it.
        rules: rules that explain every loss, with their looseness; None if no batch could tell.
        certain: a rule that is certain without further batches; None if there is none.
        ratios: ratios of losses to the means computed by torch's loss functions.
        marks: for each rule, a hash of all its counts of targets.
    """

    has_loss: bool = False
    has_calls: bool = False
    used_count: bool = False
    rules: dict[LossRule, int] | None = None
    certain: LossRule | None = None
    ratios: tuple[float | None, ...] = ()
    marks: Mapping[LossRule, int] = field(default_factory=dict)

    def with_pass(self, recorder: LossCallRecorder, found: Explanation | None) -> Evidence:
        """Return the evidence extended by a forward pass that returned a loss.

        Args:
            recorder: the loss calls of the pass.
            found: the rules that explain its loss; None if its batch cannot tell.
        """
        evidence = replace(
            self,
            has_loss=True,
            has_calls=self.has_calls or bool(recorder.calls),
            used_count=self.used_count or recorder.used_count,
        )
        if found is None:
            return evidence
        rules = found.rules
        if self.rules is not None:
            both = self.rules.keys() & rules.keys()
            rules = {r: max(how, rules[r]) for r, how in self.rules.items() if r in both}
        marks = {
            rule: hash((self.marks.get(rule, 0), found.counts.get(rule, ()), rule.is_sum))
            for rule in rules
        }
        return replace(
            evidence,
            rules=rules,
            certain=self.certain or found.certain,
            ratios=(*self.ratios, found.ratio),
            marks=marks,
        )
