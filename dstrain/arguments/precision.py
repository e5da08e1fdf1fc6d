"""Arguments about number formats."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import (
    alias,
    deepspeed_key,
    implemented,
    no_effect,
    pending,
    refused,
)
from dstrain.core.errors import Problem


@dataclass
class PrecisionArguments:
    """The format of weights and activations in training; master weights are always fp32."""

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
    tf32: bool | None = arg(
        None,
        "Allow TF32 matrix products on NVIDIA Ampere or newer; none leaves torch's default.",
        treatment=implemented(),
    )
    bf16_full_eval: bool = arg(
        False, "Evaluate in bfloat16 a model that is not trained in it.", treatment=pending()
    )
    fp16_full_eval: bool = arg(
        False, "Evaluate in float16 a model that is not trained in it.", treatment=pending()
    )
    fp16_opt_level: str = arg(
        "O1",
        "Optimization level of NVIDIA Apex.",
        treatment=no_effect("only Apex reads it; DeepSpeed has its own fp16 with master weights"),
    )
    half_precision_backend: str = arg(
        "auto",
        "Which library does mixed precision.",
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
        if self.bf16_full_eval and self.fp16_full_eval:
            problems.append(
                Problem(
                    "fp16_full_eval=True and bf16_full_eval=True",
                    "a model is evaluated in one 16-bit format",
                    "keep one of them",
                )
            )
        return problems
