"""Memory model: bytes per rank by kind, for a stage and a place for optimizer and parameters.

Each formula names the allocation that it counts, in DeepSpeed 0.19.8 (``file:function``) or torch.
The peak is at one of three moments of a step: the *loss* (with all activations and logits),
*backward* (with gradients and communication buffers), or the optimizer *step*. Bytes of a kind are
its maximum over these moments, so that all kinds may add up to more than the peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.config.memory.activations import (
    Batch,
    activation_bytes,
    logits_bytes,
    logits_gradient_bytes,
    recomputed_bytes,
)
from dstrain.config.memory.buffers import gathered_bytes, reduction_bytes, unfilled
from dstrain.config.memory.host import host_bytes, nvme_bytes
from dstrain.config.memory.placement import FP32, Buckets, Placement, Work
from dstrain.config.memory.sizes import ModelSizes

GIB = 2**30
# CUDA context and kernels (about 0.5 GiB), NCCL's channels (about 0.5 GiB), cuBLAS workspaces and
# memory that the caching allocator cannot reuse (about 0.5 GiB). Assumed, not measured.
CUDA_OVERHEAD_BYTES = int(1.5 * GIB)
# A rank on the CPU: Python with torch, deepspeed and transformers has 0.27 GiB of private pages
# after import (measured); the rest, for data and buffers of matrix libraries, is assumed.
CPU_OVERHEAD_BYTES = GIB // 2
# torch's AdamW on one flat tensor: the square root of the second moment (_foreach_sqrt in
# _multi_tensor_adam), and on the CPU its quotient as well (_single_tensor_adam).
ADAM_TEMPORARY_BYTES = {"cuda": FP32, "cpu": 2 * FP32}


@dataclass(frozen=True)
class Footprint:
    """Bytes that one rank needs, by kind, by moment of a step, and by place.

    Attributes:
        placement: stage and offloads.
        kinds: kind -> most bytes on the accelerator at any moment.
        moments: moment of the step -> bytes on the accelerator, of all kinds.
        host: kind -> bytes in host memory.
        nvme: kind -> bytes on local disks.
        overhead: bytes besides tensors, on the accelerator or, without one, in the process.
    """

    placement: Placement
    kinds: Mapping[str, int]
    moments: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    nvme: Mapping[str, int] = field(default_factory=dict)
    overhead: int = 0

    @property
    def peak(self) -> int:
        """Return the most bytes allocated at once, as torch's allocator reports them."""
        return max(self.moments.values())

    @property
    def needed(self) -> int:
        """Return the bytes of the peak and of the overhead."""
        return self.peak + self.overhead

    @property
    def states(self) -> int:
        """Return bytes between steps: parameters, master weights, optimizer states, buffers."""
        return self.moments["between steps"]

    def to_dict(self) -> dict[str, Any]:
        """Return the footprint as JSON data."""
        return {
            **self.placement.to_dict(),
            "device_bytes": dict(self.kinds),
            "moments_bytes": dict(self.moments),
            "peak_bytes": self.peak,
            "overhead_bytes": self.overhead,
            "host_bytes": dict(self.host),
            "nvme_bytes": dict(self.nvme),
        }


def footprint(
    sizes: ModelSizes, work: Work, batch: Batch, placement: Placement, buckets: Buckets
) -> Footprint:
    """Return the bytes per rank of one placement."""
    states = state_bytes(sizes, work, placement, buckets)
    gradients = gradient_bytes(sizes, work, placement)
    carried = gradients if work.accumulation > 1 else 0
    held, copied = reduction_bytes(sizes, work, placement, buckets)
    gathered, arriving = gathered_bytes(sizes, work, placement, buckets)
    step = step_bytes(sizes, work, placement, buckets)
    activations = inside = logits = logits_gradient = 0
    if sizes.block is not None:
        activations = activation_bytes(sizes.block, batch)
        inside = recomputed_bytes(sizes.block, batch)
        logits = logits_bytes(sizes.vocab_size, batch, fp32_loss=sizes.block.fp32_loss)
        logits_gradient = logits_gradient_bytes(sizes.vocab_size, batch)
    standing = sum(states.values())
    begins = standing + activations + gathered + carried
    head = sizes.largest_gradient * work.width
    moments = {
        "between steps": standing,
        "forward": begins + arriving,
        "loss": begins + logits,
        # On the CPU an empty bucket takes no pages.
        "backward begins": begins
        + max(logits_gradient + head, inside)
        + (held if work.device == "cuda" else 0),
        "backward ends": standing + inside + max(gradients, copied) + held,
        "step": standing + step,
    }
    if placement.stage == 0:
        moments["backward ends"] = standing + inside + gradients + copied
    if placement.stage == 1 and placement.optimizer == "none":
        # Gradients of the partition grow while whole gradients are replaced by views of the bucket.
        partition = gradient_bytes(sizes, work, Placement(2))
        moments["backward ends"] = standing + inside + gradients + held + max(0, partition - copied)
    if placement.stage >= 2 and (left := unfilled(sizes, buckets)) > 0:
        moments["first reductions"] = (
            standing + int(left * (activations + gathered)) + arriving + inside
            + carried + gradients + held + copied
        )  # fmt: skip
    kinds = {
        **{name: states[name] for name in ("parameters", "master weights", "optimizer")},
        "gradients": states["gradients"] + gradients,
        "buckets": states["buckets"] + held + copied + gathered + arriving,
        "activations": activations,
        "logits": logits,
        "step": step,
    }
    host = host_bytes(sizes, work, placement, buckets)
    return Footprint(
        placement,
        kinds,
        moments,
        host,
        nvme_bytes(sizes, work, placement),
        CPU_OVERHEAD_BYTES if work.device == "cpu" else CUDA_OVERHEAD_BYTES,
    )


