"""Every key of a DeepSpeed 0.19.8 config: section, type, range, default. Data only, no functions.

Written from the installed source and held to it by ``tests/unit/test_schema.py``. A range or choice
stands here where DeepSpeed itself refuses, or silently misreads, what lies outside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal

DEEPSPEED_VERSION: Final = "0.19.8"


class _NoDefault(Enum):
    NO_DEFAULT = "no default"

    def __repr__(self) -> str:
        return self.name


NO_DEFAULT: Final = _NoDefault.NO_DEFAULT
NONE: Final = type(None)


@dataclass(frozen=True)
class Refused:
    """A key or value that DeepSpeed no longer has: why, and what to do instead."""

    reason: str
    instead: str


@dataclass(frozen=True)
class Key:
    """A key with a value.

    Attributes:
        types: accepted types; ``object`` stands for a Python object that JSON cannot hold.
        default: what DeepSpeed takes when the key is missing.
        choices: the only accepted values, if any; ``any_case`` holds those for which letter case
            does not matter.
        minimum: smallest accepted number; ``above`` excludes the limit itself.
        maximum: largest accepted number; ``below`` excludes the limit itself.
        items: what each element of a list is.
        auto_is_value: "auto" has a meaning of its own to DeepSpeed and is not a placeholder.
        infinite: infinity is accepted ("never").
        refused: choices that DeepSpeed removed, in lower case.
    """

    types: tuple[type, ...]
    default: Any = NO_DEFAULT
    choices: tuple[str | int, ...] = ()
    any_case: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    items: Key | Section | None = None
    auto_is_value: bool = False
    infinite: bool = False
    refused: Mapping[str, Refused] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A block of keys.

    Attributes:
        keys: the known keys.
        open: other keys are accepted too, unchecked.
        each: every key is a name of the user's and its value is this block.
        by_type: keys that depend on the neighbouring key "type", by its lower-case value; ``keys``
            and ``open`` hold for the types that are not listed.
        nullable: null stands for the missing block.
        also: other types that the value may have.
        written_out: old boolean spellings of the block and what they stand for.
    """

    keys: Mapping[str, Key | Section | Alias | Refused] = field(default_factory=dict)
    open: bool = False
    each: Section | None = None
    by_type: Mapping[str, Section] = field(default_factory=dict)
    nullable: bool = False
    also: tuple[type, ...] = ()
    written_out: Mapping[bool, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Alias:
    """Another spelling of a key.

    Attributes:
        to: dotted path of the key that it stands for.
        why: "old" for a deprecated spelling, "internal" for DeepSpeed's attribute name.
        key: what its value must be, where that differs from the key that it stands for.
        written_out: what each value stands for in the new spelling; None leaves the key out.
    """

    to: str
    why: Literal["old", "internal"] = "old"
    key: Key | None = None
    written_out: Mapping[Any, Any] | None = None


Entry = Key | Section | Alias | Refused


def _key(kind: type, default: Any, **more: Any) -> Key:
    """Return a key of one type that may be null when null is its default."""
    return Key((kind, NONE) if default is None else (kind,), default, **more)


def _flag(default: Any = False) -> Key:
    return _key(bool, default)


def _int(default: Any = NO_DEFAULT, minimum: float | None = None, **more: Any) -> Key:
    return _key(int, default, minimum=minimum, **more)


def _float(default: Any = NO_DEFAULT, minimum: float | None = None, **more: Any) -> Key:
    return _key(float, default, minimum=minimum, **more)


def _text(default: Any = NO_DEFAULT, *choices: str, **more: Any) -> Key:
    return _key(str, default, choices=choices, **more)


def _list(default: Any, items: Key | Section | None = None, **more: Any) -> Key:
    return _key(list, default, items=items, **more)


_TEXT = _text()
_SHARE: Mapping[str, Any] = {"minimum": 0.0, "maximum": 1.0}
_LISTED_TEXTS: Mapping[str, Any] = {"items": _TEXT}
_DTYPE_NAMES = (
    "fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16",
    "fp32", "float32", "float", "torch.float32", "int8", "torch.int8",
)  # fmt: skip
_DTYPE = _text(None, *_DTYPE_NAMES)
_REDUCTION_DTYPES = ("fp16", "bf16", "fp32")

# --- optimizers and schedulers -------------------------------------------------------------------

_MAX_GRAD_NORM = Refused(
    "DeepSpeed does not clip through an optimizer parameter", "set gradient_clipping"
)
_BETAS = _list([0.9, 0.999], _float(minimum=0.0, below=1.0))
_TORCH = {
    "foreach": _flag(None), "fused": _flag(None), "maximize": _flag(), "differentiable": _flag(),
}  # fmt: skip
_STATES = {"fp32_optimizer_states": _flag(True)}  # offloaded to the CPU


def _optimizer(lr: Any, **keys: Key) -> Section:
    rates = {"lr": _float(lr, 0.0), "weight_decay": _float(0.0, 0.0)}
    return Section({**rates, **keys, "max_grad_norm": _MAX_GRAD_NORM})


_ADAM_KEYS = {
    "betas": _BETAS, "eps": _float(1e-8, 0.0), "bias_correction": _flag(True), "amsgrad": _flag(),
    "set_grad_none": _flag(True), "adam_w_mode": _flag(True), "torch_adam": _flag(),
    "capturable": _flag(), **_TORCH, **_STATES,
}  # fmt: skip
OPTIMIZER_PARAMS: Final[Mapping[str, Section]] = {
    # torch's Adam alone takes decoupled_weight_decay.
    "adam": _optimizer(1e-3, decoupled_weight_decay=_flag(), **_ADAM_KEYS),
    "adamw": _optimizer(1e-3, **_ADAM_KEYS),
    "adagrad": _optimizer(
        1e-2, eps=_float(1e-10, 0.0), amsgrad=_flag(), lr_decay=_float(0.0, 0.0),
        initial_accumulator_value=_float(0.0, 0.0), **_TORCH, **_STATES,
    ),
    "lamb": _optimizer(
        1e-3, betas=_BETAS, eps=_float(1e-8, 0.0), bias_correction=_flag(True), amsgrad=_flag(),
        eps_inside_sqrt=_flag(), max_coeff=_float(10.0), min_coeff=_float(0.01),
    ),
    "lion": _optimizer(1e-3, betas=_BETAS, set_grad_none=_flag(True), **_STATES),
    # lr is for both halves and has a default in each: 0.02 (Muon) and 3e-4 (Adam).
    "muon": _optimizer(
        NO_DEFAULT, momentum=_float(0.95), ns_method=_text("gram", "gram", "standard"),
        muon_lr=_float(NO_DEFAULT, 0.0), adam_lr=_float(NO_DEFAULT, 0.0),
        betas=_list([0.9, 0.95], _float(minimum=0.0, below=1.0)), eps=_float(1e-10, 0.0),
        adam_w_mode=_flag(True), torch_adam=_flag(), foreach=_flag(None), **_STATES,
    ),
    "sgd": _optimizer(
        1e-3, momentum=_float(0.0, 0.0), dampening=_float(0.0), nesterov=_flag(), **_TORCH
    ),
}  # fmt: skip

DEEPSPEED_OPTIMIZERS: Final = (
    "Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD",
)  # fmt: skip
TORCH_OPTIMIZERS: Final = (
    "ASGD", "Adadelta", "Adafactor", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    "SparseAdam",
)  # fmt: skip
_ONE_BIT = Refused(
    f"DeepSpeed {DEEPSPEED_VERSION} removed the 1-bit optimizers", "use AdamW or Lamb"
)

_RATE = Key((float, list), minimum=0.0, items=_float(minimum=0.0))  # a list: one per group


def _rate(default: Any) -> Key:
    kinds = (float, list, NONE) if default is None else (float, list)
    return Key(kinds, default, minimum=0.0, items=_RATE.items)


_WARMUP = {
    "warmup_num_steps": _int(1000, 1), "warmup_type": _text("log", "log", "linear"),
    "last_batch_iteration": _int(-1, -1),
}  # fmt: skip
SCHEDULER_PARAMS: Final[Mapping[str, Section]] = {
    "lrrangetest": Section({
        "lr_range_test_min_lr": _rate(1e-3), "lr_range_test_step_size": _int(2000, 1),
        "lr_range_test_step_rate": _float(1.0), "lr_range_test_staircase": _flag(),
        "last_batch_iteration": _int(-1, -1),
    }),
    "onecycle": Section({
        "cycle_min_lr": _RATE, "cycle_max_lr": _RATE, "decay_lr_rate": _float(0.0),
        "cycle_first_step_size": _float(2000, above=0.0),
        "cycle_second_step_size": _float(None, 0.0),
        "cycle_first_stair_count": _int(0, 0), "cycle_second_stair_count": _int(None, 0),
        "decay_step_size": _float(0, 0.0), "cycle_momentum": _flag(True),
        "cycle_min_mom": _rate(0.8), "cycle_max_mom": _rate(0.9), "decay_mom_rate": _float(0.0),
        "last_batch_iteration": _int(-1, -1),
    }),
    "warmuplr": Section({
        "warmup_min_lr": _rate(0.0), "warmup_max_lr": _rate(None), **_WARMUP,
    }),
    "warmupdecaylr": Section({
        "total_num_steps": _int(NO_DEFAULT, 1), "warmup_min_lr": _rate(0.0),
        "warmup_max_lr": _rate(0.001), **_WARMUP,
    }),
    "warmupcosinelr": Section({
        "total_num_steps": _int(NO_DEFAULT, 1), "warmup_min_ratio": _float(0.0, 0.0),
        "cos_min_ratio": _float(0.0001, 0.0), **_WARMUP,
    }),
}  # fmt: skip
DEEPSPEED_SCHEDULERS: Final = (
    "LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR",
)  # fmt: skip
TORCH_SCHEDULERS: Final = (
    "ChainedScheduler", "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts",
    "CyclicLR", "ExponentialLR", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR",
    "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "SequentialLR", "StepLR",
)  # fmt: skip

_OPTIMIZER = Section({
    "type": _text(
        None, *TORCH_OPTIMIZERS, any_case=DEEPSPEED_OPTIMIZERS,
        refused=dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), _ONE_BIT),
    ),
    "params": Section(
        {"max_grad_norm": _MAX_GRAD_NORM}, open=True, by_type=OPTIMIZER_PARAMS, nullable=True
    ),
    "legacy_fusion": _flag(),
})  # fmt: skip
_SCHEDULER = Section({
    "type": _text(None, *DEEPSPEED_SCHEDULERS, *TORCH_SCHEDULERS),
    "params": Section(open=True, by_type=SCHEDULER_PARAMS),
})  # fmt: skip

