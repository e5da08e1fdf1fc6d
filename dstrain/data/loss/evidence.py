"""The evidence about a model's loss that a rank has from the forward passes that it watched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dstrain.data.loss.explanation import Explanation
from dstrain.data.loss.recorder import LossCallRecorder
from dstrain.data.loss.rule import LossRule


@dataclass(frozen=True)
class Evidence:
    """The findings of a rank in the forward passes that it watched since ranks agreed last.

    Attributes:
        has_loss: whether some pass returned a loss.
        has_calls: whether a loss was made by calls of torch's loss functions.
        used_count: whether the count of targets that user code receives was used.
        rules: those that explain every loss, and how loosely; None where no batch could tell.
        certain: a rule that needs no other batch.
        ratios: of losses to the means that torch's functions took.
        marks: for each rule a hash of all that it has counted.
    """

    has_loss: bool = False
    has_calls: bool = False
    used_count: bool = False
    rules: dict[LossRule, int] | None = None
    certain: LossRule | None = None
    ratios: tuple[float | None, ...] = ()
    marks: Mapping[LossRule, int] = field(default_factory=dict)

    def with_pass(self, recorder: LossCallRecorder, found: Explanation | None) -> Evidence:
        """Return the evidence with one more forward pass that returned a loss.

        Args:
            recorder: the loss calls of the pass.
            found: the rules that explain its loss; None where its batch cannot tell.
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