def state_bytes(
    sizes: ModelSizes, work: Work, placement: Placement, buckets: Buckets
) -> dict[str, int]:
    """Return the bytes that stay allocated on the accelerator between steps, by kind.

    ZeRO (Rajbhandari et al. 2020, figure 1): 2 + 2 + 12 bytes per parameter for 16-bit Adam, each
    whole or divided by the number of ranks. The 12 bytes are master weights and optimizer states:
    stage 0 ``unfused_optimizer.py:__init__`` (in fp32 no master weights); stages 1-2
    ``stage_1_and_2.py:__init__`` (``single_partition_of_fp32_groups``: a clone in fp32 too);
    stage 3 ``stage3.py:_create_fp32_partitions``, ``_setup_for_real_optimizer`` (a flat gradient
    buffer and the reduction bucket are never freed), and small parameters stay gathered
    (``parameter_offload.py:mark_persistent_parameters``).
    """
    stage, shard = placement.stage, sizes.trainable_shard(work.world_size, placement.stage)
    parameters, gradients, standing = sizes.elements() * work.width, 0, 0
    master = work.master_width * shard if stage or work.width < FP32 else 0
    if stage == 3:
        parameters = sizes.partition_elements(work.world_size) * work.width
        parameters = 0 if placement.parameters != "none" else parameters
        if work.world_size > 1 or placement.parameters != "none":
            parameters += sizes.elements_up_to(buckets.persistence) * work.width
        gradients = 0 if placement.optimizer != "none" else shard * work.sum_width(3)
        standing = buckets.reduce * work.width
    elif placement.optimizer != "none":
        standing = sizes.largest_gradient * work.width  # temp_grad_buffer_for_gpu_offload
    on_device = placement.optimizer == "none"
    return {
        "parameters": parameters,
        "master weights": master if on_device else 0,
        "optimizer": int(work.state_bytes(placement) * shard) if on_device else 0,
        "gradients": gradients,
        "buckets": standing,
    }


def gradient_bytes(sizes: ModelSizes, work: Work, placement: Placement) -> int:
    """Return bytes of gradients on the accelerator when backward ends, without flat buffers.

    Stages 0-1 keep whole gradients until the last micro-batch of a step
    (``stage_1_and_2.py:process_gradients`` reduces earlier only if gradients are partitioned).
    Stage 2 keeps ``grads_in_partition`` (``copy_grads_in_partition``): the whole gradient of each
    parameter that overlaps the partition; with offload each is moved to the host. Sums in fp32
    have the size of the partition (``_build_compact_grad_partition_buffer``).
    """
    trainable = sizes.facts.num_trainable
    if placement.stage < 2:
        return trainable * work.width
    if placement.stage == 3 or placement.optimizer != "none":
        return 0
    if work.sums_in_fp32(2):
        return sizes.trainable_shard(work.world_size, 2) * FP32
    shared = sizes.shared_at_boundary * min(1.0, (work.world_size - 1) / 2)
    touched = sizes.trainable_shard(work.world_size, 2) + int(shared)
    return min(trainable, touched) * work.width


def step_bytes(sizes: ModelSizes, work: Work, placement: Placement, buckets: Buckets) -> int:
    """Return the bytes that the optimizer step needs besides the states.

    Stages 1-2 (``stage_1_and_2.py:step``): gradients of the partition, which share one storage for
    all parameter groups and are freed after the last; a flat copy of them and a flat copy in fp32,
    or the copy in fp32 and the temporary of Adam. Stage 3: these copies for one sub-group at a time
    (``stage3.py:_prepare_fp32_grad_for_sub_group``). Stage 0: gradients of backward, and fp32
    copies of all of them (``unfused_optimizer.py:step``). For sums of gradients in fp32, stage 2
    uses their buffer without a copy (``_get_preflattened_grad_partition``), and stage 3 makes one
    copy.
    """
    if placement.optimizer != "none":
        return 0
    width, temporary = work.width, ADAM_TEMPORARY_BYTES.get(work.device, FP32)
    temporary = temporary if work.adam_temporary else 0
    master = work.master_width
    if work.narrow_states:
        temporary = temporary * master // FP32
    trainable = sizes.facts.num_trainable
    if placement.stage == 0:
        at_once = trainable if work.device == "cuda" else sizes.largest_gradient
        copies = FP32 * trainable if width < FP32 else 0
        return trainable * width + copies + temporary * at_once
    shard = sizes.trainable_shard(work.world_size, placement.stage)
    group = min(shard, buckets.sub_group) if placement.stage == 3 else shard
    held = 0 if placement.stage == 3 else gradient_bytes(sizes, work, Placement(2))
    copies = (width + master if width < master else master) * group
    if work.sums_in_fp32(placement.stage):
        narrowed = master * group if master < FP32 else 0
        if placement.stage == 2:
            return held + narrowed + temporary * group
        copies = FP32 * group + narrowed
    return held + max(copies, (master + temporary) * group)
