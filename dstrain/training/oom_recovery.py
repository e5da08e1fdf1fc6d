"""``auto_find_batch_size``: when memory runs out, all ranks go on with a smaller micro-batch."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dstrain.arguments import TrainingArguments
from dstrain.config import ResolvedConfig
from dstrain.config.resolution.batch import smaller
from dstrain.core.errors import ConfigError, Problem, TrainingError, raise_problems
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, require_equal
from dstrain.data import inherit_split
from dstrain.engine import CapturedState, Engine, ProcessGroupRecovery, is_out_of_memory
from dstrain.training.loop import TrainLoop
from dstrain.training.types import Loader

logger = get_logger(__name__)

_DECIDED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Rebuilding:
    """Holds the functions that replace an engine that ran out of memory.

    Attributes:
        pause: lets go of what uses the process groups, beside the engine; no collective.
        release: tears the engine down, once new groups are there.
        build: (micro-batch, accumulation) -> a new engine, and a loader of such micro-batches.
    """

    pause: Callable[[], None]
    release: Callable[[], None]
    build: Callable[[int, int], tuple[Engine, Loader]]


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


def found_before(
    args: TrainingArguments, resolved: ResolvedConfig, found: int | None
) -> tuple[int, int] | None:
    """Return micro-batch and accumulation to begin with, where an earlier run had found them.

    Args:
        args: the user's arguments.
        resolved: what these ask for.
        found: the micro-batch of the run that the checkpoint is from, in the unit of the argument;
            None without one.

    Returns:
        None where the arguments' own are used, else values in the units of the arguments.
    """
    if not args.auto_find_batch_size or not found:
        return None
    micro_batch = resolved.batch_unit.per_rank(found)
    total = resolved.micro_batch_size * resolved.accumulation
    if micro_batch < resolved.micro_batch_size and total % micro_batch == 0:
        return resolved.batch_unit.as_argument(micro_batch), total // micro_batch
    return None


def run_with_recovery(
    loop: TrainLoop,
    module: torch.nn.Module,
    ranks: Ranks,
    rebuilding: Rebuilding,
    *,
    micro_batch: int,
    accumulation: int,
    timeout_seconds: float,
) -> None:
    """Run the loop; where a micro-batch does not fit, go on at that step with a smaller one.

    The step that broke off had changed no weight, and the global batch stays, so the curve is that
    of a run that had begun with the smaller micro-batch.

    Args:
        loop: the training loop.
        module: the model that is trained.
        ranks: rank and world size of this process.
        rebuilding: puts another engine in the place of one that ran out of memory.
        micro_batch: samples per rank in one forward pass, to begin with.
        accumulation: micro-batches per step, to begin with.
        timeout_seconds: time limit of collectives.

    Raises:
        TrainingError: one sample does not fit, or memory ran out outside of forward and backward.
    """
    run = loop.run
    loop.engine.buffers.keep_copies()
    while True:
        recovery = ProcessGroupRecovery(ranks, timeout_seconds=timeout_seconds)
        loop.passes.vote = recovery.wait_for_all
        error = _ran_out(run, loop, recovery)
        if not error:
            recovery.close()
            return
        captured = _abort(loop, module, rebuilding, recovery)
        fitting = smaller(micro_batch, accumulation)
        if fitting is None:
            raise TrainingError(
                Problem(
                    "memory ran out with a micro-batch of one sample",
                    error,
                    "shorten the samples, set gradient_checkpointing, a higher zero_stage or "
                    "offload (dstrain plan shows what each needs)",
                )
            )
        if ranks.is_main:
            logger.warning(
                "memory ran out at step %d with a micro-batch of %d: going on with %d, and %d of "
                "them per step",
                loop.progress.step + 1,
                micro_batch,
                *fitting,
            )
        micro_batch, accumulation = fitting
        engine, loader = rebuilding.build(micro_batch, accumulation)
        inherit_split(loader, loop.loader)
        engine.state.restore(captured)
        engine.buffers.keep_copies()
        loop.change(engine, loader, accumulation=accumulation)
        run = loop.go_on


def _ran_out(run: Callable[[], None], loop: TrainLoop, recovery: ProcessGroupRecovery) -> str:
    """Run the loop; return the error where memory ran out on any rank, "" where it did not."""
    try:
        run()
    except Exception as error:
        here = is_out_of_memory(error)
        if not loop.passes.computing:
            raise
        if here:
            recovery.report_out_of_memory()
        elif not recovery.another_rank_ran_out():
            raise
        # The frames hold what did not fit.
        traceback.clear_frames(error.__traceback__)
        return str(error).splitlines()[0] if here else "another rank ran out of memory"
    return ""


def _abort(
    loop: TrainLoop, module: torch.nn.Module, rebuilding: Rebuilding, recovery: ProcessGroupRecovery
) -> CapturedState:
    """Tear the engine and the process groups down, form new groups; return the engine's state."""
    loop.engine.buffers.restore_copies()
    captured = loop.engine.state.capture()
    rebuilding.pause()
    recovery.abort()
    recovery.rebuild(module)
    rebuilding.release()
    loop.preemption.renew()
    require_equal("the number of optimizer steps done", loop.progress.step, TrainingError)
    return captured
