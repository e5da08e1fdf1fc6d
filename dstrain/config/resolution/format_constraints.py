"""Checks of formats of weights, gradients and their reduction that exclude each other.

They hold for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dstrain.config.resolution.effective import EffectiveConfig
from dstrain.config.resolution.rules.precision import short_name
from dstrain.core.errors import Problem


def _formats(config: EffectiveConfig) -> Iterator[Problem]:
    if config.get("bf16.enabled") and config.get("fp16.enabled"):
        yield Problem(
            "bf16.enabled and fp16.enabled are both true",
            "a model trains in one 16-bit format",
            f"turn one of them off (in {config.label} or in the arguments)",
        )
    if config.get("torch_autocast.enabled"):
        yield from _autocast(config)


def _autocast(config: EffectiveConfig) -> Iterator[Problem]:
    what = "torch_autocast.enabled=True"
    if config.precision != "fp32":
        yield Problem(
            f"{what} and {config.precision}.enabled=True",
            "autocast computes in 16 bits with weights that stay in fp32, and "
            f"{config.precision} turns the weights into 16 bits",
            f"turn one of them off (in {config.label} or in the arguments)",
        )
    dtype = short_name(config.get("torch_autocast.dtype"))
    if dtype not in ("bf16", "fp16"):
        yield Problem(
            f"{what} with dtype {config.get('torch_autocast.dtype')!r}",
            "autocast computes in bf16 or fp16",
            "set torch_autocast_dtype",
        )
    # engine.py: _take_model_step unscales inside the step, after the norm is read.
    if dtype == "fp16" and config.stage == 0:
        yield Problem(
            f"{what} with dtype fp16 and stage 0",
            "DeepSpeed scales the loss there in a way that leaves no gradient norm to report",
            "set zero_stage to 1 or more, or torch_autocast_dtype to bf16",
        )
    # stage_1_and_2.py and stage3.py __init__: autocast sets a format for each parameter.
    if config.get("communication_data_type") is not None:
        yield Problem(
            f"communication_data_type={config.get('communication_data_type')!r} and {what}",
            "autocast decides the format for each parameter, and this one would be ignored",
            "leave communication_dtype out",
        )


def _accumulation(config: EffectiveConfig) -> Iterator[Problem]:
    given = config.get("data_types.grad_accum_dtype")
    if given is None:
        return
    dtype, training = short_name(given), config.precision
    what = f"data_types.grad_accum_dtype={given!r}"
    if dtype not in (training, "fp32"):
        yield Problem(
            f"{what} and training in {training}",
            "gradients add up in the format of training or in fp32",
            "set grad_accum_dtype to fp32 or auto",
        )
    elif config.stage == 0 and dtype != training:
        # engine.py: _do_optimizer_sanity_check raises NotImplementedError.
        yield Problem(
            f"{what} with stage 0 and training in {training}",
            "without ZeRO DeepSpeed adds gradients up in the format of training only",
            "set zero_stage to 1 or more, or grad_accum_dtype to auto",
        )


def _masters(config: EffectiveConfig) -> Iterator[Problem]:
    """Check settings for master weights in 16 bits.

    DeepSpeed: base_optimizer.py: _configure_master_weights.
    """
    for training in ("bf16", "fp16"):
        key = f"{training}.{training}_master_weights_and_grads"
        lean = training == "bf16" and config.get("bf16.bf16_optimizer_states")
        if lean and not config.get(key):
            yield Problem(
                "bf16.bf16_optimizer_states=True without bf16.bf16_master_weights_and_grads",
                "optimizer states are in the format of the master weights or in a wider one",
                "set both, or none",
            )
        if not config.get(key):
            continue
        if config.precision != training:
            yield Problem(
                f"{key}=True and training in {config.precision}",
                f"it is about training in {training}",
                f"set {training}, or remove it",
            )
        if config.stage == 0:
            yield Problem(
                f"{key}=True with stage 0", "ZeRO keeps such weights", "set zero_stage to 1, 2 or 3"
            )
        # optimizer_utils.py: SwapTensorContext.release_memory leaves an empty tensor in fp32, which
        # swap_in_optimizer_state then refuses by an assertion.
        if config.device("offload_optimizer") == "nvme":
            yield Problem(
                f"{key}=True and offload_optimizer='nvme'",
                "DeepSpeed swaps master weights in fp32 alone",
                "set offload_optimizer to cpu, or remove it",
            )
            continue
        # stage_1_and_2.py and stage3.py __init__: _enforce_cpu_offload
        offloaded = config.device("offload_optimizer") != "none"
        if (offloaded or not lean) and not (offloaded and _is_cpu_adam(config)):
            yield Problem(
                f"{key}=True",
                "its optimizer states in fp32, or those on the host, are DeepSpeedCPUAdam's alone",
                "set offload_optimizer to cpu with an AdamW, or remove it"
                + ("" if training == "fp16" else ", or without offload set bf16_optimizer_states"),
            )


def _is_cpu_adam(config: EffectiveConfig) -> bool:
    kind = str(config.get("optimizer.type") or "").lower()
    is_torch_adam = bool(config.values.get("optimizer.params.torch_adam"))
    return config.facts.user_optimizer or (kind in ("adam", "adamw") and not is_torch_adam)


def _scaling(config: EffectiveConfig) -> Iterator[Problem]:
    # stage_1_and_2.py and stage3.py __init__: "not yet supported with reduce scatter enabled"
    if config.stage < 2 or not config.get("zero_optimization.reduce_scatter"):
        return
    asked = {
        "prescale_gradients": config.get("prescale_gradients"),
        "gradient_predivide_factor": config.get("gradient_predivide_factor") != 1.0,
    }
    for key, is_asked in asked.items():
        if is_asked:
            yield Problem(
                f"{key}={config.get(key)!r} with stage {config.stage}",
                "where gradients are scattered while they are reduced, DeepSpeed does not scale "
                "them beforehand",
                "remove it, set reduce_scatter to false, or zero_stage to 1",
            )


def coarse_sums(config: EffectiveConfig) -> Iterator[str]:
    """Yield a warning if gradients are added up in bf16 because of the stage."""
    steps = int(config.get("gradient_accumulation_steps") or 1)
    chosen = config.values.get("data_types.grad_accum_dtype") is not None
    if config.precision != "bf16" or steps == 1 or config.stage > 1 or chosen:
        return
    remedy = "grad_accum_dtype=fp32" if config.stage == 1 else "zero_stage=2"
    yield (
        f"gradients of {steps} micro-batches are added up in bf16 at stage {config.stage}, which "
        f"loses their last bits; {remedy} adds them up in fp32, for more memory"
    )


FORMAT_CHECKS: tuple[Callable[[EffectiveConfig], Iterator[Problem]], ...] = (
    _formats,
    _accumulation,
    _masters,
    _scaling,
)
