"""Construction of a DeepSpeed engine on a module from a resolved config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.ranks import is_distributed
from dstrain.engine.model_checks import (
    check_formats,
    check_layerdrop,
    check_leaf_modules,
    make_contiguous,
)
from dstrain.engine.optimizers import (
    clip_before_muon,
    correct_bias_by_step,
    make_adagrad_lazy,
    optimizer_factory,
    stepping_by_metric_only,
    without_adagrad_replacement,
)
from dstrain.engine.process_group import device_type, unlink_once_mapped
from dstrain.engine.quiet import quiet
from dstrain.engine.zero import (
    Partitioner,
    SwapFolder,
    forget_running_modules,
    has_scalars,
    process_settings,
    scalars_as_bytes,
    showing_partitions,
)

SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


def check_model(module: torch.nn.Module, resolved: ResolvedConfig, *, trains: bool) -> None:
    """Raise an error for a model that DeepSpeed could not run, or would train incorrectly.

    Args:
        module: the model.
        resolved: the config of the run.
        trains: False for a model that only runs forward.

    Raises:
        ModelError: saying what to change.
    """
    check_leaf_modules(module, resolved)
    if trains and resolved.stage == 3 and is_distributed():
        check_layerdrop(module, leaves=resolved.leaf_classes)
    check_formats(module, resolved, trains=trains)


def build_deepspeed_engine(
    module: torch.nn.Module,
    resolved: ResolvedConfig,
    *,
    groups: list[dict[str, Any]] | None,
    optimizer: torch.optim.Optimizer | None,
    scheduler: SchedulerFactory | Any | None,
    trains: bool,
) -> tuple[Any, Any, Any]:
    """Return DeepSpeed's engine, optimizer and scheduler for a model that ``check_model`` passed.

    The arguments are those of ``Engine``. Sets the settings that DeepSpeed keeps once per process
    to those of this engine, also if building it fails.
    """
    import deepspeed

    config = resolved.to_deepspeed()
    if "activation_checkpointing" in config:
        # deepspeed.initialize does not read this block.
        deepspeed.checkpointing.configure(None, deepspeed_config=config)
    if not trains:
        config.pop("optimizer", None)
        config.pop("scheduler", None)
    factory = optimizer_factory(resolved) if trains and optimizer is None else None
    if factory is not None:
        config.pop("optimizer", None)
    if optimizer is not None:
        make_adagrad_lazy(optimizer)
    if resolved.has_scheduler:
        scheduler = None
    make_contiguous(module)
    process_settings.set_for(module, resolved)
    scalars = scalars_as_bytes(wanted=has_scalars(module.parameters()))
    if config["zero_optimization"].get("offload_param", {}).get("device") == "nvme":
        # On a CPU deepspeed.initialize would swap weights in bf16, whatever the format of training.
        Partitioner(config).split_like_main_rank(module.parameters())
    swap_folder = SwapFolder(config, "offload_optimizer")
    with quiet(), without_adagrad_replacement(), scalars:
        engine, wrapper, _, built_scheduler = deepspeed.initialize(
            model=module,
            model_parameters=groups if optimizer is None else None,
            optimizer=factory if optimizer is None else optimizer,
            lr_scheduler=stepping_by_metric_only(scheduler),
            config=config,
        )
    swap_folder.remove_with(getattr(wrapper, "optimizer_swapper", None))
    forget_running_modules(module)
    if device_type() == "cpu":
        # Where the user has made the process group, DeepSpeed maps its buffers only now.
        unlink_once_mapped()
    # The function that made the schedule may reference a whole Trainer.
    engine.client_lr_scheduler = None
    process_settings.keep_communication_format(wrapper, resolved)
    correct_bias_by_step(engine.basic_optimizer)
    clip_before_muon(wrapper, engine.basic_optimizer)
    if resolved.stage == 3:
        _let_deepspeed_save(engine)
    return engine, wrapper, built_scheduler


def _let_deepspeed_save(engine: Any) -> None:
    """Let DeepSpeed's own checkpoints call ``state_dict()`` on the partitioned module.

    For everybody else dstrain refuses the call, since partitions would be taken for whole weights.
    """
    state_dict = engine.module_state_dict

    def module_state_dict(*args: Any, **kwargs: Any) -> Any:
        with showing_partitions(engine.module):
            return state_dict(*args, **kwargs)

    engine.module_state_dict = module_state_dict
