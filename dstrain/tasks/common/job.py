"""Order of a job, the same for every task: check, build, evaluate, train, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import check_resumable, held_lock
from dstrain.core.errors import ConfigError, DataError, DstrainError, Problem, collected
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, barrier
from dstrain.core.seeds import seed_everything
from dstrain.core.stop import INCOMPLETE
from dstrain.engine import full_numel
from dstrain.models import check_model_folder, check_writable, library_errors
from dstrain.tasks.common.arguments import SourceArguments
from dstrain.trainer import Trainer
from dstrain.trainer.build import resolve_config
from dstrain.trainer.checkpointing import missing_text

logger = get_logger(__name__)


@dataclass(frozen=True)
class Architecture:
    """Functions that count, load and build the models of a task.

    Attributes:
        count: of a config, the sizes of the model that it makes.
        load: (folder or name, resolved config, ignore_missing=...) -> the model.
        build: (config, resolved config) -> a new model.
    """

    count: Callable[[Any], Any]
    load: Callable[..., torch.nn.Module]
    build: Callable[[Any, Any], torch.nn.Module]


def start_errors(
    args: TrainingArguments, data_args: SourceArguments, ranks: Ranks
) -> list[DstrainError]:
    """Find the errors that show without data and model; a task adds its own."""
    errors: list[DstrainError] = []
    with collected(errors):
        if ranks.is_main:
            check_writable(args.output_dir)
    with collected(errors):
        if ranks.is_main:
            check_resumable(args.resume_from_checkpoint, Path(args.output_dir))
    with collected(errors):
        resolve_config(args, ranks)
    with collected(errors):
        named = data_args.validation_file or data_args.validation_split
        if data_args.validation_percentage == 0 and not named:
            refuse_evaluation(args, "validation_percentage is 0, and no validation data is named")
    with collected(errors):
        if data_args.streaming and args.max_steps <= 0:
            raise ConfigError(
                Problem(
                    "streaming=True without max_steps",
                    "the length of a stream is not known, and the learning-rate schedule needs the "
                    "number of steps",
                    "set --max_steps",
                )
            )
    return errors


def refuse_evaluation(args: TrainingArguments, why: str) -> None:
    """Raise where the arguments ask for evaluations that have no data."""
    asked = [
        *([f"eval_strategy={args.eval_strategy!r}"] if args.eval_strategy != "no" else []),
        *(["eval_on_start=True"] if args.eval_on_start else []),
    ]
    if asked:
        raise DataError(
            Problem(
                f"{' and '.join(asked)}, but there is no evaluation data",
                why,
                "give --validation_file, or do not ask for evaluations while training",
            )
        )


def saved_config(name: str) -> Any:
    """Load the config of a model folder, which must hold weights, or of a model of the Hub.

    Raises:
        ModelError: a folder that is no model, or a config that transformers cannot read.
    """
    from transformers import AutoConfig

    check_model_folder(name)
    with library_errors(
        f"model_name_or_path={name!r} cannot be read",
        "check the name: a folder written by save_pretrained, or a model of the Hub",
    ):
        return AutoConfig.from_pretrained(name)


def known_of(tokenizer: Any) -> dict[str, Any]:
    """Return the config values of a new model that its tokenizer decides."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_model(
    args: TrainingArguments,
    architecture: Architecture,
    *,
    name: str | None,
    ignore_missing: bool,
    config: Any,
    tokenizer: Any,
    sequence_length: int,
    ranks: Ranks,
) -> Any:
    """Make the model, partitioned while it is built where the config is one of stage 3.

    DeepSpeed's config must be final by then, so it is resolved with the sizes of the model that is
    to be.

    Args:
        args: of training.
        architecture: how to make it.
        name: of a model to load; None builds a new one.
        ignore_missing: begin with random weights where it lacks some.
        config: of the model.
        tokenizer: that it is used with.
        sequence_length: tokens of its longest sample.
        ranks: facts of this process.

    Raises:
        ConfigError: the tokenizer has ids beyond the model's embedding.
    """
    _check_vocabulary(config, tokenizer)
    sizes = architecture.count(config)
    resolved = resolve_config(args, ranks, sizes=sizes, sequence_length=sequence_length)
    seed_everything(args.seed)
    if name:
        model = architecture.load(name, resolved, ignore_missing=ignore_missing)
    else:
        model = architecture.build(config, resolved)
    logger.info(
        "model: %s, %s parameters",
        type(model).__name__,
        f"{sum(full_numel(p) for p in model.parameters()):,}",
    )
    return model