# --- zero_optimization ---------------------------------------------------------------------------

_ZERO = "zero_optimization"
_MICS = Refused(
    f"DeepSpeed {DEEPSPEED_VERSION} removed MiCS",
    "use zero_hpz_partition_size (ZeRO++) to gather weights inside a node",
)
_DEVICE = _text("none", "none", "cpu", "nvme")
_OFFLOAD = {
    "device": _DEVICE, "nvme_path": Key((str, os.PathLike, NONE), None), "pin_memory": _flag(True),
}  # fmt: skip
_OFFLOAD_PARAM = Section({
    **_OFFLOAD, "buffer_count": _int(5, 0), "buffer_size": _int(100_000_000, 0),
    "max_in_cpu": _int(1_000_000_000, 0),
}, nullable=True)  # fmt: skip
_OFFLOAD_OPTIMIZER = Section({
    **_OFFLOAD, "buffer_count": _int(4, 0), "pipeline_read": _flag(), "pipeline_write": _flag(),
    "fast_init": _flag(), "ratio": _float(1.0, **_SHARE), "super_offload": _flag(),
    "cpuadam_cores_perc": _float(0.8, **_SHARE),
}, nullable=True)  # fmt: skip
_ZENFLOW = Section({
    "topk_ratio": _float(0.1, above=0.0, below=1.0),
    "select_strategy": _text("auto", "step", "epoch", auto_is_value=True),
    "select_interval": _int("auto", auto_is_value=True),
    "update_interval": _int("auto", 1, auto_is_value=True),
    "overlap_step": _flag(), "offload": _flag(), "auto_ratio": _float(0.99, **_SHARE),
    "full_warm_up_rounds": _int(0), "pt_reserved_cores_perc": _float(0.5, **_SHARE),
    "steps_per_epoch": Refused("DeepSpeed sets it while it runs", "remove it"),
}, nullable=True)  # fmt: skip


