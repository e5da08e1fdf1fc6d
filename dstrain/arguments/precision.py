"""Arguments about number formats."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.core.errors import Problem


@dataclass
class PrecisionArguments:
    """The format of weights and activations in training; master weights are always fp32."""

    bf16: bool = arg(False, "Train in bfloat16 with fp32 master weights.")
    fp16: bool = arg(False, "Train in float16 with fp32 master weights and dynamic loss scaling.")
    tf32: bool | None = arg(
        None, "Allow TF32 matrix products on NVIDIA Ampere or newer; none leaves torch's default."
    )

    def _precision_problems(self) -> list[Problem]:
        if self.bf16 and self.fp16:
            return [
                Problem(
                    "fp16=True and bf16=True",
                    "a model trains in one 16-bit format",
                    "keep bf16 on hardware that has it (Ampere or newer), else fp16",
                )
            ]
        return []
