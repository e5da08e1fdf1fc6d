"""Steps of a job, the same for every task: check, build, evaluate, train, evaluate, save."""

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
        count: config of a model -> sizes of the model that is built from it.
        load: (folder or name, resolved config, ignore_missing=...) -> loaded model.
        build: (config, resolved config) -> new model with random weights.
    """

    count: Callable[[Any], Any]
    load: Callable[..., torch.nn.Module]
    build: Callable[[Any, Any], torch.nn.Module]


def start_errors(
    args: TrainingArguments, data_args: SourceArguments, ranks: Ranks
) -> list[DstrainError]:
    """List the errors that can be found without data and model; a task adds those of its kind."""
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
    """Refuse arguments that ask for evaluations when there is no evaluation data.

    Raises:
        DataError: evaluations are asked for.
    """
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
    """Load the config of a folder with a model and its weights, or of a model of the Hub.

    Raises:
        ModelError: the folder holds no model, or transformers cannot read the config.
    """
    from transformers import AutoConfig

    check_model_folder(name)
    with library_errors(
        f"model_name_or_path={name!r} cannot be read",
        "check the name: a folder written by save_pretrained, or a model of the Hub",
    ):
        return AutoConfig.from_pretrained(name)


def known_of(tokenizer: Any) -> dict[str, Any]:
    """Return the values that a new model's config takes from the tokenizer."""
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
    """Load or build the model; at stage 3 its weights are partitioned while it is built.

    Partitioning needs the final DeepSpeed config, so that is resolved first, with the sizes that
    ``architecture`` counts from the model's config.

    Args:
        args: training arguments.
        architecture: functions that count, load and build models of the task.
        name: folder or hub name of the model to load; None builds a new one.
        ignore_missing: give weights that the loaded model lacks random values.
        config: config of the model.
        tokenizer: tokenizer of the samples.
        sequence_length: tokens of the longest sample.
        ranks: ranks of this run.

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
    """Refuse a tokenizer with more tokens than the embedding of the model has rows."""
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

    The output folder is locked meanwhile, so that no other run writes into it.

    Args:
        trainer: a trainer that is ready to train; with an ``eval_dataset`` it also evaluates.
        figures: names, without their prefix, of the metrics in the printed comparison.
        show: function that all ranks call at the end, and whose text is printed.

    Returns:
        the exit status: 0, or ``INCOMPLETE`` if the last checkpoint could not be written.

    Raises:
        CheckpointError: another run writes into the output folder.
    """
    with held_lock(trainer.output_lock, takes=trainer.args.should_save):
        _train_and_report(trainer, figures, show)
    if not trainer.last_save_failed:
        return 0
    barrier()  # the launcher ends all ranks when one ends with a status other than 0
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
    trainer.save_model()  # first of all: no later failure may lose the model
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
    """Return the evaluation that the run made after its last step; evaluate now if it made none."""
    last = trainer.state.log_history[-2:]
    for entry in last:
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return {k: v for k, v in entry.items() if k != "step"}
    return trainer.evaluate()


def _comparison(before: dict[str, float], after: dict[str, float], figures: Sequence[str]) -> str:
    """Format a table that compares the evaluations before and after training."""
    lines = [f"\n{'evaluation':<16}{'before':>12}{'after':>12}"]
    for name in figures:
        if f"eval_{name}" in after:
            old, new = before[f"eval_before_{name}"], after[f"eval_{name}"]
            lines.append(f"{name.replace('_', ' '):<16}{old:>12.4f}{new:>12.4f}")
    return "\n".join(lines)
