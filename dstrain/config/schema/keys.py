"""Keys of a DeepSpeed config: those that its pydantic models declare, and additions by hand.

Added by hand are blocks that DeepSpeed reads without a model, limits that its code checks or that
are not checked, other spellings, and removed keys. The tests in ``tests/unit/config/schema``
compare all of them with the installed source.
"""

from __future__ import annotations

from typing import Final

from dstrain.config.schema.entry import (
    LISTED_TEXTS,
    NO_DEFAULT,
    NONE,
    TEXT,
    Alias,
    Key,
    Refused,
    Section,
    amended,
    flag,
    listing,
    number,
    text,
    whole,
)
from dstrain.config.schema.generated import DEEPSPEED_VERSION, MODELS
from dstrain.config.schema.optimizer_keys import OPTIMIZER, SCHEDULER

_DTYPE_NAMES = (
    "fp16", "float16", "half", "torch.float16", "bf16", "bfloat16", "torch.bfloat16",
    "fp32", "float32", "float", "torch.float32", "int8", "torch.int8",
)  # fmt: skip
_DTYPE = text(None, *_DTYPE_NAMES)
_REDUCTION_DTYPES = ("fp16", "bf16", "fp32")

# --- zero_optimization ---------------------------------------------------------------------------

_ZERO = "zero_optimization"
_MICS = Refused(
    f"DeepSpeed {DEEPSPEED_VERSION} removed MiCS",
    "use zero_hpz_partition_size (ZeRO++) to gather weights inside a node",
)
_NAMES = {"types": (list, str)}  # DeepSpeed turns one name into a list
_ON_CPU = {True: {"device": "cpu"}, False: None, None: None, "auto": None}
_OLD_FLAG = flag(None)
_ZERO_OPTIMIZATION = amended(
    MODELS[_ZERO],
    {
        "zenflow.select_strategy": {"choices": ("step", "epoch")},
        "zenflow.update_interval": {"minimum": 1},
        "zenflow.steps_per_epoch": Refused("DeepSpeed sets it while it runs", "remove it"),
        "leaf_module": {"nullable": True},
        "leaf_module.classes": _NAMES,
        "leaf_module.names": _NAMES,
        "leaf_module.name_suffixes": _NAMES,
        "stage3_gather_fp16_weights_on_model_save": Alias(
            f"{_ZERO}.stage3_gather_16bit_weights_on_model_save"
        ),
        "cpu_offload": Alias(f"{_ZERO}.offload_optimizer", key=_OLD_FLAG, written_out=_ON_CPU),
        "cpu_offload_param": Alias(f"{_ZERO}.offload_param", key=_OLD_FLAG, written_out=_ON_CPU),
        "cpu_offload_use_pin_memory": Refused(
            f"DeepSpeed {DEEPSPEED_VERSION} accepts it and reads it nowhere",
            "set pin_memory inside offload_optimizer and offload_param",
        ),
        "mics_shard_size": _MICS,
        "mics_hierarchical_params_gather": _MICS,
        "zeropp_loco_param": Refused(
            f"DeepSpeed {DEEPSPEED_VERSION} removed LoCo",
            "keep zero_quantized_gradients without it, which has no error feedback",
        ),
    },
    written_out={True: {"stage": 1}, False: {"stage": 0}},
)

# --- precision, checkpoints, parallelism ---------------------------------------------------------