def _names(default: list[str]) -> Key:
    return Key((list, str), default, items=_TEXT)


_LEAF_MODULE = Section({
    "classes": _names([
        "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
        "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
    ]),
    "names": _names([]), "name_suffixes": _names([]),
}, nullable=True)  # fmt: skip
# Read by stage 3, where DeepSpeed's attribute has no "stage3_" and is accepted as a key as well.
_STAGE3 = {
    "prefetch_bucket_size": _int(50_000_000, 0), "param_persistence_threshold": _int(100_000, 0),
    "model_persistence_threshold": _int(sys.maxsize, 0),
    "max_live_parameters": _int(1_000_000_000, 0), "max_reuse_distance": _int(1_000_000_000, 0),
    "gather_16bit_weights_on_model_save": _flag(), "module_granularity_threshold": _int(0),
    "use_all_reduce_for_fetch_params": _flag(), "allgather_sequential": _flag(),
}  # fmt: skip
_ON_CPU = {True: {"device": "cpu"}, False: None, None: None, "auto": None}
_ZERO_OPTIMIZATION = Section({
    "stage": _int(0, choices=(0, 1, 2, 3)), "contiguous_gradients": _flag(True),
    "reduce_scatter": _flag(True), "reduce_bucket_size": _int(500_000_000, above=0),
    "use_multi_rank_bucket_allreduce": _flag(True), "allgather_partitions": _flag(True),
    "allgather_bucket_size": _int(500_000_000, 0), "overlap_comm": _flag(None),
    "compute_grad_norm": _flag(True), "load_from_fp32_weights": _flag(True),
    "elastic_checkpoint": _flag(), "offload_param": _OFFLOAD_PARAM,
    "offload_optimizer": _OFFLOAD_OPTIMIZER, "zenflow": _ZENFLOW,
    "sub_group_size": _int(1_000_000_000, 0), "ignore_unused_parameters": _flag(True),
    "legacy_stage1": _flag(), "round_robin_gradients": _flag(), "parameter_alignment": _flag(),
    "zero_hpz_partition_size": _int(1, 0), "zero_quantized_weights": _flag(),
    "zero_quantized_nontrainable_weights": _flag(), "zero_quantized_gradients": _flag(),
    "memory_efficient_linear": _flag(True), "pipeline_loading_checkpoint": _flag(),
    "override_module_apply": _flag(True), "log_trace_cache_warnings": _flag(),
    "enable_sanity_checks": _flag(), "save_muon_momentum_buffer_in_memory": _flag(),
    "leaf_module": _LEAF_MODULE,
    **{f"stage3_{name}": key for name, key in _STAGE3.items()},
    **{name: Alias(f"{_ZERO}.stage3_{name}", "internal") for name in _STAGE3},
    "stage3_gather_fp16_weights_on_model_save": Alias(
        f"{_ZERO}.stage3_gather_16bit_weights_on_model_save"
    ),
    "cpu_offload": Alias(f"{_ZERO}.offload_optimizer", key=_flag(None), written_out=_ON_CPU),
    "cpu_offload_param": Alias(f"{_ZERO}.offload_param", key=_flag(None), written_out=_ON_CPU),
    "cpu_offload_use_pin_memory": Refused(
        f"DeepSpeed {DEEPSPEED_VERSION} accepts it and reads it nowhere",
        "set pin_memory inside offload_optimizer and offload_param",
    ),
    "mics_shard_size": _MICS, "mics_hierarchical_params_gather": _MICS,
    "zeropp_loco_param": Refused(
        f"DeepSpeed {DEEPSPEED_VERSION} removed LoCo",
        "keep zero_quantized_gradients without it, which has no error feedback",
    ),
}, written_out={True: {"stage": 1}, False: {"stage": 0}})  # fmt: skip

