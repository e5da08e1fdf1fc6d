"""Computing losses that are sums of several means, each over its own targets.

The mean of such a loss over micro-batches with any one weight is not that of the global batch: a
micro-batch may have many masked tokens and few sentences. So each mean is computed here, from the
model's logits, and weighted by its own targets; one without any target is 0 and not NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.core.adapters import has_adapters, inner_model
from dstrain.data import IGNORED, Denominator, LossRule
from dstrain.training.types import Nested

# Their losses are those of a beam search over spans.
_OTHER_SPANS = {
    "FlaubertForQuestionAnswering",
    "XLMForQuestionAnswering",
    "XLNetForQuestionAnswering",
}


@dataclass(frozen=True)
class Term:
    """Describes one mean cross entropy in a loss.

    Attributes:
        logits: the model's output, (samples, ..., classes).
        labels: the batch key of class indices, (samples, ...).
        factor: factor of the mean in the loss.
        is_position: whether labels are positions in the input: one outside is no target.
    """

    logits: str
    labels: str
    factor: float = 1.0
    is_position: bool = False


_SPAN = (
    Term("start_logits", "start_positions", 0.5, is_position=True),
    Term("end_logits", "end_positions", 0.5, is_position=True),
)
_NEXT_SENTENCE = (
    Term("prediction_logits", "labels"),
    Term("seq_relationship_logits", "next_sentence_label"),
)
_SENTENCE_ORDER = (Term("prediction_logits", "labels"), Term("sop_logits", "sentence_order_label"))
_TERMS = {
    "AlbertForPreTraining": _SENTENCE_ORDER,
    "BertForPreTraining": _NEXT_SENTENCE,
    "ErnieForPreTraining": _NEXT_SENTENCE,
    "FNetForPreTraining": _NEXT_SENTENCE,
    "MegatronBertForPreTraining": _NEXT_SENTENCE,
    "MobileBertForPreTraining": _NEXT_SENTENCE,
}


@dataclass(frozen=True)
class LossTerms:
    """Computes each mean of a model's loss.

    Attributes:
        terms: the means; the loss is the sum of mean x factor.
        main_input: the batch key that positions are in.
    """

    terms: tuple[Term, ...]
    main_input: str = "input_ids"

    @staticmethod
    def of(model: torch.nn.Module) -> LossTerms | None:
        """Find the terms of a model of transformers; None where its loss is one mean, or unknown.

        A subclass counts as the class whose ``forward`` it runs; one of the user's own is unknown.
        """
        if has_adapters(model) and any(c.is_prompt_learning for c in _adapters(model)):
            return None  # its inputs are longer than those of the batch
        inner = inner_model(model)
        owner = next(kind for kind in type(inner).__mro__ if "forward" in vars(kind))
        if not owner.__module__.startswith("transformers."):
            return None
        name = owner.__name__
        terms = _TERMS.get(name)
        if "ForQuestionAnswering" in name and name not in _OTHER_SPANS and _takes_spans(inner):
            terms = _SPAN
        main_input = getattr(inner, "main_input_name", "input_ids")
        return None if terms is None else LossTerms(terms, main_input)

    def rule(self) -> LossRule:
        """Return what each term is a mean over."""
        return LossRule(
            tuple(
                Denominator(t.labels, ignored=None, bound=self.main_input)
                if t.is_position
                else Denominator(t.labels)
                for t in self.terms
            )
        )

    def apply_to(self, inputs: object) -> bool:
        """Tell whether a batch has the labels of every term, which the model's loss needs."""
        return isinstance(inputs, Mapping) and all(
            isinstance(inputs.get(term.labels), torch.Tensor) for term in self.terms
        )

    def __call__(
        self, model: torch.nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Nested]:
        """Run the model without labels.

        Args:
            model: the engine or module to call.
            inputs: the batch on the device; not changed.

        Returns:
            the terms, a tensor of shape (number of terms,) whose sum is the loss; and the outputs.
        """
        labels = {term.labels for term in self.terms}
        outputs = model(**{name: v for name, v in inputs.items() if name not in labels})
        means = [
            term.factor * _mean(outputs[term.logits], inputs[term.labels], term)
            for term in self.terms
        ]
        return torch.stack(means), outputs


def _adapters(model: object) -> list[Any]:
    return list(getattr(model, "peft_config").values())  # noqa: B009


def _takes_spans(model: torch.nn.Module) -> bool:
    import inspect

    return {"start_positions", "end_positions"} <= set(inspect.signature(model.forward).parameters)


def _mean(logits: torch.Tensor, labels: torch.Tensor, term: Term) -> torch.Tensor:
    """Compute the mean cross entropy over targets, 0 without any; do not wait for the device."""
    logits = logits.float().flatten(0, -2)
    labels, ignored = labels.flatten(), IGNORED
    if term.is_position:
        ignored = logits.shape[-1]  # one position past the end of the input
        labels = labels.clamp(0, ignored)
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp(min=1)
