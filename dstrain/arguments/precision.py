"""Arguments about number formats."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import (
    alias,
    deepspeed_key,
    implemented,
    no_effect,
    refused,
)
from dstrain.core.errors import Problem

_FULL_EVAL = (
    "on a 16-bit copy of the weights, outside of `train()` as in transformers; training is never "
    "touched; refused at ZeRO stage 3"
)


@dataclass
class PrecisionArguments:
    """Formats of weights and activations in training; master weights are always fp32."""

    bf16: bool = arg(
        False,
        "Train in bfloat16 with fp32 master weights.",
        treatment=deepspeed_key("bf16.enabled"),
    )
    fp16: bool = arg(
        False,
        "Train in float16 with fp32 master weights and dynamic loss scaling.",
        treatment=deepspeed_key("fp16.enabled"),
    )
    torch_autocast: bool = arg(
        False,
        "Keep weights in fp32 and let torch.autocast compute matrix products in 16 bits, instead "
        "of bf16 or fp16. For models with layers that need fp32; weights and gradients take 4 "
        "bytes instead of 2, and gradients of matrices travel in 16 bits.",
        treatment=deepspeed_key("torch_autocast.enabled", own=True),
    )
    torch_autocast_dtype: str = arg(
        "bf16",
        "Format of the matrix products under torch_autocast.",
        choices=("bf16", "fp16"),
        treatment=deepspeed_key("torch_autocast.dtype", own=True),
    )
    grad_accum_dtype: str = arg(
        "auto",
        "Format in which the gradients of micro-batches are added up. bf16 has 8 bits, so the sum "
        "of many loses their last ones (64 micro-batches: off by 1/120, in fp32 by 1/670); fp32 "
        "costs 4 bytes per gradient instead of 2, for a rank's share at stages 2 and 3 and for "
        "the whole model at stage 1. auto takes fp32 for bf16 training with accumulation at "
        "stages 2 and 3, and the format of training elsewhere.",
        choices=("auto", "fp32", "bf16", "fp16"),
        treatment=deepspeed_key("data_types.grad_accum_dtype", own=True),
    )
    tf32: bool | None = arg(
        None,
        "Allow TF32 matrix products on NVIDIA Ampere or newer; none leaves torch's default.",
        treatment=implemented(),
    )
    bf16_full_eval: bool = arg(
        False,
        "Evaluate in bfloat16 a model that is not trained in it.",
        treatment=implemented(_FULL_EVAL),
    )
    fp16_full_eval: bool = arg(
        False,
        "Evaluate in float16 a model that is not trained in it.",
        treatment=implemented(_FULL_EVAL),
    )
    fp16_opt_level: str = arg(
        "O1",
        "Optimization level of NVIDIA Apex.",
        treatment=no_effect("only Apex reads it; DeepSpeed has its own fp16 with master weights"),
    )
    half_precision_backend: str = arg(
        "auto",
        "Library for mixed precision.",
        choices=("auto", "apex", "cpu_amp"),
        treatment=refused(
            "DeepSpeed does mixed precision itself, and 0.19.8 removed its Apex `amp` section",
            "set bf16 or fp16 and leave this out",
        ),
    )
    fp16_backend: str = arg(
        "auto", "Old name of half_precision_backend.", treatment=alias("half_precision_backend")
    )

    def _precision_problems(self) -> list[Problem]:
        problems = []
        if self.bf16 and self.fp16:
            problems.append(
                Problem(
                    "fp16=True and bf16=True",
                    "a model trains in one 16-bit format",
                    "keep bf16 on hardware that has it (Ampere or newer), else fp16",
                )
            )
        if self.torch_autocast and (self.bf16 or self.fp16):
            other = "bf16" if self.bf16 else "fp16"
            problems.append(
                Problem(
                    f"torch_autocast=True and {other}=True",
                    "autocast computes in 16 bits with weights that stay in fp32, and "
                    f"{other} turns the weights into 16 bits",
                    f"keep {other}, or torch_autocast with torch_autocast_dtype={other}",
                )
            )
        if self.bf16_full_eval and self.fp16_full_eval:
            problems.append(
                Problem(
                    "fp16_full_eval=True and bf16_full_eval=True",
                    "a model is evaluated in one 16-bit format",
                    "keep one of them",
                )
            )
        return problems