# --- precision, checkpoints, parallelism ---------------------------------------------------------

_FP16 = Section({
    "enabled": _flag(), "auto_cast": _flag(), "loss_scale": _float(0.0, 0.0),
    "initial_scale_power": _int(16), "loss_scale_window": _int(1000), "hysteresis": _int(2),
    "consecutive_hysteresis": _flag(), "min_loss_scale": _int(1),
    "fp16_master_weights_and_grads": _flag(),
})  # fmt: skip
_BF16 = Section({
    "enabled": _flag(), "immediate_grad_update": _flag(), "check_grad_overflow": _flag(True),
    "bf16_master_weights_and_grads": _flag(), "bf16_optimizer_states": _flag(),
}, nullable=True)  # fmt: skip
_CHECKPOINT = Section({
    "tag_validation": _text("WARN", any_case=("Warn", "Ignore", "Fail")),
    "load_universal": _flag(), "use_node_local_storage": _flag(),
    "parallel_write": Section({"pipeline_stage": _flag()}),
    "checkpoint_serialization": _flag(True),
    "writer": Section({
        "type": _text("FAST", any_case=("fast", "python", "mock")), "decoupled": _flag(),
        "io_buffer_size": _int(64 * 1024**2, 1), "io_buffer_double": _flag(True),
        "io_multiplier": _int(1, 1), "show_statistics": _flag(),
        "data_parallel": _text(None, any_case=("replica", "socket", "machine")),
    }, nullable=True),
})  # fmt: skip
_TP_SPEC = Section({
    "patterns": _list([], **_LISTED_TEXTS), "model_types": _list(None, **_LISTED_TEXTS),
    "partition_type": _text("column", any_case=("column", "row", "skip")),
    "gather_output": _flag(), "grad_allreduce": _flag(), "shape": _list(None),
    "partition_dim": _int(None),
})  # fmt: skip
_TENSOR_PARALLEL = Section({
    "dtype": Key((object,)), "autotp_size": _int(0, 0), "tp_overlap_comm": _flag(),
    "vocab_parallel_lm_head": _flag(None),
    "vocab_parallel_ce_backend": _text("torch", "torch", "liger"),
    "tp": Section({
        "tp_size": _int(1, 1), "tp_grain_size": _int(1, 1), "mpu": Key((object, NONE), None),
        "tp_group": Key((object, NONE), None),
    }),
    "tensor_parallel": Alias("tensor_parallel.tp", "internal"),
    "injection_policy_tuple": _list(None), "keep_module_on_host": _flag(),
    "kernel_inject": _flag(),
    "replace_with_kernel_inject": Alias("tensor_parallel.kernel_inject", "internal"),
    # A preset of another name is silently none at all.
    "preset_model": _text(
        None,
        any_case=("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"),
    ),
    "partition_config": Section({
        "tp_size": _int(1, 1), "layer_specs": _list([], _TP_SPEC),
        "embedding_partition_dim": _int(1), "use_default_specs": _flag(True),
        "lm_head_patterns": _list(["lm_head", "embed_out"], **_LISTED_TEXTS),
        "strict_mode": _flag(),
    }, nullable=True),
})  # fmt: skip
_EXPERT_PARALLEL = Section({
    "enabled": _flag(), "autoep_size": _int(1, 1), "expert_tensor_parallel_size": _int(1, 1),
    "validate_folding_routing": _flag(), "async_split_plan": _flag(),
    "preset_model": _text(
        None, "mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "minimax_m3"
    ),
    "moe_layer_pattern": _text(None), "expert_pattern": _text(None), "router_pattern": _text(None),
    "use_grouped_mm": _flag(True), "disable_triton_grouped_mm": _flag(), "route_norm": _flag(None),
    "route_scale": _float(1.0), "score_apply": _text("auto", "pre", "post", auto_is_value=True),
    "combine_impl": _text(
        "auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm", auto_is_value=True
    ),
    "row_weighting_impl": _text("auto", "eager", "fused", auto_is_value=True),
    "gate_up_impl": _text("separate", "separate", "fused"),
    "comm_backend": _text("comm", "comm", "deepep"), "comm_num_sm": _int(12, 1),
    "comm_qp_margin": _int(4, 0), "comm_max_tokens_per_rank": _int(0, 0),
    "num_expert_groups": _int(None, 1), "num_limited_groups": _int(None, 1),
    "score_func": _text("auto", "softmax", "sigmoid", auto_is_value=True),
    "top_k": _int("auto", auto_is_value=True), "load_balance_coeff": Key((NONE,), None),
    "routed_scaling_factor": _float("auto", auto_is_value=True),
    "expert_w1": _text(None), "expert_w2": _text(None), "expert_w3": Key((str, NONE)),
    "num_experts_attr": _text(None), "top_k_attr": _text(None), "has_shared_experts": _flag(None),
    "shared_experts_pattern": _text(None), "shared_experts_gate_pattern": _text(None),
    "expert_activation": _text(None),
}, nullable=True)  # fmt: skip
_COMPILE = Section({
    **{name: _flag() for name in (
        "deepcompile", "autoep_non_moe", "free_activation", "offload_activation",
        "offload_opt_states", "symmetric_memory", "debug_log", "offload_parameters",
        "sync_before_reduce", "sync_after_reduce", "sync_before_allgather", "sync_after_allgather",
        "keep_all_input_tensors",
    )},
    **{name: _flag(True) for name in (
        "offload_activation_pin_memory", "double_buffer", "keep_int_input_tensors",
    )},
    "free_activation_threshold": _int(10 * 1024**2),
    "passes": _list(None, _text(NO_DEFAULT, "z1", "z3", "autosp", "autotp")),
})  # fmt: skip

