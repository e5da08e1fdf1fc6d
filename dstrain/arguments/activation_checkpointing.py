"""Arguments of DeepSpeed's activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import deepspeed_key, refused

# deepspeed/runtime/activation_checkpointing/checkpointing.py: CheckpointFunction.forward
_ONE_RANK = (
    "it divides activations among the ranks that share a layer, and here no two ranks do: "
    "DeepSpeed would ignore it"
)


@dataclass
class ActivationCheckpointingArguments:
    """Behaviour of ``deepspeed.checkpointing.checkpoint`` in models that call it."""

    cpu_checkpointing: bool = arg(
        False,
        "Keep the inputs of checkpointed layers in host memory until backward recomputes them. For "
        "modules that call deepspeed.checkpointing.checkpoint themselves; models of transformers "
        "do not, and are refused with it.",
        treatment=deepspeed_key(
            "activation_checkpointing.cpu_checkpointing",
            note="models of transformers: `gradient_checkpointing`",
            own=True,
        ),
    )
    partition_activations: bool = arg(
        False,
        "Divide checkpointed activations among tensor-parallel ranks.",
        treatment=refused(_ONE_RANK, "leave it out, or set cpu_checkpointing", own=True),
    )
    contiguous_memory_optimization: bool = arg(
        False,
        "Keep divided activations in one buffer; needs partition_activations.",
        treatment=refused(_ONE_RANK, "leave it out", own=True),
    )