_FP16 = amended(MODELS["fp16"], {"loss_scale": {"minimum": 0.0}})
_BF16 = amended(MODELS["bf16"], {}, nullable=True)
_CHECKPOINT = Section({
    "tag_validation": text("WARN", any_case=("Warn", "Ignore", "Fail")),
    "load_universal": flag(), "use_node_local_storage": flag(),
    "parallel_write": Section({"pipeline_stage": flag()}),
    "checkpoint_serialization": flag(True),
    "writer": Section({
        "type": text("FAST", any_case=("fast", "python", "mock")), "decoupled": flag(),
        "io_buffer_size": whole(64 * 1024**2, 1), "io_buffer_double": flag(True),
        "io_multiplier": whole(1, 1), "show_statistics": flag(),
        "data_parallel": text(None, any_case=("replica", "socket", "machine")),
    }, nullable=True),
})  # fmt: skip
_TP_SPEC = Section({
    "patterns": listing([], **LISTED_TEXTS), "model_types": listing(None, **LISTED_TEXTS),
    "partition_type": text("column", any_case=("column", "row", "skip")),
    "gather_output": flag(), "grad_allreduce": flag(), "shape": listing(None),
    "partition_dim": whole(None),
})  # fmt: skip
_TENSOR_PARALLEL = amended(MODELS["tensor_parallel"], {
    "autotp_size": {"minimum": 0}, "tp.tp_size": {"minimum": 1}, "tp.tp_grain_size": {"minimum": 1},
    # A preset of another name is silently none at all.
    "preset_model": {
        "any_case": ("llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"),
    },
    "partition_config": Section({
        "tp_size": whole(1, 1), "layer_specs": listing([], _TP_SPEC),
        "embedding_partition_dim": whole(1), "use_default_specs": flag(True),
        "lm_head_patterns": listing(["lm_head", "embed_out"], **LISTED_TEXTS),
        "strict_mode": flag(),
    }, nullable=True),
})  # fmt: skip
_EXPERT_PARALLEL = Section({
    "enabled": flag(), "autoep_size": whole(1, 1), "expert_tensor_parallel_size": whole(1, 1),
    "validate_folding_routing": flag(), "async_split_plan": flag(),
    "preset_model": text(
        None, "mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "minimax_m3"
    ),
    "moe_layer_pattern": text(None), "expert_pattern": text(None), "router_pattern": text(None),
    "use_grouped_mm": flag(True), "disable_triton_grouped_mm": flag(), "route_norm": flag(None),
    "route_scale": number(1.0), "score_apply": text("auto", "pre", "post", auto_is_value=True),
    "combine_impl": text(
        "auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm", auto_is_value=True
    ),
    "row_weighting_impl": text("auto", "eager", "fused", auto_is_value=True),
    "gate_up_impl": text("separate", "separate", "fused"),
    "comm_backend": text("comm", "comm", "deepep"), "comm_num_sm": whole(12, 1),
    "comm_qp_margin": whole(4, 0), "comm_max_tokens_per_rank": whole(0, 0),
    "num_expert_groups": whole(None, 1), "num_limited_groups": whole(None, 1),
    "score_func": text("auto", "softmax", "sigmoid", auto_is_value=True),
    "top_k": whole("auto", auto_is_value=True), "load_balance_coeff": Key((NONE,), None),
    "routed_scaling_factor": number("auto", auto_is_value=True),
    "expert_w1": text(None), "expert_w2": text(None), "expert_w3": Key((str, NONE)),
    "num_experts_attr": text(None), "top_k_attr": text(None), "has_shared_experts": flag(None),
    "shared_experts_pattern": text(None), "shared_experts_gate_pattern": text(None),
    "expert_activation": text(None),
}, nullable=True)  # fmt: skip
_COMPILE = amended(
    MODELS["compile"], {"passes": {"items": text(NO_DEFAULT, "z1", "z3", "autosp", "autotp")}}
)

# --- data efficiency, autotuning, monitors -------------------------------------------------------