# --- data efficiency, autotuning, monitors -------------------------------------------------------

_NUMBERS = _list(NO_DEFAULT, _float())
_CURRICULUM_METRIC = Section({
    "index_to_sample_path": _TEXT, "index_to_metric_path": _TEXT, "clustering_type": _TEXT,
    "difficulty_type": _text(NO_DEFAULT, "value", "percentile"),
    "min_difficulty": _float(), "max_difficulty": _float(),
    "schedule_type": _text(
        NO_DEFAULT, "fixed_discrete", "fixed_root", "fixed_linear", "custom"
    ),
    "schedule_config": Section({
        "difficulty": _NUMBERS, "max_step": _NUMBERS, "total_curriculum_step": _int(NO_DEFAULT, 1),
        "difficulty_step": _int(NO_DEFAULT, 1), "root_degree": _float(above=0.0),
    }),
})  # fmt: skip
_RANDOM_LTD = Section({
    "enabled": _flag(), "total_layer_num": _int(), "random_ltd_layer_num": _int(),
    "random_ltd_layer_id": _list(NO_DEFAULT, _int()), "model_mask_name": Key((str, NONE)),
    "model_type": _text(NO_DEFAULT, "encoder", "decoder"),
    "hidden_state_order": _text(NO_DEFAULT, "batch_seq_dim", "seq_batch_dim"),
    "micro_batch_size": _int(NO_DEFAULT, 1), "global_batch_size": _int(NO_DEFAULT, 1),
    "random_ltd_schedule": Section({
        "min_value": _int(), "max_value": _int(),
        "schedule_type": _text(NO_DEFAULT, "fixed_linear"),
        "schedule_config": Section({
            "require_steps": _int(NO_DEFAULT, 1), "seq_per_step": _int(NO_DEFAULT, 1),
        }),
    }),
    "layer_token_lr_schedule": Section({
        "enabled": _flag(), "total_layer_tokens": _int(), "warmup_type": _TEXT,
        "warmup_layer_tokens": _int(),
    }),
})  # fmt: skip
_DATA_EFFICIENCY = Section({
    "enabled": _flag(), "seed": _int(1234),
    "data_sampling": Section({
        "enabled": _flag(), "num_epochs": _int(1000, 1), "num_workers": _int(0, 0),
        "pin_memory": _flag(),
        "curriculum_learning": Section({
            "enabled": _flag(), "data_cluster_path": _TEXT,
            "curriculum_metrics": Section(each=_CURRICULUM_METRIC),
        }),
        "dynamic_batching": Section({
            "enabled": _flag(), "metrics_path": _TEXT, "max_tokens": _int(NO_DEFAULT, 1),
            "lr_scaling_method": _text("linear", "linear", "sqrt", "none"),
            "min_batch_size": _int(1, 1), "max_batch_size": Key((int,), None, minimum=1),
            "sequence_picking_order": _text("dataloader", "random", "seqlen", "dataloader"),
            "verbose": _flag(),
        }),
    }),
    "data_routing": Section({"enabled": _flag(), "random_ltd": _RANDOM_LTD}),
})  # fmt: skip
_AUTOTUNING = Section({
    "enabled": _flag(), "fast": _flag(True), "overwrite": _flag(True),
    "results_dir": _text("autotuning_results"), "exps_dir": _text("autotuning_exps"),
    "start_profile_step": _int(3), "end_profile_step": _int(5), "metric_path": _text(None),
    "metric": _text("throughput", "latency", "throughput", "flops", "forward", "step"),
    "tuner_type": _text("gridsearch", "gridsearch", "random", "model_based"),
    "tuner_early_stopping": _int(5), "tuner_num_trials": _int(50), "mp_size": _int(1, 1),
    "arg_mappings": Section(open=True, nullable=True), "model_info_path": _text(None),
    "model_info": Section({
        "profile": _flag(), "num_params": _int(None), "hidden_size": _int(None),
        "num_layers": _int(None),
    }, nullable=True),
    "max_train_batch_size": _int(None, 1), "min_train_batch_size": _int(1, 1),
    "max_train_micro_batch_size_per_gpu": _int(1024, 1),
    "min_train_micro_batch_size_per_gpu": _int(1, 1), "num_tuning_micro_batch_sizes": _int(3, 1),
})  # fmt: skip
_FILES = Section({
    "enabled": _flag(), "output_path": _text(""), "job_name": _text("DeepSpeedJobName"),
})  # fmt: skip
_COMET = Section({
    "enabled": _flag(), "samples_log_interval": _int(100, 1), "online": _flag(None),
    **{name: _text(None) for name in (
        "project", "workspace", "api_key", "experiment_name", "experiment_key", "mode",
    )},
})  # fmt: skip


