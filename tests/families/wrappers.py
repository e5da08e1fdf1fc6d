"""Modules that are not transformers' own classes: subclasses, wrappers, users' modules, LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from tests.families import batches
from tests.families.family import Family
from tests.families.tiny import build, seeded


class MyLlama(LlamaForCausalLM):
    """A subclass with another name and nothing else."""


class MyForwardLlama(LlamaForCausalLM):
    """A subclass whose own signature tells nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class MyGPT2(GPT2LMHeadModel):
    """A subclass of a class whose name tells nothing about its loss."""


class Wrapped(nn.Module):
    """A causal model inside a module of the user's, with its output as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)


class OwnLoss(nn.Module):
    """A language model written by hand: embedding, recurrence, and its own mean cross-entropy."""

    def __init__(self, *, shifted: bool, width: int = 16, vocab: int = 99) -> None:
        super().__init__()
        self.shifted = shifted
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.scored(input_ids, labels, None)

    def scored(self, input_ids: Tensor, labels: Tensor | None, count: Tensor | int | None) -> Any:
        """Return scores, and the sum of the losses divided by ``count``, or by their own number."""
        scores = logits = self.head(self.mix(self.embed(input_ids))[0])
        if labels is None:
            return {"logits": logits}
        if self.shifted:
            scores, labels = scores[:, :-1], labels[:, 1:]
        scores, labels = scores.flatten(0, 1), labels.flatten()
        if count is None:
            return {"loss": functional.cross_entropy(scores, labels), "logits": logits}
        total = functional.cross_entropy(scores, labels, reduction="sum")
        return {"loss": total / count, "logits": logits}


class CountedLoss(OwnLoss):
    """As `OwnLoss`, and divides by the number of targets it is told, as transformers' models do."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        return self.scored(input_ids, labels, num_items_in_batch)


class TwoHeads(nn.Module):
    """Two classifiers on one body; a head without a label in the batch is left out of the loss."""

    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.body = nn.Linear(width, hidden)
        self.head_a = nn.Linear(hidden, batches.NUM_LABELS)
        self.head_b = nn.Linear(hidden, batches.NUM_LABELS)

    def forward(
        self, x: Tensor, labels_a: Tensor | None = None, labels_b: Tensor | None = None
    ) -> Any:
        hidden = torch.tanh(self.body(x))
        scores = self.head_a(hidden), self.head_b(hidden)
        loss = hidden.new_zeros(())
        for logits, labels in zip(scores, (labels_a, labels_b), strict=True):
            if labels is not None and (labels != batches.IGNORED).any():
                loss = loss + functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits_a": scores[0], "logits_b": scores[1]}


class Regression(nn.Module):
    """Predicts one number; the loss is the mean squared error over the rows."""

    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        prediction = self.head(torch.tanh(self.hidden(x))).squeeze(-1)
        if labels is None:
            return (prediction,)
        return functional.mse_loss(prediction, labels), prediction


class SummedLoss(Regression):
    """As `Regression`, with the sum of the squared errors."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        prediction = self.head(torch.tanh(self.hidden(x))).squeeze(-1)
        if labels is None:
            return (prediction,)
        return functional.mse_loss(prediction, labels, reduction="sum"), prediction


def lora(target: str = "q_proj") -> nn.Module:
    """Return a Llama of which only a LoRA adapter trains."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=[target, "v_proj"], lora_dropout=0.0)
    return seeded(lambda: peft.get_peft_model(build(LlamaForCausalLM), _not_zero(config)))


def _not_zero(config: Any) -> Any:
    """Set B, which is 0 at LoRA's start, to other values: at 0, A has no gradient."""
    config.init_lora_weights = False
    return config


FAMILIES = [
    Family("llama_subclass", lambda: build(MyLlama), batches.causal, "shifted"),
    Family("llama_subclass_forward", lambda: build(MyForwardLlama), batches.causal, "shifted"),
    Family("gpt2_subclass", lambda: build(MyGPT2), batches.causal, "shifted"),
    Family("llama_wrapped", lambda: Wrapped(build(LlamaForCausalLM)), batches.causal, "shifted"),
    Family("llama_lora", lora, batches.causal, "shifted"),
    Family(
        "own_loss",
        lambda: seeded(lambda: OwnLoss(shifted=False)),
        batches.causal_unmasked,
        "targets",
    ),
    Family(
        "own_loss_shifted",
        lambda: seeded(lambda: OwnLoss(shifted=True)),
        batches.causal_unmasked,
        "unknown",
    ),
    Family(
        "counted_loss",
        lambda: seeded(lambda: CountedLoss(shifted=False)),
        batches.causal_unmasked,
        "targets",
    ),
    Family(
        "counted_loss_shifted",
        lambda: seeded(lambda: CountedLoss(shifted=True)),
        batches.causal_unmasked,
        "shifted",
    ),
    Family(
        "two_heads",
        lambda: seeded(TwoHeads),
        batches.either_head,
        "terms",
        labels=("labels_a", "labels_b"),
    ),
    Family("regression", lambda: seeded(Regression), batches.numbers, "samples"),
    Family("summed_loss", lambda: seeded(SummedLoss), batches.numbers, "sum"),
]
