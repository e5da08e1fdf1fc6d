"""Arguments about communication of ZeRO: overlap, formats, and groups of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import deepspeed_key
from dstrain.core.errors import Problem

COMMUNICATION_DTYPES = ("fp32", "bf16", "fp16")


@dataclass
class CommunicationArguments:
    """Exchange of gradients and parameters between ranks."""

    overlap_comm: bool | None = arg(
        None,
        "Reduce gradients (stages 1 to 3) and gather parameters (stage 3) while computing, on a "
        "stream of their own. Faster where links are slow; at stages 1 and 2 a second bucket of "
        "reduce_bucket_size is held. None is DeepSpeed's default: on at stage 3, off below.",
        treatment=deepspeed_key("zero_optimization.overlap_comm", own=True),
    )
    contiguous_gradients: bool | None = arg(
        None,
        "Copy gradients into one buffer as they come, which keeps memory from fragmenting and "
        "costs one bucket. Turn it off only to save the bucket of a model that fits barely; "
        "optimizer offload at stages 1 and 2 needs it. None is DeepSpeed's default, on.",
        treatment=deepspeed_key(
            "zero_optimization.contiguous_gradients", note="stages 1 to 3", own=True
        ),
    )
    round_robin_gradients: bool = arg(
        False,
        "Deal the parameters out to the ranks in turn, so that all ranks copy gradients to the "
        "host at the same time instead of one after the other. For optimizer offload at stages 1 "
        "and 2 on many ranks; without offload it changes nothing but the order.",
        treatment=deepspeed_key(
            "zero_optimization.round_robin_gradients", note="stages 1 and 2", own=True
        ),
    )
    communication_dtype: str | None = arg(
        None,
        "Format in which gradients are reduced. None is the format of training; fp32 keeps the "
        "sum over many ranks exact and doubles what a 16-bit run sends; bf16 halves what an fp32 "
        "run sends, at 8 bits of precision.",
        choices=COMMUNICATION_DTYPES,
        treatment=deepspeed_key("communication_data_type", own=True),
    )
    hpz_partition_size: int | None = arg(
        None,
        "ZeRO++ hpZ, stage 3: ranks (of one machine) that together keep a second copy of the "
        "16-bit parameters, so that backward gathers inside the machine. For several machines on "
        "slow links; costs 2 bytes x parameters / this number on each rank. Must divide the "
        "number of ranks. None leaves it off, 0 takes the ranks of a machine.",
        treatment=deepspeed_key(
            "zero_optimization.zero_hpz_partition_size",
            note='0, or "auto" in the config, is 1 (off) on a single machine',
            own=True,
        ),
    )
    quantized_weights: bool = arg(
        False,
        "ZeRO++ qwZ, stage 3 on CUDA: gather parameters as 8-bit integers with a scale per block. "
        "Halves what forward and backward receive; rounding costs a little accuracy.",
        treatment=deepspeed_key("zero_optimization.zero_quantized_weights", own=True),
    )
    quantized_nontrainable_weights: bool = arg(
        False,
        "Stage 3 on CUDA in fp16: keep frozen parameters as 8-bit integers, for adapters (LoRA) on "
        "a frozen model. Halves their memory and what is sent, for good: the 16-bit values are "
        "lost.",
        treatment=deepspeed_key("zero_optimization.zero_quantized_nontrainable_weights", own=True),
    )
    quantized_gradients: bool = arg(
        False,
        "ZeRO++ qgZ, stage 3 on CUDA with several machines: reduce gradients as 4-bit integers "
        "between machines. Sends a quarter; each step rounds, so compare the loss with a run "
        "without it. Changes nothing on one machine.",
        treatment=deepspeed_key("zero_optimization.zero_quantized_gradients", own=True),
    )

    def _communication_problems(self) -> list[Problem]:
        if self.hpz_partition_size is None or self.hpz_partition_size >= 0:
            return []
        return [
            Problem(
                f"hpz_partition_size={self.hpz_partition_size}",
                "a number of ranks is needed, or 0 for the ranks of a machine",
            )
        ]