def _removed(what: str, instead: str) -> Refused:
    return Refused(f"DeepSpeed {DEEPSPEED_VERSION} removed {what}", instead)


_REMOVED = {
    "nebula": _removed(
        "Nebula checkpointing", "remove the block; checkpoint.writer chooses how files are written"
    ),
    "compression_training": _removed(
        "the compression library", "quantize or prune the trained model with another tool"
    ),
    "amp": _removed("NVIDIA Apex AMP", "use bf16, fp16 or torch_autocast"),
    "quantize_training": _removed("Mixture-of-Quantization", "remove the block"),
    "sparse_gradients": _removed(
        "the flag",
        "remove it, and build embeddings without sparse=True",
    ),
    "eigenvalue": _removed("eigenvalue-based quantization", "remove the block"),
    "sparse_attention": _removed(
        "Sparse Attention", "choose the attention implementation in the model"
    ),
    "elasticity": _removed(
        "elastic training",
        "set train_batch_size, train_micro_batch_size_per_gpu or gradient_accumulation_steps",
    ),
    "graph_harvesting": _removed("graph harvesting", "remove it"),
    "curriculum_learning": _removed(
        "the block at this place", "use data_efficiency.data_sampling.curriculum_learning"
    ),
    "progressive_layer_drop": _removed("Progressive Layer Dropping", "remove the block"),
}