_NUMBERS = listing(NO_DEFAULT, number())
_CURRICULUM_METRIC = Section({
    "index_to_sample_path": TEXT, "index_to_metric_path": TEXT, "clustering_type": TEXT,
    "difficulty_type": text(NO_DEFAULT, "value", "percentile"),
    "min_difficulty": number(), "max_difficulty": number(),
    "schedule_type": text(
        NO_DEFAULT, "fixed_discrete", "fixed_root", "fixed_linear", "custom"
    ),
    "schedule_config": Section({
        "difficulty": _NUMBERS, "max_step": _NUMBERS, "total_curriculum_step": whole(NO_DEFAULT, 1),
        "difficulty_step": whole(NO_DEFAULT, 1), "root_degree": number(above=0.0),
    }),
})  # fmt: skip
_RANDOM_LTD = Section({
    "enabled": flag(), "total_layer_num": whole(), "random_ltd_layer_num": whole(),
    "random_ltd_layer_id": listing(NO_DEFAULT, whole()), "model_mask_name": Key((str, NONE)),
    "model_type": text(NO_DEFAULT, "encoder", "decoder"),
    "hidden_state_order": text(NO_DEFAULT, "batch_seq_dim", "seq_batch_dim"),
    "micro_batch_size": whole(NO_DEFAULT, 1), "global_batch_size": whole(NO_DEFAULT, 1),
    "random_ltd_schedule": Section({
        "min_value": whole(), "max_value": whole(),
        "schedule_type": text(NO_DEFAULT, "fixed_linear"),
        "schedule_config": Section({
            "require_steps": whole(NO_DEFAULT, 1), "seq_per_step": whole(NO_DEFAULT, 1),
        }),
    }),
    "layer_token_lr_schedule": Section({
        "enabled": flag(), "total_layer_tokens": whole(), "warmup_type": TEXT,
        "warmup_layer_tokens": whole(),
    }),
})  # fmt: skip
_DATA_EFFICIENCY = Section({
    "enabled": flag(), "seed": whole(1234),
    "data_sampling": Section({
        "enabled": flag(), "num_epochs": whole(1000, 1), "num_workers": whole(0, 0),
        "pin_memory": flag(),
        "curriculum_learning": Section({
            "enabled": flag(), "data_cluster_path": TEXT,
            "curriculum_metrics": Section(each=_CURRICULUM_METRIC),
        }),
        "dynamic_batching": Section({
            "enabled": flag(), "metrics_path": TEXT, "max_tokens": whole(NO_DEFAULT, 1),
            "lr_scaling_method": text("linear", "linear", "sqrt", "none"),
            "min_batch_size": whole(1, 1), "max_batch_size": Key((int,), None, minimum=1),
            "sequence_picking_order": text("dataloader", "random", "seqlen", "dataloader"),
            "verbose": flag(),
        }),
    }),
    "data_routing": Section({"enabled": flag(), "random_ltd": _RANDOM_LTD}),
})  # fmt: skip
_AUTOTUNING = Section({
    "enabled": flag(), "fast": flag(True), "overwrite": flag(True),
    "results_dir": text("autotuning_results"), "exps_dir": text("autotuning_exps"),
    "start_profile_step": whole(3), "end_profile_step": whole(5), "metric_path": text(None),
    "metric": text("throughput", "latency", "throughput", "flops", "forward", "step"),
    "tuner_type": text("gridsearch", "gridsearch", "random", "model_based"),
    "tuner_early_stopping": whole(5), "tuner_num_trials": whole(50), "mp_size": whole(1, 1),
    "arg_mappings": Section(open=True, nullable=True), "model_info_path": text(None),
    "model_info": Section({
        "profile": flag(), "num_params": whole(None), "hidden_size": whole(None),
        "num_layers": whole(None),
    }, nullable=True),
    "max_train_batch_size": whole(None, 1), "min_train_batch_size": whole(1, 1),
    "max_train_micro_batch_size_per_gpu": whole(1024, 1),
    "min_train_micro_batch_size_per_gpu": whole(1, 1), "num_tuning_micro_batch_sizes": whole(3, 1),
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
    "train_batch_size": whole(None, 1), "train_micro_batch_size_per_gpu": whole(None, 1),
    "gradient_accumulation_steps": whole(None, 1), "managed_gradient_accumulation": flag(True),
    "gradient_clipping": number(1.0, 0.0), "prescale_gradients": flag(),
    "gradient_predivide_factor": number(1.0, above=0.0),
    "gradient_allreduce_op": text("mean", any_case=("mean", "sum")),
    "communication_data_type": text(None, any_case=_REDUCTION_DTYPES),
    "seq_parallel_communication_data_type": Key(
        (str, NONE), "fp32", any_case=_REDUCTION_DTYPES
    ),
    "sequence_parallel_size": whole(NO_DEFAULT, 1), "data_parallel_size": whole(NO_DEFAULT, 1),
    "use_data_before_expert_parallelism": flag(), "disable_allgather": flag(),
    "zero_allow_untested_optimizer": flag(), "zero_force_ds_cpu_optimizer": flag(True),
    "steps_per_print": whole(None, 1, infinite=True), "wall_clock_breakdown": flag(),
    "memory_breakdown": flag(), "dump_state": flag(), "disable_python_gc": flag(),
    "dataloader_drop_last": flag(), "vocabulary_size": whole(None, 0),
    "log_level": text(None, any_case=("debug", "info", "warning", "error", "critical")),
    "optimizer": OPTIMIZER, "scheduler": SCHEDULER,
    "zero_optimization": _ZERO_OPTIMIZATION,
    "allgather_size": Alias("zero_optimization.allgather_bucket_size"),
    "fp16": _FP16, "bf16": _BF16, "bfloat16": Alias("bf16"),
    # Left out, the last two are null; written as null, DeepSpeed stops.
    "torch_autocast": Section({
        "enabled": flag(), "dtype": Key((str,), None, choices=_DTYPE_NAMES),
        "lower_precision_safe_modules": Key((list,), None, **LISTED_TEXTS),
    }),
    "data_types": Section({
        "grad_accum_dtype": _DTYPE, "param_dtype": _DTYPE, "buffer_dtype": _DTYPE,
        "keep_in_fp32_modules": listing("auto", **LISTED_TEXTS, auto_is_value=True),
    }),
    "activation_checkpointing": Section({
        "partition_activations": flag(), "number_checkpoints": whole(None, 1),
        "contiguous_memory_optimization": flag(), "cpu_checkpointing": flag(),
        "profile": flag(), "synchronize_checkpoint_boundary": flag(),
    }),
    "aio": Section({
        "block_size": whole(1048576, 1), "queue_depth": whole(8, 1),
        "intra_op_parallelism": whole(1, 1), "single_submit": flag(),
        "overlap_events": flag(True), "use_gds": flag(),
    }, nullable=True),
    "checkpoint": _CHECKPOINT,
    # Any value but false, also null, selects DataStates' engine, which reads the block.
    "datastates_ckpt": Section(open=True, also=(bool,)),
    "tensor_parallel": _TENSOR_PARALLEL, "expert_parallel": _EXPERT_PARALLEL,
    "pipeline": Section({
        "stages": whole("auto", 1, auto_is_value=True), "partition": text("best"),
        "seed_layers": flag(), "activation_checkpoint_interval": whole(0, 0),
        "pipe_partitioned": flag(True), "grad_partitioned": flag(True),
        "use_reentrant": Key((bool, NONE), True),
    }),
    "compile": _COMPILE,
    "hybrid_engine": MODELS["hybrid_engine"],
    "weight_quantization": MODELS["weight_quantization"],
    "data_efficiency": _DATA_EFFICIENCY, "autotuning": _AUTOTUNING,
    "flops_profiler": Section({
        "enabled": flag(), "recompute_fwd_factor": number(0.0), "profile_step": whole(1),
        "module_depth": whole(-1), "top_modules": whole(1), "detailed": flag(True),
        "output_file": text(None),
    }),
    "comms_logger": amended(MODELS["comms_logger"], {"prof_ops": LISTED_TEXTS}),
    "timers": Section({"throughput": MODELS["timers.throughput"]}),
    "tensorboard": MODELS["tensorboard"], "csv_monitor": MODELS["csv_monitor"],
    "comet": amended(MODELS["comet"], {"samples_log_interval": {"minimum": 1}}),
    "wandb": MODELS["wandb"],
    **_REMOVED,
})  # fmt: skip
