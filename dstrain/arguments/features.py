"""Arguments that change how the model computes: memory, compilation, kernels, noise, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import alias, implemented, pending
from dstrain.core.errors import Problem


@dataclass
class FeatureArguments:
    """What is done to the model, its loss and its memory."""

    gradient_checkpointing: bool = arg(
        False,
        "Recompute activations in the backward pass instead of keeping them.",
        treatment=pending(),
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = arg(
        None,
        "Arguments of the model's gradient_checkpointing_enable.",
        treatment=pending(only_with="gradient_checkpointing"),
    )
    torch_compile: bool = arg(False, "Compile the model with torch.compile.", treatment=pending())
    torch_compile_backend: str | None = arg(
        None, "Backend of torch.compile; setting it turns torch_compile on.", treatment=pending()
    )
    torch_compile_mode: str | None = arg(
        None, "Mode of torch.compile; setting it turns torch_compile on.", treatment=pending()
    )
    torchdynamo: str | None = arg(
        None, "Old name of torch_compile_backend.", treatment=alias("torch_compile_backend")
    )
    use_liger_kernel: bool | None = arg(
        False, "Replace layers of the model by Liger kernels.", treatment=pending()
    )
    neftune_noise_alpha: float | None = arg(
        None, "Strength of NEFTune's noise on the embeddings.", treatment=pending()
    )
    label_smoothing_factor: float = arg(
        0.0, "Share of the target's probability spread over all labels.", treatment=pending()
    )
    average_tokens_across_devices: bool | None = arg(
        False,
        "Weight the loss by the targets of all ranks and micro-batches.",
        treatment=implemented(
            "in any case: the loss is the mean over all targets of the global batch"
        ),
    )
    torch_empty_cache_steps: int | None = arg(
        None,
        "Optimizer steps after which the accelerator's memory cache is emptied; none never does.",
        treatment=pending(),
    )
    tp_size: int | None = arg(
        0,
        "Ranks that share each layer (tensor parallelism).",
        treatment=pending(
            "the model is partitioned by ZeRO",
            remedy="set zero_stage to 3, or leave it out",
            accepts=lambda value: value <= 1,
        ),
    )

    def _feature_problems(self) -> list[Problem]:
        problems = []
        if not 0 <= self.label_smoothing_factor <= 1:
            problems.append(
                Problem(
                    f"label_smoothing_factor={self.label_smoothing_factor}",
                    "a share between 0 and 1 is needed",
                )
            )
        if self.torch_empty_cache_steps is not None and self.torch_empty_cache_steps < 1:
            problems.append(
                Problem(
                    f"torch_empty_cache_steps={self.torch_empty_cache_steps}",
                    "a whole number of steps above 0 is needed",
                )
            )
        return problems
