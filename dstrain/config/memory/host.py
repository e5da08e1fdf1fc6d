"""Bytes of host memory and local disk per rank, for each placement."""

from __future__ import annotations

from dstrain.config.memory.placement import Buckets, Placement, Work
from dstrain.config.memory.sizes import ModelSizes

# Python, torch with its CUDA libraries, and a data loader. Assumed, not measured.
PROCESS_BYTES = 3 * 2**30
NVME_OPTIMIZER_BUFFERS = 4
"""``offload_optimizer.buffer_count``; a buffer has the size of a rank's largest sub-group."""
NVME_PARAMETER_BUFFERS = 5
NVME_PARAMETER_BUFFER_ELEMENTS = 100_000_000
"""``offload_param.buffer_count`` and ``buffer_size``."""


def host_bytes(
    sizes: ModelSizes, work: Work, placement: Placement, buckets: Buckets
) -> dict[str, int]:
    """Return the bytes that a rank keeps in host memory, by kind.

    Optimizer at stages 1-2 (``stage_1_and_2.py:__init__``, ``initialize_optimizer_states``): master
    weights and their gradients, updated weights in the training format
    (``param_buffer_of_bit16_for_cpu_offload_groups``), one buffer of the size of the largest
    parameter (``temp_grad_buffer_for_cpu_offload``), and with accumulation the sums of gradients
    (``async_accumulate_grad_in_cpu_via_gpu``). At stage 3 (``stage3.py:_create_fp32_partitions``,
    ``initialize_optimizer_states``, ``_setup_for_real_optimizer``): master weights, gradients
    of each sub-group, and a flat gradient buffer in the format of gradient sums. Adam's moments are
    fp32 on the host (``cpu_adam.py:step``); states of other optimizers are in
    ``optimizer_table.py``. Parameters: ``stage3.py:_create_param_groups_fp16_flat_cpu_memory``.
    Before training, stages 0-2 build the whole model in host memory in every process.
    """
    stage, width, master = placement.stage, work.width, work.master_width
    shard = sizes.trainable_shard(work.world_size, stage)
    kinds = {"process": PROCESS_BYTES if work.device == "cuda" else 0}
    if placement.optimizer == "cpu":
        kinds["master weights"] = pinned(master * shard, work, when=stage < 3)
        kinds["optimizer"] = int(work.state_bytes(placement) * shard)
        group = shard if stage < 3 else min(shard, buckets.sub_group)
        whole, rest = divmod(shard, max(1, group))
        kinds["gradients"] = whole * pinned(master * group, work) + pinned(master * rest, work)
    if placement.optimizer == "nvme":
        group = min(shard, buckets.sub_group)
        kinds["swap buffers"] = NVME_OPTIMIZER_BUFFERS * pinned(master * group, work)
    if placement.optimizer != "none" and stage == 3:
        kinds["gradient buffer"] = pinned(work.sum_width(3) * shard, work)
    elif placement.optimizer != "none":
        kinds["parameter copy"] = pinned(width * shard, work)
        kinds["gradient buffer"] = pinned(width * sizes.largest_gradient, work)
        if work.accumulation > 1:
            kinds["accumulated gradients"] = work.sum_width(stage) * shard
    if placement.parameters == "cpu":
        kinds["parameters"] = pinned(width * sizes.partition_elements(work.world_size), work)
    if placement.parameters == "nvme":
        buffer = pinned(width * NVME_PARAMETER_BUFFER_ELEMENTS, work)
        kinds["parameter swap buffers"] = NVME_PARAMETER_BUFFERS * buffer
    kept = sum(kinds.values())
    if stage < 3 and work.device == "cuda":
        built = width * sizes.elements() + kinds["process"]
        kinds["model while it is built"] = max(0, built - kept)
    return kinds


def nvme_bytes(sizes: ModelSizes, work: Work, placement: Placement) -> dict[str, int]:
    """Return the bytes that a rank keeps on local disks, by kind.

    ``swap_tensor/partitioned_optimizer_swapper.py``: master weights, optimizer states, and
    gradients of sub-groups that are not yet updated; ``partitioned_param_swapper.py``: parameters.
    """
    shard = sizes.trainable_shard(work.world_size, placement.stage)
    kinds = {}
    if placement.optimizer == "nvme":
        kinds["master weights"] = work.master_width * shard
        kinds["optimizer"] = int(work.state_bytes(placement) * shard)
        kinds["gradients"] = work.master_width * shard
    if placement.parameters == "nvme":
        kinds["parameters"] = work.width * sizes.partition_elements(work.world_size)
    return kinds


def pinned(num_bytes: int, work: Work, *, when: bool = True) -> int:
    """Return the bytes of a page-locked buffer, which torch rounds up to a power of two.

    The allocator is ``aten/src/ATen/core/CachingHostAllocator.h:allocate``. Ranks on the CPU lock
    no pages.
    """
    if not when or work.device != "cuda" or num_bytes <= 1:
        return num_bytes
    return 1 << (num_bytes - 1).bit_length()
