"""Checks of settings that exclude each other in a DeepSpeed config; all problems are listed.

They hold for DeepSpeed 0.19.8. Comments name the file and function of DeepSpeed that refuses a
value, or ignores it without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dstrain.config.resolution.effective import ZERO, EffectiveConfig
from dstrain.config.resolution.format_constraints import FORMAT_CHECKS, coarse_sums
from dstrain.config.resolution.tree import has
from dstrain.core.errors import Problem


def find_problems(config: EffectiveConfig) -> list[Problem]:
    """Return a problem for all keys that exclude each other, and for keys without effect."""
    return [problem for check in _CHECKS for problem in check(config)]


def find_warnings(
    config: EffectiveConfig, by_argument: frozenset[str]
) -> tuple[list[Problem], list[str]]:
    """Return problems and warnings of keys that other stages read, and warnings of sums in bf16.

    A key that an argument set is a problem. A key in the user's config, which may have been written
    for another stage, gives a warning.
    """
    problems: list[Problem] = []
    warnings = list(coarse_sums(config))
    for name, (stages, argument) in _TUNING.items():
        key = f"{ZERO}.{name}"
        if config.stage in stages or not config.has(key):
            continue
        known = " and ".join(str(stage) for stage in stages)
        if has(by_argument, key):
            problems.append(
                Problem(
                    f"argument {argument} with stage {config.stage}",
                    f"only stage {known} reads {name}: it would be ignored",
                    f"leave {argument} out, or set zero_stage to {stages[-1]}",
                )
            )
        else:
            warnings.append(f"{key} has no effect at stage {config.stage}: it is of stage {known}")
    return problems, warnings


# key of zero_optimization -> stages that read it, and the argument for it
_TUNING: dict[str, tuple[tuple[int, ...], str]] = {
    "overlap_comm": ((1, 2, 3), "overlap_comm"),
    "contiguous_gradients": ((1, 2, 3), "contiguous_gradients"),
    "round_robin_gradients": ((1, 2), "round_robin_gradients"),
    "sub_group_size": ((3,), "sub_group_size"),
    "leaf_module": ((3,), "leaf_modules"),
}


# --- samples -------------------------------------------------------------------------------------


def _shared_samples(config: EffectiveConfig) -> Iterator[Problem]:
    """Refuse parallelism in which the ranks of a group work on the same samples.

    dstrain gives each rank other samples. The global batch would be micro-batch x accumulation x
    groups, and the ranks of a group would have to read the same samples.
    """
    for key in (
        "sequence_parallel_size",
        "tensor_parallel.autotp_size",
        "tensor_parallel.tp.tp_size",
    ):
        size = config.values.get(key)
        if isinstance(size, int) and size > 1:
            yield Problem(
                f"{key}={size} in {config.label}",
                "the ranks of such a group must read the same samples, and this version gives "
                "every rank samples of its own, so the global batch would not be what is written "
                "here",
                "remove it; ZeRO stage 3 partitions a model that does not fit on one rank",
            )


# --- offload -------------------------------------------------------------------------------------


def _offload(config: EffectiveConfig) -> Iterator[Problem]:
    needs = {"offload_optimizer": (1, "ZeRO stage 1, 2 or 3"), "offload_param": (3, "ZeRO stage 3")}
    for name, (least, text) in needs.items():
        device = config.device(name)
        what = f"{ZERO}.{name}.device={device!r} with stage {config.stage}"
        if device != "none" and config.stage < least:
            yield Problem(
                what,
                f"offloading it needs {text}: only there it is partitioned",
                f"set the stage to {least} or more, or {name} to none",
            )
        elif device == "nvme" and config.stage < 3:
            # stage_1_and_2.py __init__: any device but none means host memory.
            yield Problem(
                what,
                "only stage 3 writes it to disk: stages 1 and 2 would keep it in host memory",
                f"set zero_stage to 3, or {name} to cpu",
            )
        if device == "nvme" and config.zero(f"{name}.nvme_path") is None:
            yield Problem(
                f"{ZERO}.{name}.device='nvme' without a path",
                "a folder on a local disk is needed",
                "set nvme_path to an existing folder on every machine",
            )
    # zero/config.py: offload_ratio_check
    if (ratio := config.zero("offload_optimizer.ratio")) < 1 and config.stage != 3:
        yield Problem(
            f"{ZERO}.offload_optimizer.ratio={ratio!r} with stage {config.stage}",
            "only stage 3 keeps a part of the optimizer on the accelerator",
            "set zero_stage to 3, or remove ratio",
        )
    elif ratio < 1 and config.device("offload_optimizer") == "nvme":
        # stage3.py: _optimizer_step; the swapper knows the state of one of the two optimizers.
        yield Problem(
            f"{ZERO}.offload_optimizer.ratio={ratio!r} with device 'nvme'",
            "DeepSpeed writes the state of an optimizer to disk that is there as a whole",
            "remove ratio, or set offload_optimizer to cpu",
        )
    # stage_1_and_2.py __init__: "CPU-Offload requires contiguous gradients"
    if (
        config.stage in (1, 2)
        and config.device("offload_optimizer") != "none"
        and config.zero("contiguous_gradients") is False
    ):
        yield Problem(
            f"{ZERO}.contiguous_gradients=False with an offloaded optimizer at stage "
            f"{config.stage}",
            "gradients go to the host from one buffer, and DeepSpeed would turn it on again",
            "leave contiguous_gradients out",
        )


def _super_offload(config: EffectiveConfig) -> Iterator[Problem]:
    if not config.zero("offload_optimizer.super_offload"):
        return
    # engine.py: _configure_zero_optimizer; superoffload_stage3.py: __init__ and
    # _validate_superoffload_accelerator
    lacking = []
    if config.stage != 3:
        lacking.append(f"stage {config.stage}: it is of stage 3")
    if config.device("offload_optimizer") != "cpu":
        lacking.append(f"the optimizer is on {config.device('offload_optimizer')}, not on cpu")
    if config.facts.device != "cuda":
        lacking.append(f"the device is {config.facts.device}: it is written for CUDA")
    kind = str(config.get("optimizer.type") or "").lower()
    if config.facts.user_optimizer or kind not in ("adam", "adamw"):
        lacking.append("the optimizer is not DeepSpeed's Adam")
    if lacking:
        yield Problem(
            f"{ZERO}.offload_optimizer.super_offload=True",
            "; ".join(lacking),
            "set zero_stage=3, offload_optimizer=cpu and an AdamW, or leave super_offload out",
        )


def _zenflow(config: EffectiveConfig) -> Iterator[Problem]:
    if config.has(f"{ZERO}.zenflow"):
        # zenflow_stage_1_and_2.py: __init__ (one weight decay for all groups), group_step with
        # param.selected_grad (unclipped), sync_fp32_param_from_gpu (masters);
        # zenflow/engine.py: configure_zenflow (accumulation)
        yield Problem(
            f"{config.label} has a section {ZERO}.zenflow",
            "ZenFlow applies gradients without clipping them and with one weight decay for all "
            "parameters, overwrites fp32 master weights by the 16-bit ones, and replaces gradient "
            "accumulation by an interval of its own",
            "remove it; offload_optimizer=cpu works without it",
        )


# --- ZeRO++ --------------------------------------------------------------------------------------


def _hpz(config: EffectiveConfig) -> Iterator[Problem]:
    size, ranks = config.zero("zero_hpz_partition_size"), config.facts.world_size
    if size is None or size <= 1:
        return
    what = f"{ZERO}.zero_hpz_partition_size={size}"
    if config.stage != 3:
        yield Problem(
            f"{what} with stage {config.stage}",
            "it is about gathering parameters, which only stage 3 does",
            "set zero_stage to 3, or leave hpz_partition_size out",
        )
    # groups.py: _create_zero_param_parallel_group takes the smaller, then asserts that it divides.
    if ranks % size:
        yield Problem(
            f"{what} on {ranks} rank(s)",
            f"{ranks} / {size} = {ranks / size:g}: groups of that many ranks must share all ranks "
            "out evenly",
            'set hpz_partition_size to the ranks of a machine, or to 0 ("auto" in the config)',
        )


_QUANTIZED = {
    "zero_quantized_weights": "quantized_weights",
    "zero_quantized_nontrainable_weights": "quantized_nontrainable_weights",
    "zero_quantized_gradients": "quantized_gradients",
}


def _quantized(config: EffectiveConfig) -> Iterator[Problem]:
    for key, argument in _QUANTIZED.items():
        if not config.zero(key):
            continue
        what = f"{ZERO}.{key}=True"
        if config.stage != 3:
            yield Problem(
                f"{what} with stage {config.stage}",
                "only stage 3 has it",
                f"set zero_stage to 3, or leave {argument} out",
            )
        # deepspeed/ops/op_builder/cpu has no quantizer: "This op had not been implemented on CPU".
        if config.facts.device != "cuda":
            yield Problem(
                f"{what} on device {config.facts.device}",
                "its kernels are written for CUDA",
                f"leave {argument} out",
            )
        if config.precision == "fp32":
            yield Problem(
                f"{what} with training in fp32",
                "its kernels take 16-bit values",
                f"set bf16 or fp16, or leave {argument} out",
            )
    # stage3.py: quantize_nontrainable_params -> quantize_dstensor asserts float16.
    if config.zero("zero_quantized_nontrainable_weights") and config.precision == "bf16":
        yield Problem(
            f"{ZERO}.zero_quantized_nontrainable_weights=True with training in bf16",
            "DeepSpeed quantizes frozen weights of fp16 only",
            "set fp16, or leave quantized_nontrainable_weights out",
        )
    # stage3.py __init__: "when enable all_to_all_reduce, reduce_scatter should also be enabled"
    if config.zero("zero_quantized_gradients") and config.zero("reduce_scatter") is False:
        yield Problem(
            f"{ZERO}.zero_quantized_gradients=True with reduce_scatter=False",
            "quantized gradients are scattered while they are reduced",
            "remove reduce_scatter",
        )


# --- activation checkpointing --------------------------------------------------------------------


def _activation_checkpointing(config: EffectiveConfig) -> Iterator[Problem]:
    section = "activation_checkpointing"
    # checkpointing.py: CheckpointFunction.forward divides by mp_size, which is 1 without an mpu.
    for name in ("partition_activations", "contiguous_memory_optimization"):
        if config.get(f"{section}.{name}"):
            yield Problem(
                f"{section}.{name}=True",
                "it divides activations among the ranks that share a layer, and here no two ranks "
                "do: DeepSpeed would ignore it",
                f"remove {name}",
            )
    if config.facts.is_transformers and config.get(f"{section}.cpu_checkpointing"):
        yield Problem(
            f"{section}.cpu_checkpointing=True with a model of transformers",
            "such a model does not call deepspeed.checkpointing.checkpoint, so nothing would read "
            "it",
            "use gradient_checkpointing, or leave cpu_checkpointing out",
        )


def _gradient_norm(config: EffectiveConfig) -> Iterator[Problem]:
    """Check settings for steps without a gradient norm.

    DeepSpeed: zero/config.py, and stage_1_and_2.py: compute_grad_norm.
    """
    if config.zero("compute_grad_norm"):
        return
    clipping, place = config.get("gradient_clipping"), config.device("offload_optimizer")
    against = {
        f"stage {config.stage}": (
            config.stage not in (1, 2),
            "only stages 1 and 2 can leave it out",
        ),
        f"gradient_clipping={clipping:g}": (clipping > 0, "clipping needs the norm"),
        f"the optimizer on {place}": (place != "none", "an offloaded optimizer needs the norm"),
    }
    for what, (excluded, why) in against.items():
        if excluded:
            yield Problem(
                f"{ZERO}.compute_grad_norm=False with {what}",
                why,
                "remove it, or set max_grad_norm to 0" if "clipping" in what else "remove it",
            )


_CHECKS: tuple[Callable[[EffectiveConfig], Iterator[Problem]], ...] = (
    _shared_samples,
    *FORMAT_CHECKS,
    _offload,
    _super_offload,
    _zenflow,
    _hpz,
    _quantized,
    _activation_checkpointing,
    _gradient_norm,
)
