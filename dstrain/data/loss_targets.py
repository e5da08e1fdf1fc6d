"""The rule of a run's loss: guessed at first, read off the first forward pass, then fixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.core.adapters import inner_model
from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, gather_objects
from dstrain.data.loss_calls import LossCall, LossCalls, explain
from dstrain.data.loss_rule import IGNORED, Denominator, LossRule, expected_rule

logger = get_logger(__name__)

_MOST_SHOWN = 24  # of the elements of a row
_MOST_UNCLEAR = 8  # optimizer steps after which a rule is settled that none of them made clear


@dataclass(frozen=True)
class _Seen:
    """What a rank has seen in the forward pass that it watched last.

    Attributes:
        loss: whether there was a loss.
        calls: whether it came of torch's loss functions.
        fitting: the rules that explain it, and how loosely; None where the batch cannot tell.
    """

    loss: bool = False
    calls: bool = False
    fitting: dict[LossRule, int] | None = None


class LossTargets:
    """Knows what a model's loss is a mean over, and so what a micro-batch weighs.

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
        is_told: bool = False,
    ) -> None:
        """Guess the rule from the model's class.

        Args:
            module: the model.
            labels: batch keys that are labels.
            rule: the rule, where it is known for certain.
            watch: whether forward passes may be watched (a compiled one may not).
            is_told: whether whoever computes the loss is told the count, to divide by it. The guess
                then holds where nothing else is seen: it is what the loss was divided by.
        """
        from transformers import PreTrainedModel

        self.labels = tuple(labels)
        self.rule = rule or expected_rule(module, labels)
        self.settled = self.is_exact = rule is not None
        self._model = type(inner_model(module)).__name__
        known = isinstance(inner_model(module), PreTrainedModel) and bool(labels)
        self._may_guess = known or is_told
        self._is_told = is_told
        self._watches = watch
        self._seen = _Seen()
        self._num_unclear = 0
        self._calls: LossCalls | None = None

    def counts(self, inputs: Any, num_samples: int | None = None) -> tuple[int, ...]:
        """Count what each part of a batch's loss is divided by; see ``LossRule.counts``.

        As long as the rule is a guess, a batch is empty only if none of its label columns has a
        label: the column that was not counted may be the one that the loss is about.
        """
        counts = self.rule.counts(inputs, num_samples)
        if self.is_exact:
            return counts
        if self._has_no_label(inputs):
            return (0,)
        return counts if any(counts) else LossRule().counts(inputs, num_samples)

    def without_ignored(self, inputs: Any) -> Any:
        """Return the batch with valid labels everywhere, for one that carries no weight."""
        if self.is_exact:
            return self.rule.without_ignored(inputs)
        for name in self.labels:
            inputs = Denominator(name).without_ignored(inputs)
        return inputs

    def so_far(self, loss: Any, inputs: Any) -> LossRule:
        """Return the rule as this rank sees it, inside of ``watching``.

        Args:
            loss: what came of the forward pass up to here.
            inputs: the batch that it was given.
        """
        if self._calls is None or loss is None:
            return self.rule
        fitting = self._explain(self._calls.calls, loss, inputs, None) or {}
        return min(fitting, key=lambda rule: fitting[rule], default=self.rule)

    @contextlib.contextmanager
    def watching(self, inputs: Any, num_samples: int | None = None) -> Iterator[list[Any]]:
        """Watch the forward pass inside the block, unless the rule is settled.

        Args:
            inputs: the batch that it is given.
            num_samples: its samples, where they are known.

        Yields:
            a list for the loss that came of the forward pass; left empty, nothing is learned.
        """
        loss: list[Any] = []
        if self.settled or not self._watches:
            yield loss
            return
        with LossCalls() as self._calls:
            yield loss
        calls, self._calls = self._calls.calls, None
        if loss and loss[0] is not None:
            fitting = self._explain(calls, loss[0], inputs, num_samples) if calls else None
            self._seen = _Seen(True, bool(calls), fitting)

    def settle(self, ranks: Ranks, *, final: bool) -> None:
        """Agree on the rule with all ranks, by what each has seen; a collective.

        A rank that has seen nothing (it had no sample) goes by what the others have seen. Where
        batches were unclear to all of them, the rule stays a guess until later ones are clear.

        Args:
            ranks: this process among the others.
            final: whether to go by the guess where no rank has seen a loss.
        """
        if self.settled:
            return
        seen = gather_objects(self._seen)
        clear = [s.fitting for s in seen if s.fitting is not None]
        if clear:
            self._choose(ranks, clear)
        elif any(s.calls for s in seen):
            self._num_unclear += 1
            if final and self._num_unclear >= _MOST_UNCLEAR:
                self._choose(ranks, [])
        elif final or any(s.loss for s in seen):
            self._keep_guess(ranks, "calls none of torch's loss functions")

    def _choose(self, ranks: Ranks, seen: list[dict[LossRule, int]]) -> None:
        """Take the first of the rules that fit best on all ranks: on one alone several may."""
        fitting = [rule for rule in (seen or [{}])[0] if all(rule in rules for rules in seen)]
        if not fitting and not self._is_told:
            self._go_by_samples(ranks, "is no mean over labels of the batch, or several at once")
            return
        self.rule = min(fitting, key=lambda r: sum(rules[r] for rules in seen), default=self.rule)
        self.settled = self.is_exact = True
        if ranks.is_main:
            logger.info("the loss of %s is %s", self._model, self.rule)

    def _keep_guess(self, ranks: Ranks, why_not: str) -> None:
        if self._may_guess:
            self.settled = self.is_exact = True
        else:
            self._go_by_samples(ranks, why_not)

    def _explain(
        self, calls: Sequence[LossCall], loss: Any, inputs: Any, num_samples: int | None
    ) -> dict[LossRule, int] | None:
        return explain(
            calls,
            loss,
            inputs,
            expected=self.rule,
            labels=self.labels,
            num_samples=num_samples,
        )

    def _has_no_label(self, inputs: Any) -> bool:
        """Return whether a batch has label columns, and not a single label in them."""
        if not isinstance(inputs, Mapping):
            return False
        found = [inputs[name] for name in self.labels if isinstance(inputs.get(name), torch.Tensor)]
        classes = [labels for labels in found if not labels.is_floating_point()]
        return bool(classes) and all(bool((labels == IGNORED).all()) for labels in classes)

    def _go_by_samples(self, ranks: Ranks, why: str) -> None:
        self.rule, self.settled = LossRule(), True
        if ranks.is_main:
            logger.warning(
                "the loss of %s %s: micro-batches are weighted by their samples, so how a global "
                "batch is split may change loss and gradients",
                self._model,
                why,
            )


def no_targets(inputs: Any, targets: LossTargets, *, num_steps: int) -> DataError:
    """Make the error of a run that begins with global batches without any target.

    Args:
        inputs: a batch in host memory, whose first row is shown.
        targets: the rule and the label columns.
        num_steps: global batches that had no target.
    """
    rows = []
    for name, column in inputs.items() if isinstance(inputs, Mapping) else ():
        if isinstance(column, torch.Tensor) and column.dim():
            row = column[0].flatten()
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
