"""``Seq2SeqTrainingArguments``: additional arguments of sequence-to-sequence models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.training_arguments import TrainingArguments
from dstrain.arguments.treatment import alias, implemented
from dstrain.core.errors import Problem


@dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments):
    """Sequence-to-sequence models: evaluation by generating text."""

    sortish_sampler: bool = arg(
        False, "Older way to write group_by_length.", treatment=alias("group_by_length")
    )
    predict_with_generate: bool = arg(
        False, "Evaluate on generated text (ROUGE, BLEU).", treatment=implemented()
    )
    generation_max_length: int | None = arg(
        None,
        "Tokens to generate at most; none takes the model's.",
        treatment=implemented(),
    )
    generation_num_beams: int | None = arg(
        None,
        "Beams of beam search; none takes the model's.",
        treatment=implemented(),
    )
    # Any is a transformers.GenerationConfig.
    generation_config: Any | str | None = arg(
        None,
        "A GenerationConfig, or the name, folder or file to load one from.",
        treatment=implemented(),
    )
    generation_gather_weights: str = arg(
        "auto",
        "At ZeRO stage 3, gather the weights once per evaluation that generates, not for each "
        "token: always, never, or auto: where twice their size is free on every rank's device.",
        choices=("auto", "always", "never"),
        treatment=implemented(own=True),
    )

    def _problems(self) -> list[Problem]:
        problems = super()._problems()
        for name in ("generation_max_length", "generation_num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(Problem(f"{name}={value}", "at least 1 is needed"))
        return problems
