"""Finding overrides of methods that transformers' Trainer calls and this one does not."""

from __future__ import annotations

from typing import Any

from dstrain.core.errors import Problem

# Methods of transformers' Trainers that are not here -> what to override, or to use, instead. Every
# documented one is here: it is called, or does what it says.
ELSEWHERE = {
    "_inner_training_loop": "training_step, compute_loss, or a callback",
    "_maybe_log_save_evaluate": "log, evaluate, or a callback that sets the control's flags",
    "_evaluate": "evaluate",
    "_get_train_sampler": "get_train_dataloader",
    "_get_eval_sampler": "get_eval_dataloader",
    "_get_collator_with_removed_columns": "remove_unused_columns=False and the data_collator",
    "_remove_unused_columns": "remove_unused_columns=False and the data_collator",
    "_set_signature_columns_if_needed": "remove_unused_columns=False and the data_collator",
    "_wrap_model": "nothing: the engine wraps the model",
    "_move_model_to_device": "nothing: the engine places the model",
    "_prepare_input": "_prepare_inputs",
    "_save": "save_model",
    "_save_checkpoint": "save_model, or a callback's on_save",
    "_save_optimizer_and_scheduler": "nothing: checkpoints hold both at any topology",
    "_load_optimizer_and_scheduler": "nothing: checkpoints hold both at any topology",
    "_save_rng_state": "nothing: checkpoints hold the random state of every rank",
    "_load_rng_state": "nothing: checkpoints hold the random state of every rank",
    "_load_from_checkpoint": "train(resume_from_checkpoint=...)",
    "_load_best_model": "load_best_model_at_end",
    "_rotate_checkpoints": "save_total_limit",
    "_push_from_checkpoint": "hub_strategy, or a callback's on_save",
    "_hp_search_setup": "hp_space of hyperparameter_search",
    "_report_to_hp_search": "compute_objective of hyperparameter_search",
    "_nested_gather": "compute_metrics and preprocess_logits_for_metrics",
    "_pad_across_processes": "compute_metrics and preprocess_logits_for_metrics",
    "get_batch_samples": "get_train_dataloader",
    "get_total_train_batch_size": "gradient_accumulation_steps and per_device_train_batch_size",
    "_build_accelerator_args": "nothing: there is no accelerate here",
    "_clip_grad_norm": "max_grad_norm, or at stage 0 a callback's on_pre_optimizer_step",
    "_defer_fsdp_gradient_reduction": "nothing: ZeRO partitions the model, not FSDP",
    "_determine_best_metric": "metric_for_best_model and greater_is_better, or a callback's "
    "on_evaluate",
    "_finalize_training": "train, around super().train(), or a callback's on_train_end",
    "_finish_current_push": "nothing: train() ends once uploads have",
    "_get_dataloader": "get_train_dataloader, get_eval_dataloader and get_test_dataloader",
    "_get_grad_norm": "log",
    "_get_learning_rate": "log, or create_scheduler",
    "_get_num_items_in_batch": "compute_loss: its num_items_in_batch is the count of targets",
    "_get_output_dir": "output_dir, and hp_name of hyperparameter_search",
    "_has_mixed_mesh_grads": "nothing: all parameters are of one mesh",
    "_init_training_state": "a callback's on_train_begin",
    "_issue_warnings_after_load": "nothing: a checkpoint that lacks weights is refused",
    "_load_callback_state": "restore_callback_states_from_checkpoint",
    "_load_scaler": "nothing: checkpoints hold the loss scale",
    "_mixed_mesh_grad_norm": "nothing: all parameters are of one mesh",
    "_pad_tensors_to_max_len": "prediction_step",
    "_prepare_context_parallel_inputs": "_prepare_inputs",
    "_prepare_for_training": "create_optimizer and create_scheduler",
    "_run_epoch": "training_step, compute_loss, or a callback",
    "_save_scaler": "nothing: checkpoints hold the loss scale",
    "_sync_replicated_trainable_parameters": "nothing: DeepSpeed keeps parameters alike",
    "_track_num_input_tokens": "include_num_input_tokens_seen, or training_step",
    "_tune_save_checkpoint": "save_strategy",
    "_update_auto_batch_size": "auto_find_batch_size",
    "_validate_args": "__init__",
    "set_initial_training_values": "max_steps, num_train_epochs and get_train_dataloader",
    "create_accelerator_and_postprocess": "nothing: there is no accelerate here",
    "end": "close, or a callback's on_train_end",
    "loss_is_scaled_for_ga": "compute_loss: the loss of a step is the mean over all of its targets",
}


def ignored_overrides(cls: type, unnamed: tuple[Any, ...] = ()) -> list[Problem]:
    """Find overrides and arguments that would be ignored silently.

    Args:
        cls: the user's class.
        unnamed: arguments of the constructor beyond those that all releases have in one order.

    Returns:
        a problem for every such override, with what to override instead.
    """
    problems = [
        Problem(
            f"{len(unnamed)} arguments of {cls.__name__} by position, after model_init",
            "releases of transformers differ in their order",
            "write compute_metrics=..., callbacks=... and so on",
        )
    ] * bool(unnamed)
    return problems + [
        Problem(
            f"{cls.__name__} overrides {name}",
            "dstrain has its own way of doing this and does not call it",
            f"use {instead}",
        )
        for name, instead in ELSEWHERE.items()
        if hasattr(cls, name)
    ]
