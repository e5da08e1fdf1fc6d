"""Assembly of a run from all rooms: process group, resolved config, engine."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.arguments.optimizer import METRIC_SCHEDULERS
from dstrain.config import Facts, ResolvedConfig, optimizers, resolve
from dstrain.config.difference import RECORD_FILE
from dstrain.config.explain import as_record, as_table
from dstrain.config.memory.sizes import ModelSizes
from dstrain.core import log
from dstrain.core.errors import ConfigError, DstrainError, Problem
from dstrain.core.files import write_record
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, gather_objects, launched_ranks, require_equal
from dstrain.core.seeds import make_deterministic
from dstrain.data import (
    LossRule,
    LossTargets,
    label_columns,
)
from dstrain.engine import (
    Engine,
    build_ops,
    check_formats,
    check_precision,
    check_sizes,
    check_user_optimizer,
    check_versions,
    device_type,
    expert_blocks,
    formats_remark,
    is_partitioned,
    leaf_remark,
    least,
    optimizer_class,
    parameter_groups,
    prepare_nvme,
    read_machine,
    slices_remark,
    start,
)
from dstrain.models import building_partitioned, sizes_of_module
from dstrain.training.types import Scheduler

logger = get_logger(__name__)

_PATIENCE_SECONDS = 5.0


def start_run(args: TrainingArguments) -> Ranks:
    """Set up process group, log levels and number formats, before anything touches the model."""
    if args.full_determinism:
        make_deterministic()
    ranks = start(use_cpu=args.use_cpu, backend=args.ddp_backend, timeout_seconds=args.ddp_timeout)
    log.configure(level=args.get_process_log_level(), rank=ranks.rank, world_size=ranks.world_size)
    _set_level_of_transformers(args)
    if ranks.rank and not getattr(sys.excepthook, "lets_main_rank_speak", False):
        _let_the_main_rank_speak()
    if args.tf32 is not None and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
        torch.backends.cudnn.allow_tf32 = args.tf32
    return ranks


def _set_level_of_transformers(args: TrainingArguments) -> None:
    """Set transformers' log level to this rank's; the level passive leaves it unchanged."""
    from dstrain.trainer import compat

    if (args.log_level if args.should_log else args.log_level_replica) != "passive":
        compat.logging.set_verbosity(args.get_process_log_level())


def _let_the_main_rank_speak() -> None:
    """Hold back this rank's traceback of a user's mistake, which the main rank reports as well.

    The launcher ends this rank once the main one has ended; only an error of this rank alone is
    still shown.
    """
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, DstrainError):
            time.sleep(_PATIENCE_SECONDS)
        show(kind, error, trace)

    hook.lets_main_rank_speak = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def targets_of(
    module: torch.nn.Module,
    args: TrainingArguments,
    *,
    rule: LossRule | None = None,
    model_loss: bool = True,
    receives_count: bool = False,
) -> LossTargets:
    """Begin to find out what the loss of this model is a mean over.

    Args:
        module: the model.
        args: the user's arguments.
        rule: what the loss is a mean over, where that is known.
        model_loss: whether the loss is the model's own, not one of the user's.
        receives_count: whether the model or the user's loss function takes the count of targets.
    """
    compiled = args.torch_compile or hasattr(module, "_orig_mod")  # what torch.compile returns
    labels = label_columns(module, args.label_names)
    return LossTargets(
        module,
        labels,
        rule=rule,
        watch=not compiled,
        model_loss=model_loss,
        receives_count=receives_count,
    )


def resolve_config(
    args: TrainingArguments,
    ranks: Ranks,
    *,
    module: torch.nn.Module | None = None,
    sizes: ModelSizes | None = None,
    sequence_length: int | None = None,
    num_training_steps: int | None = None,
    user_optimizer: bool = False,
    user_scheduler: bool = False,
    found_batch: tuple[int, int] | None = None,
) -> ResolvedConfig:
    """Resolve the DeepSpeed config for these ranks, this model and run; alike on all ranks.

    Args:
        args: the user's arguments.
        ranks: rank and world size of this process.
        module: the model, where there is one.
        sizes: the model's sizes, where they are known before it is built.
        sequence_length: tokens of one sample, where the task knows them.
        num_training_steps: optimizer steps of the run.
        user_optimizer: the user brings an optimizer: an object, or a method that makes it.
        user_scheduler: the user brings a schedule: an object, or a method that makes it.
        found_batch: what ``auto_find_batch_size`` found, in the units of the arguments.

    Raises:
        ConfigError: on every rank, also when only one cannot read the config.
        ModelError: the model has parameters without a size.
    """
    if module is not None:
        check_sizes(module)
        sizes = sizes_of_module(module)
    facts = Facts(
        world_size=ranks.world_size,
        device=device_type(),
        num_training_steps=num_training_steps,
        model=None if sizes is None else sizes.facts,
        user_optimizer=user_optimizer,
        user_scheduler=user_scheduler,
        sizes=sizes,
        machine=least(gather_objects(read_machine(ranks, disk=getattr(args, "nvme_path", None)))),
        sequence_length=sequence_length,
        partitioned=module is not None and any(is_partitioned(p) for p in module.parameters()),
        expert_blocks=() if module is None else expert_blocks(module),
        is_transformers=_is_of_transformers(module),
        found_batch=found_batch,
        packages=frozenset(name for name in optimizers.packages() if find_spec(name)),
    )
    with all_or_none():
        resolved = resolve(args, facts)
        check_precision(resolved.compute_format)
        if not user_scheduler and not resolved.has_scheduler:
            _check_schedule(args, resolved)
        prepare_nvme(resolved)
    require_equal("the resolved DeepSpeed config", dict(resolved.values), ConfigError)
    return resolved


def _is_of_transformers(module: torch.nn.Module | None) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


@contextlib.contextmanager
def partitioned(args: TrainingArguments) -> Iterator[None]:
    """Build models partitioned inside the block when ``args`` resolve to ZeRO stage 3.

    A model that is built or loaded by transformers in here never exists whole on a rank's device;
    given to the Trainer whole, it would have to fit there once. Below stage 3 nothing changes, nor
    with ``zero_stage="auto"``, which cannot be decided before there is a model: say 3.
    """
    ranks = start_run(args)
    check_versions()  # where the group was there already
    with building_partitioned(resolve_config(args, ranks)):
        yield


def scheduler_factory(
    args: TrainingArguments, num_training_steps: int
) -> Callable[[torch.optim.Optimizer], Scheduler]:
    """Return a function that makes the schedule of an optimizer; the engine calls and steps it."""

    def make(optimizer: torch.optim.Optimizer) -> Scheduler:
        from transformers import get_scheduler

        kwargs = args.scheduler_kwargs()
        if args.lr_scheduler_type in METRIC_SCHEDULERS:
            kwargs.setdefault("mode", "max" if args.greater_is_better else "min")
        try:
            return get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=kwargs,
            )
        except (TypeError, ValueError, ArithmeticError) as error:
            kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            given = json.dumps(kwargs, default=str)
            raise ConfigError(
                Problem(
                    f"lr_scheduler_type={kind!r} with lr_scheduler_kwargs={given}",
                    f"no schedule can be made of them: {error}",
                    f"give what transformers' schedule {kind!r} takes",
                )
            ) from error

    return make


def _check_schedule(args: TrainingArguments, resolved: ResolvedConfig) -> None:
    """Refuse arguments that a schedule does not take, by trying to make one for a tensor.

    Raises:
        ConfigError: naming the arguments.
    """
    if args.scheduler_kwargs():
        nothing = torch.optim.SGD([torch.zeros(1)], lr=resolved.learning_rate)
        scheduler_factory(args, max(100, args.max_steps))(nothing)


def optimizer_of(args: TrainingArguments) -> tuple[type[Any], dict[str, Any]]:
    """Return the class of the optimizer that ``args`` resolve to, and its keyword arguments."""
    return optimizer_class(resolve_config(args, start_run(args)))


def check_passed(
    args: TrainingArguments,
    optimizers: tuple[object, object],
    cls_and_kwargs: tuple[object, dict[str, object]] | None,
    resolved: ResolvedConfig,
) -> None:
    """Refuse optimizers and schedules that were passed and cannot run as given.

    Raises:
        ConfigError: both ways to bring an optimizer were used, or it cannot run at this stage.
    """
    if cls_and_kwargs is not None and any(part is not None for part in optimizers):
        raise ConfigError(
            Problem(
                "optimizers and optimizer_cls_and_kwargs were both passed",
                "each brings an optimizer, and only one can run",
                "pass one of them",
            )
        )
    check_user_optimizer(*optimizers, resolved)
    # `optim` chooses what the config builds, which an object displaces.
    for name in sorted({"optim", "optim_args"} & args.changed_fields()):
        if optimizers[0] is not None or cls_and_kwargs is not None:
            value = getattr(args, name)
            logger.warning("%s=%r is without effect: your own optimizer runs", name, value)


def check_formats_of(module: torch.nn.Module, resolved: ResolvedConfig, ranks: Ranks) -> None:
    """Refuse parameters in formats that would be lost, and say what becomes of unusual ones.

    Raises:
        ModelError: listing them.
    """
    check_formats(module, resolved)
    if ranks.is_main and (remark := formats_remark(module, resolved)):
        logger.warning("%s", remark)


def training_engine(
    module: torch.nn.Module,
    resolved: ResolvedConfig,
    *,
    optimizer: torch.optim.Optimizer | None,
    scheduler: object,
    decay_names: Callable[[torch.nn.Module], list[str]],
) -> Engine:
    """Build a DeepSpeed engine with our parameter groups, or with the user's own optimizer."""
    groups = None
    check_user_optimizer(optimizer, scheduler, resolved)
    if remark := slices_remark(optimizer, resolved):
        logger.warning("%s", remark)
    if launched_ranks().is_main and (blocks := leaf_remark(module, resolved)):
        logger.warning("%s", blocks)
    build_ops(resolved)
    if optimizer is None:
        groups = parameter_groups(
            module, weight_decay=resolved.weight_decay, decay_names=decay_names
        )
    engine = Engine(module, resolved, groups=groups, optimizer=optimizer, scheduler=scheduler)
    if resolved.compilation is not None:
        engine.compile(*resolved.compilation)
    return engine


def record_resolved_config(resolved: ResolvedConfig, args: TrainingArguments) -> None:
    """Write every key with its value and reason into the run's folder, and log it (level info).

    ``dstrain explain --diff`` reads the file.

    Raises:
        TrainingError: the disk is full, the folder is gone, and so on.
    """
    path = Path(args.output_dir) / RECORD_FILE
    write_record(path, json.dumps(as_record(resolved, args), indent=2) + "\n")
    logger.info("the resolved DeepSpeed config, also in %s:\n%s", path, as_table(resolved))
