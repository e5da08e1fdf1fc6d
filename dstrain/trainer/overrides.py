"""Methods that a subclass written for transformers may override, and that nothing calls here."""

from __future__ import annotations

from dstrain.core.errors import Problem

# Semi-private methods of transformers' Trainer -> what to override instead. Every documented one is
# called, or runs what it says.
_ELSEWHERE = {
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
    "create_accelerator_and_postprocess": "nothing: there is no accelerate here",
}


def unheard(cls: type, unnamed: tuple[object, ...] = ()) -> list[Problem]:
    """Find overrides and arguments that would be ignored silently.

    Args:
        cls: the user's class.
        unnamed: arguments of the constructor beyond those that all releases have in one order.

    Returns:
        a problem for every override that nothing calls, with what to override instead.
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
        for name, instead in _ELSEWHERE.items()
        if hasattr(cls, name)
    ]