def _check_vocabulary(config: Any, tokenizer: Any) -> None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        raise ConfigError(
            Problem(
                f"the tokenizer has {len(tokenizer)} tokens",
                f"the model's embedding has {size} rows",
                f"set vocab_size of the model to {len(tokenizer)}, or use the model's tokenizer",
            )
        )


def train_and_report(
    trainer: Trainer, *, figures: Sequence[str], show: Callable[[], str] | None = None
) -> int:
    """Evaluate, train, evaluate again; save the model and the records; print the results.

    No other run may write into the output folder meanwhile.

    Args:
        trainer: ready to train; it evaluates where it has an ``eval_dataset``.
        figures: metrics, without their prefix, of the printed comparison.
        show: text to print at the end, made by all ranks together.

    Returns:
        The exit status: 0, or ``INCOMPLETE`` where the last checkpoint could not be written.

    Raises:
        CheckpointError: another run writes into the output folder.
    """
    with held_lock(trainer.output_lock, takes=trainer.args.should_save):
        _train_and_report(trainer, figures, show)
    if not trainer.last_save_failed:
        return 0
    barrier()  # the launcher ends all ranks once one has ended with another status than 0
    return INCOMPLETE


def _train_and_report(
    trainer: Trainer, figures: Sequence[str], show: Callable[[], str] | None
) -> None:
    before: dict[str, float] = {}
    evaluates = trainer.eval_dataset is not None
    if evaluates:
        before = trainer.evaluate(metric_key_prefix="eval_before")
    output = trainer.train()
    trainer.log_metrics("train", output.metrics)
    trainer.save_model()  # first of all: nothing that fails must cost the model
    trainer.save_metrics("train", output.metrics)
    if evaluates:
        after = _final_evaluation(trainer)
        results = {k: v for k, v in before.items() if k != "epoch"} | after
        trainer.save_metrics("eval", results)
        if trainer.ranks.is_main:
            print(_comparison(before, after, figures), flush=True)
    trainer.save_state()
    shown = show() if show is not None else ""
    if trainer.ranks.is_main:
        if shown:
            print(f"\n{shown}\n")
        folder = Path(trainer.args.output_dir)
        print(f"model, metrics and loss_curve.png are in {folder}", flush=True)
        missing, last_failed = trainer.missing_checkpoints, trainer.last_save_failed
        if missing:
            print(missing_text(missing, last_failed=last_failed), flush=True)


def _final_evaluation(trainer: Trainer) -> dict[str, float]:
    """Return the evaluation of the last step if the run made one there, else a new one."""
    last = trainer.state.log_history[-2:]
    for entry in last:
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return {k: v for k, v in entry.items() if k != "step"}
    return trainer.evaluate()


def _comparison(before: dict[str, float], after: dict[str, float], figures: Sequence[str]) -> str:
    """Format a small table of the evaluations before and after training."""
    lines = [f"\n{'evaluation':<16}{'before':>12}{'after':>12}"]
    for name in figures:
        if f"eval_{name}" in after:
            old, new = before[f"eval_before_{name}"], after[f"eval_{name}"]
            lines.append(f"{name.replace('_', ' '):<16}{old:>12.4f}{new:>12.4f}")
    return "\n".join(lines)
