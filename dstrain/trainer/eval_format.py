"""Evaluation in a 16-bit format that the model is not trained in (``bf16_full_eval`` and fp16)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dstrain.arguments import TrainingArguments
from dstrain.config import ResolvedConfig
from dstrain.core.errors import ConfigError, Problem
from dstrain.models import DTYPES


def full_eval_format(args: TrainingArguments, resolved: ResolvedConfig) -> str | None:
    """Return the number format to evaluate in; None where it is that of training.

    Raises:
        ConfigError: at stage 3, where a forward pass goes through the engine and its format.
    """
    wanted = "bf16" if args.bf16_full_eval else "fp16" if args.fp16_full_eval else None
    if wanted is None or wanted == resolved.precision:
        return None
    if resolved.stage == 3:
        raise ConfigError(
            Problem(
                f"{wanted}_full_eval=True at ZeRO stage 3, training in {resolved.precision}",
                "the weights are spread over the ranks in the format of training, and DeepSpeed "
                "gathers them in it",
                f"train in it ({wanted}=True), leave it out, or use stage 0, 1 or 2",
            )
        )
    return wanted


@contextlib.contextmanager
def in_format(module: torch.nn.Module, name: str) -> Iterator[None]:
    """Give parameters copies in another format in the block, and their own memory back after it.

    Buffers stay as they are: rotary frequencies in 16 bits would be wrong.
    """
    kept = [(p, p.data) for p in module.parameters() if p.is_floating_point()]
    try:
        for parameter, data in kept:
            parameter.data = data.to(DTYPES[name])
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
