"""``auto_find_batch_size``: when memory runs out, all ranks go on with a smaller micro-batch."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from dstrain.arguments import TrainingArguments
from dstrain.config import ResolvedConfig
from dstrain.config.resolution.batch import smaller
from dstrain.core.errors import ConfigError, Problem, TrainingError, raise_problems
from dstrain.core.log import get_logger
from dstrain.core.ranks import require_equal
from dstrain.data import inherit_split
from dstrain.engine import CapturedState, ProcessGroupRecovery, is_out_of_memory
from dstrain.trainer import checkpointing as saving
from dstrain.training.loop import TrainLoop

if TYPE_CHECKING:
    from dstrain.trainer.trainer import Trainer

logger = get_logger(__name__)

_DECIDED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_fitting(args: TrainingArguments, resolved: ResolvedConfig) -> None:
    """Refuse a DeepSpeed config that decides what is to be found.

    Raises:
        ConfigError: naming the keys.
    """
    if not args.auto_find_batch_size:
        return
    problems = [
        Problem(
            f"auto_find_batch_size=True, and {key}={resolved.values[key]} in the DeepSpeed config",
            "a smaller micro-batch needs another value",
            f'set {key} to "auto" there',
        )
        for key in _DECIDED
        if resolved.provenance[key].source == "config"
    ]
    if resolved.hpz_partition_size > 1:
        problems.append(
            Problem(
                "auto_find_batch_size=True with zero_hpz_partition_size",
                "its groups cannot be formed again",
                "leave one of them out",
            )
        )
    raise_problems(problems, error=ConfigError)


def begin_with_found(trainer: Trainer, start: saving.Start | None) -> None:
    """Begin with the micro-batch that the run of the checkpoint had found."""
    found = None if start is None else start.state.train_batch_size
    if not trainer.args.auto_find_batch_size or not found:
        return
    asked = trainer._resolve(None)
    micro_batch = asked.batch_unit.per_rank(found)
    total = asked.micro_batch_size * asked.accumulation
    if micro_batch < asked.micro_batch_size and total % micro_batch == 0:
        trainer.fitted = asked.batch_unit.as_argument(micro_batch), total // micro_batch
        trainer.resolved = trainer._resolve(None)


def run_fitting(trainer: Trainer, loop: TrainLoop) -> None:
    """Run the loop; where a micro-batch does not fit, go on at that step with a smaller one.

    The step that broke off had changed no weight, and the global batch stays, so the curve is that
    of a run that had begun with the smaller micro-batch.

    Raises:
        TrainingError: one sample does not fit, or memory ran out outside of forward and backward.
    """
    run = loop.run
    loop.engine.buffers.keep_copies()
    while True:
        recovery = ProcessGroupRecovery(trainer.ranks, timeout_seconds=trainer.args.ddp_timeout)
        loop.agree = recovery.wait_for_all
        said = _ran_out(run, loop, recovery)
        if not said:
            recovery.close()
            return
        captured = _abort_and_rebuild(trainer, loop, recovery)
        fitting = smaller(trainer.resolved.micro_batch_size, trainer.resolved.accumulation)
        if fitting is None:
            raise TrainingError(
                Problem(
                    "memory ran out with a micro-batch of one sample",
                    said,
                    "shorten the samples, set gradient_checkpointing, a higher zero_stage or "
                    "offload (dstrain plan shows what each needs)",
                )
            )
        _take_place(trainer, loop, captured, *fitting)
        run = loop.go_on


def _ran_out(run: Callable[[], None], loop: TrainLoop, recovery: ProcessGroupRecovery) -> str:
    """Run the loop; return the error where memory ran out on any rank, "" where it did not."""
    try:
        run()
    except Exception as error:
        here = is_out_of_memory(error)
        if not loop.computing:
            raise
        if here:
            recovery.report_out_of_memory()
        elif not recovery.another_rank_ran_out():
            raise
        # The frames hold what did not fit.
        traceback.clear_frames(error.__traceback__)
        return str(error).splitlines()[0] if here else "another rank ran out of memory"
    return ""


def _abort_and_rebuild(
    trainer: Trainer, loop: TrainLoop, recovery: ProcessGroupRecovery
) -> CapturedState:
    """Tear the engine and the process groups down, form new groups; return the engine's state."""
    loop.engine.buffers.restore_copies()
    captured = loop.engine.state.capture()
    if trainer._writer is not None:
        trainer._writer.close()
    recovery.abort()
    recovery.rebuild(trainer.model)
    trainer.close()  # it asks for its rank
    loop.preemption.renew()
    require_equal("the number of optimizer steps done", loop.progress.step, TrainingError)
    return captured


def _take_place(
    trainer: Trainer, loop: TrainLoop, captured: CapturedState, micro_batch: int, accumulation: int
) -> None:
    """Replace the engine that ran out of memory by one with another micro-batch."""
    if trainer.ranks.is_main:
        logger.warning(
            "memory ran out at step %d with a micro-batch of %d: going on with %d, and %d of them "
            "per step",
            loop.progress.step + 1,
            trainer.resolved.micro_batch_size,
            micro_batch,
            accumulation,
        )
    shown = trainer.resolved.batch_unit.as_argument(micro_batch)
    trainer.fitted = shown, accumulation
    trainer.state.train_batch_size = shown
    trainer.resolved = trainer._resolve(loop.plan.max_steps)
    loader = trainer.get_train_dataloader()
    inherit_split(loader, loop.loader)
    engine = trainer._engines.train(lambda: trainer._build_engine(loop.plan.max_steps))
    trainer.optimizer, trainer.lr_scheduler = engine.optimizer, engine.scheduler
    engine.state.restore(captured)
    engine.buffers.keep_copies()
    trainer.events.hold(loader)
    if trainer._writer is not None:
        trainer._writer = saving.make_writer(trainer, before=trainer._writer)
    loop.change(engine, loader, accumulation=trainer.resolved.accumulation)