# --- the config ----------------------------------------------------------------------------------

CONFIG: Final = Section({
    "train_batch_size": _int(None, 1), "train_micro_batch_size_per_gpu": _int(None, 1),
    "gradient_accumulation_steps": _int(None, 1), "managed_gradient_accumulation": _flag(True),
    "gradient_clipping": _float(1.0, 0.0), "prescale_gradients": _flag(),
    "gradient_predivide_factor": _float(1.0, above=0.0),
    "gradient_allreduce_op": _text("mean", any_case=("mean", "sum")),
    "communication_data_type": _text(None, any_case=_REDUCTION_DTYPES),
    "seq_parallel_communication_data_type": Key(
        (str, NONE), "fp32", any_case=_REDUCTION_DTYPES
    ),
    "sequence_parallel_size": _int(NO_DEFAULT, 1), "data_parallel_size": _int(NO_DEFAULT, 1),
    "use_data_before_expert_parallelism": _flag(), "disable_allgather": _flag(),
    "zero_allow_untested_optimizer": _flag(), "zero_force_ds_cpu_optimizer": _flag(True),
    "steps_per_print": _int(None, 1, infinite=True), "wall_clock_breakdown": _flag(),
    "memory_breakdown": _flag(), "dump_state": _flag(), "disable_python_gc": _flag(),
    "dataloader_drop_last": _flag(), "vocabulary_size": _int(None, 0),
    "log_level": _text(None, any_case=("debug", "info", "warning", "error", "critical")),
    "optimizer": _OPTIMIZER, "scheduler": _SCHEDULER,
    "zero_optimization": _ZERO_OPTIMIZATION,
    "allgather_size": Alias("zero_optimization.allgather_bucket_size"),
    "fp16": _FP16, "bf16": _BF16, "bfloat16": Alias("bf16"),
    # Left out, the last two are null; written as null, DeepSpeed stops.
    "torch_autocast": Section({
        "enabled": _flag(), "dtype": Key((str,), None, choices=_DTYPE_NAMES),
        "lower_precision_safe_modules": Key((list,), None, **_LISTED_TEXTS),
    }),
    "data_types": Section({
        "grad_accum_dtype": _DTYPE, "param_dtype": _DTYPE, "buffer_dtype": _DTYPE,
        "keep_in_fp32_modules": _list("auto", **_LISTED_TEXTS, auto_is_value=True),
    }),
    "activation_checkpointing": Section({
        "partition_activations": _flag(), "number_checkpoints": _int(None, 1),
        "contiguous_memory_optimization": _flag(), "cpu_checkpointing": _flag(),
        "profile": _flag(), "synchronize_checkpoint_boundary": _flag(),
    }),
    "aio": Section({
        "block_size": _int(1048576, 1), "queue_depth": _int(8, 1),
        "intra_op_parallelism": _int(1, 1), "single_submit": _flag(),
        "overlap_events": _flag(True), "use_gds": _flag(),
    }, nullable=True),
    "checkpoint": _CHECKPOINT,
    # Any value but false, null too, asks for DataStates' engine, which reads the block itself.
    "datastates_ckpt": Section(open=True, also=(bool,)),
    "tensor_parallel": _TENSOR_PARALLEL, "expert_parallel": _EXPERT_PARALLEL,
    "pipeline": Section({
        "stages": _int("auto", 1, auto_is_value=True), "partition": _text("best"),
        "seed_layers": _flag(), "activation_checkpoint_interval": _int(0, 0),
        "pipe_partitioned": _flag(True), "grad_partitioned": _flag(True),
        "use_reentrant": Key((bool, NONE), True),
    }),
    "compile": _COMPILE,
    "hybrid_engine": Section({
        "enabled": _flag(), "max_out_tokens": _int(512, above=0), "inference_tp_size": _int(1),
        "release_inference_cache": _flag(), "pin_parameters": _flag(True),
        "tp_gather_partition_size": _int(8), "enable_cuda_graph": _flag(),
    }),
    "weight_quantization": Section({
        "enabled": _flag(True), "num_bits": _int(8),
        "q_type": _text("symmetric", "symmetric", "asymmetric"), "q_groups": _int(1),
        "quantized_initialization": Section(open=True), "post_init_quant": Section(open=True),
    }),
    "data_efficiency": _DATA_EFFICIENCY, "autotuning": _AUTOTUNING,
    "flops_profiler": Section({
        "enabled": _flag(), "recompute_fwd_factor": _float(0.0), "profile_step": _int(1),
        "module_depth": _int(-1), "top_modules": _int(1), "detailed": _flag(True),
        "output_file": _text(None),
    }),
    "comms_logger": Section({
        "enabled": _flag(), "prof_all": _flag(True), "prof_ops": _list([], **_LISTED_TEXTS),
        "verbose": _flag(), "debug": _flag(),
    }),
    "timers": Section({
        "throughput": Section({"enabled": _flag(True), "synchronized": _flag(True)})
    }),
    "tensorboard": _FILES, "csv_monitor": _FILES, "comet": _COMET,
    "wandb": Section({
        "enabled": _flag(), "group": _text(None), "team": _text(None),
        "project": _text("deepspeed"),
    }),
    **_REMOVED,
})  # fmt: skip
