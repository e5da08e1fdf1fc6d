"""What excludes what in a DeepSpeed config, whoever set it: all of it is reported at once.

Stated for DeepSpeed 0.19.8; where it is not plain, a comment names the file and function that
refuses or, worse, silently ignores the value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config import schema
from dstrain.config.facts import Facts
from dstrain.config.rules.precision import short_name
from dstrain.core.errors import Problem

_ZERO = "zero_optimization"


@dataclass(frozen=True)
class Config:
    """A filled config as the constraints read it.

    Attributes:
        values: leaf values by dotted path.
        facts: world size, device and so on.
        label: where the user's config came from.
    """

    values: Mapping[str, Any]
    facts: Facts
    label: str

    def get(self, path: str) -> Any:
        """The value at a path, DeepSpeed's default where there is none."""
        if path in self.values:
            return self.values[path]
        default = schema.default_of(path)
        return None if default is schema.NO_DEFAULT else default

    def zero(self, name: str) -> Any:
        """The value of a key of ``zero_optimization``."""
        return self.get(f"{_ZERO}.{name}")

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return int(self.zero("stage"))

    @property
    def precision(self) -> str:
        """Format of weights: "bf16", "fp16" or "fp32"."""
        return next((name for name in ("bf16", "fp16") if self.get(f"{name}.enabled")), "fp32")

    def device(self, name: str) -> str:
        """Where ``offload_optimizer`` or ``offload_param`` puts things."""
        return str(self.zero(f"{name}.device") or "none")

    def has(self, section: str) -> bool:
        """Whether anything is set in a section."""
        return any(path == section or path.startswith(f"{section}.") for path in self.values)


def find_problems(config: Config) -> list[Problem]:
    """Every pair of keys that exclude each other, and every key that nothing would act on."""
    return [problem for check in _CHECKS for problem in check(config)]


def find_warnings(config: Config, by_argument: frozenset[str]) -> tuple[list[Problem], list[str]]:
    """Keys that only tune, at a stage that does not read them.

    A problem where an argument set them. A config that was written for another stage keeps such
    keys, so there they are a warning.
    """
    problems, warnings = [], []
    for name, (stages, argument) in _TUNING.items():
        key = f"{_ZERO}.{name}"
        if config.stage in stages or not config.has(key):
            continue
        known = " and ".join(str(stage) for stage in stages)
        if any(path == key or path.startswith(f"{key}.") for path in by_argument):
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


# --- formats -------------------------------------------------------------------------------------


def _shared_samples(config: Config) -> Iterator[Problem]:
    """Parallelism in which several ranks work on the same samples.

    The batch would be micro-batch x accumulation x groups, and each group would have to read the
    same samples; every rank reads samples of its own here.
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


def _formats(config: Config) -> Iterator[Problem]:
    if config.get("bf16.enabled") and config.get("fp16.enabled"):
        yield Problem(
            "bf16.enabled and fp16.enabled are both true",
            "a model trains in one 16-bit format",
            f"turn one of them off (in {config.label} or in the arguments)",
        )
    if config.get("torch_autocast.enabled"):
        yield from _autocast(config)


def _autocast(config: Config) -> Iterator[Problem]:
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
    # engine.py: _take_model_step unscales inside the step, after the norm was to be read.
    if dtype == "fp16" and config.stage == 0:
        yield Problem(
            f"{what} with dtype fp16 and stage 0",
            "DeepSpeed scales the loss there in a way that leaves no gradient norm to report",
            "set zero_stage to 1 or more, or torch_autocast_dtype to bf16",
        )
    # stage_1_and_2.py and stage3.py __init__: each parameter then has a format of its own.
    if config.get("communication_data_type") is not None:
        yield Problem(
            f"communication_data_type={config.get('communication_data_type')!r} and {what}",
            "autocast decides the format for each parameter, and this one would be ignored",
            "leave communication_dtype out",
        )


def _accumulation(config: Config) -> Iterator[Problem]:
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


# --- offload -------------------------------------------------------------------------------------


def _offload(config: Config) -> Iterator[Problem]:
    needs = {"offload_optimizer": (1, "ZeRO stage 1, 2 or 3"), "offload_param": (3, "ZeRO stage 3")}
    for name, (least, text) in needs.items():
        device = config.device(name)
        what = f"{_ZERO}.{name}.device={device!r} with stage {config.stage}"
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
                f"{_ZERO}.{name}.device='nvme' without a path",
                "a folder on a local disk is needed",
                "set nvme_path to an existing folder on every machine",
            )
    # stage_1_and_2.py __init__: "CPU-Offload requires contiguous gradients"
    if (
        config.stage in (1, 2)
        and config.device("offload_optimizer") != "none"
        and config.zero("contiguous_gradients") is False
    ):
        yield Problem(
            f"{_ZERO}.contiguous_gradients=False with an offloaded optimizer at stage "
            f"{config.stage}",
            "gradients go to the host from one buffer, and DeepSpeed would turn it on again",
            "leave contiguous_gradients out",
        )


def _super_offload(config: Config) -> Iterator[Problem]:
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
    if config.facts.own_optimizer or kind not in ("adam", "adamw"):
        lacking.append("the optimizer is not DeepSpeed's Adam")
    if lacking:
        yield Problem(
            f"{_ZERO}.offload_optimizer.super_offload=True",
            "; ".join(lacking),
            "set zero_stage=3, offload_optimizer=cpu and an AdamW, or leave super_offload out",
        )


def _zenflow(config: Config) -> Iterator[Problem]:
    if config.has(f"{_ZERO}.zenflow"):
        # zenflow_stage_1_and_2.py: __init__ (one weight decay for all groups), group_step with
        # param.selected_grad (unclipped), sync_fp32_param_from_gpu (masters);
        # zenflow/engine.py: configure_zenflow (accumulation)
        yield Problem(
            f"{config.label} has a section {_ZERO}.zenflow",
            "ZenFlow applies gradients without clipping them and with one weight decay for all "
            "parameters, overwrites fp32 master weights by the 16-bit ones, and replaces gradient "
            "accumulation by an interval of its own",
            "remove it; offload_optimizer=cpu works without it",
        )


# --- ZeRO++ --------------------------------------------------------------------------------------


def _hpz(config: Config) -> Iterator[Problem]:
    size, ranks = config.zero("zero_hpz_partition_size"), config.facts.world_size
    if size is None or size <= 1:
        return
    what = f"{_ZERO}.zero_hpz_partition_size={size}"
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


def _quantized(config: Config) -> Iterator[Problem]:
    for key, argument in _QUANTIZED.items():
        if not config.zero(key):
            continue
        what = f"{_ZERO}.{key}=True"
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
            f"{_ZERO}.zero_quantized_nontrainable_weights=True with training in bf16",
            "DeepSpeed quantizes frozen weights of fp16 only",
            "set fp16, or leave quantized_nontrainable_weights out",
        )
    # stage3.py __init__: "when enable all_to_all_reduce, reduce_scatter should also be enabled"
    if config.zero("zero_quantized_gradients") and config.zero("reduce_scatter") is False:
        yield Problem(
            f"{_ZERO}.zero_quantized_gradients=True with reduce_scatter=False",
            "quantized gradients are scattered while they are reduced",
            "remove reduce_scatter",
        )


# --- activation checkpointing --------------------------------------------------------------------


def _activation_checkpointing(config: Config) -> Iterator[Problem]:
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


_CHECKS: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _shared_samples,
    _formats,
    _accumulation,
    _offload,
    _super_offload,
    _zenflow,
    _hpz,
    _quantized,
    _activation_checkpointing,
)
