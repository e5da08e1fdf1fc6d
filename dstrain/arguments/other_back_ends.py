"""Arguments of back ends that DeepSpeed replaces or does not run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import implemented, no_effect, refused

_NO_FSDP = "ZeRO partitions the model here, not FSDP"
_ZERO_FOR_FSDP = (
    "set zero_stage: 3 for full_shard, 2 for shard_grad_op; offload_param or offload_optimizer for "
    "offload; hpz_partition_size for hybrid_shard"
)
_NO_DDP = "DeepSpeed reduces gradients itself; the model is not wrapped in DistributedDataParallel"
_NO_TPU = "DeepSpeed does not train on TPUs"
_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")


def _is_one_rank(parallelism: Any) -> bool:
    """Tell whether a ``ParallelismConfig`` has no parallelism: every size is 1 or None."""
    sizes = [getattr(parallelism, name, None) for name in _SIZES]
    return hasattr(parallelism, "dp_shard_size") and all(size in (None, 1) for size in sizes)


@dataclass
class OtherBackEndArguments:
    """Back ends that DeepSpeed replaces or does not run on."""

    fsdp: str = arg("", "FSDP options.", treatment=refused(_NO_FSDP, _ZERO_FOR_FSDP))
    fsdp_config: dict[str, Any] | str | None = arg(
        None,
        "FSDP config.",
        treatment=refused(_NO_FSDP, _ZERO_FOR_FSDP, accepts=lambda value: not value),
    )
    fsdp_min_num_params: int = arg(
        0,
        "Smallest module that FSDP wraps.",
        treatment=refused(_NO_FSDP, "leave it out: ZeRO partitions every parameter"),
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = arg(
        None,
        "Layer class that FSDP wraps.",
        treatment=refused(
            _NO_FSDP,
            "leave it out; a module that ZeRO-3 must gather whole is a leaf module (leaf_modules)",
        ),
    )
    ddp_find_unused_parameters: bool | None = arg(
        None,
        "find_unused_parameters of DistributedDataParallel.",
        treatment=no_effect(
            f"{_NO_DDP}; a parameter that has no gradient on some ranks, or on none, counts as one "
            "whose gradient is zero. At stage 3 ranks must run the same modules (leaf_modules)"
        ),
    )
    ddp_bucket_cap_mb: int | None = arg(
        None,
        "bucket_cap_mb of DistributedDataParallel.",
        treatment=no_effect(f"{_NO_DDP}; zero_optimization.reduce_bucket_size is its own size"),
    )
    ddp_static_graph: bool | None = arg(
        None,
        "static_graph of DistributedDataParallel.",
        treatment=no_effect(
            f"{_NO_DDP}; its gradients always come in one order, whatever a step uses of the model",
            own=True,
        ),
    )
    ddp_broadcast_buffers: bool | None = arg(
        None,
        "Send the main rank's buffers that training changes (running statistics of BatchNorm, "
        "moving averages) to all ranks, as DistributedDataParallel does. None is yes. False lets "
        "each rank train and evaluate with its own; the main rank's are saved.",
        treatment=implemented(
            "once per optimizer step, after its micro-batches; models whose buffers never change "
            "pay nothing"
        ),
    )
    parallelism_config: Any = arg(
        None,
        "accelerate's ParallelismConfig.",
        treatment=refused(
            "every rank is one of data parallelism here, with ZeRO to partition the model: there "
            "is no tensor, context or sequence parallelism, and no FSDP",
            "set zero_stage to 3 for dp_shard_size, hpz_partition_size as well for "
            "dp_replicate_size; leave tp_size, cp_size and sp_size out",
            accepts=_is_one_rank,
            own=True,
        ),
    )
    use_mps_device: bool = arg(
        False,
        "Train on an Apple GPU.",
        treatment=refused("DeepSpeed's engine does not train on MPS", "set use_cpu"),
    )
    use_ipex: bool = arg(
        False,
        "Optimize the model with the Intel extension for PyTorch.",
        treatment=refused(
            "ipex.optimize() changes model and optimizer, which belong to DeepSpeed's engine",
            "leave it out: DeepSpeed has CPU kernels of its own",
        ),
    )
    jit_mode_eval: bool = arg(
        False,
        "Evaluate with torch.jit.trace.",
        treatment=refused(
            "a model whose parameters ZeRO gathers and releases cannot be traced", "leave it out"
        ),
    )
    tpu_num_cores: int | None = arg(
        None, "TPU cores.", treatment=refused(_NO_TPU, "train on GPUs or on the CPU")
    )
    tpu_metrics_debug: bool = arg(
        False, "Print TPU metrics.", treatment=refused(_NO_TPU, "leave it out")
    )
    mp_parameters: str = arg(
        "",
        "Options of SageMaker model parallelism.",
        treatment=refused("SageMaker splits models with it", "set zero_stage to 3"),
    )
    past_index: int = arg(
        -1,
        "Output that is fed to the next step as mems.",
        treatment=refused(
            "the models that need it (Transformer-XL) were removed from transformers",
            "leave it out",
            accepts=lambda value: value < 0,
        ),
    )
