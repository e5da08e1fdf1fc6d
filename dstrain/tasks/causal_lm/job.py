"""The main job: data, tokenizer, model; evaluate, train, evaluate, save, complete a line."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import check_there
from dstrain.core.errors import (
    ConfigError,
    DataError,
    DstrainError,
    Problem,
    collected,
    raise_errors,
)
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, main_first, require_equal
from dstrain.core.seeds import seed_everything
from dstrain.engine import full_numel
from dstrain.models import (
    build_causal_lm,
    check_model_folder,
    check_writable,
    count_causal_lm,
    load_causal_lm,
    max_length,
    parse_model_config,
)
from dstrain.tasks.causal_lm.arguments import DEFAULT_MODEL, DataArguments, ModelArguments
from dstrain.tasks.causal_lm.cache import fingerprint_tokenizer
from dstrain.tasks.causal_lm.packing import collate_blocks
from dstrain.tasks.causal_lm.prepare import PackedData, prepare
from dstrain.tasks.causal_lm.sources import Documents, load_documents
from dstrain.tasks.causal_lm.tokenizer import prepare_tokenizer
from dstrain.tasks.causal_lm.trainer import CausalLMTrainer
from dstrain.trainer.build import resolve_config, start_run

logger = get_logger(__name__)


def run(args: TrainingArguments, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Train, evaluate and save a causal language model.

    Raises:
        DstrainError: for anything a user can mend; on all ranks alike.
    """
    ranks = start_run(args)
    # Everything that can be wrong is looked at before data is read or a model is built.
    with all_or_none():
        _check(args, model_args, data_args, ranks)
    documents, tokenizer, packed = _prepare_data(data_args, model_args, ranks)
    if packed.validation is None:
        _refuse_evaluation(args, "the training text is too short to hold a part of it out")
    logger.info("data: %s", documents.description)
    model = _build_model(args, model_args, data_args, tokenizer, ranks)
    logger.info(
        "model: %s, %s parameters",
        type(model).__name__,
        f"{sum(full_numel(p) for p in model.parameters()):,}",
    )
    pad = tokenizer.pad_token_id
    trainer = CausalLMTrainer(
        model,
        args,
        data_collator=functools.partial(collate_blocks, pad_token_id=0 if pad is None else pad),
        train_dataset=packed.train,
        eval_dataset=packed.validation,
        processing_class=tokenizer,
        tokens_per_byte=packed.tokens_per_byte,
        sequence_length=data_args.block_size,
    )
    _train_and_report(trainer, model_args)


def _build_model(
    args: TrainingArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    tokenizer: Any,
    ranks: Ranks,
) -> Any:
    """The model, partitioned while it is built where the config is one of stage 3.

    The config must be final by then, so it is resolved with the sizes of the model that is to be.
    """
    name = model_args.model_name_or_path
    config = _saved_config(name) if name else _fresh_config(model_args, data_args, tokenizer)
    _check_vocabulary(config, tokenizer)
    resolved = resolve_config(
        args, ranks, sizes=count_causal_lm(config), sequence_length=data_args.block_size
    )
    seed_everything(args.seed)
    return load_causal_lm(name, resolved) if name else build_causal_lm(config, resolved)


def _train_and_report(trainer: CausalLMTrainer, model_args: ModelArguments) -> None:
    """Evaluate, train, evaluate again; save the model and the records; show a completion."""
    before: dict[str, float] = {}
    evaluates = trainer.eval_dataset is not None
    if evaluates:
        before = trainer.evaluate(metric_key_prefix="eval_before")
    output = trainer.train()
    trainer.log_metrics("train", output.metrics)
    trainer.save_metrics("train", output.metrics)
    trainer.save_model()  # first of all: an evaluation that fails must not cost the model
    if evaluates:
        after = _final_evaluation(trainer)
        results = {k: v for k, v in before.items() if k != "epoch"} | after
        trainer.save_metrics("eval", results)
        if trainer.ranks.is_main:
            print(_comparison(before, after), flush=True)
    trainer.save_state()
    completion = _complete(trainer, model_args) if model_args.completion_prompt else ""
    if trainer.ranks.is_main:
        if completion:
            print(f"\ncompletion of {model_args.completion_prompt!r}:\n{completion}\n")
        folder = Path(trainer.args.output_dir)
        print(f"model, metrics and loss_curve.png are in {folder}", flush=True)


def _final_evaluation(trainer: CausalLMTrainer) -> dict[str, float]:
    """The evaluation of the last step if the run made one there, else a new one."""
    last = trainer.state.log_history[-2:]
    for entry in last:
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return {k: v for k, v in entry.items() if k != "step"}
    return trainer.evaluate()


def _prepare_data(
    data_args: DataArguments, model_args: ModelArguments, ranks: Ranks
) -> tuple[Documents, Any, PackedData]:
    """Documents, tokenizer and blocks; one rank per machine prepares, the others load."""
    first = functools.partial(main_first, ranks)
    documents = load_documents(data_args, main_first=first)
    tokenizer = prepare_tokenizer(
        documents, data_args, model_name=model_args.model_name_or_path, main_first=first
    )
    packed = prepare(documents, tokenizer, data_args, ranks=ranks, main_first=first)
    sizes = [len(part) if hasattr(part, "__len__") else None for part in _parts(packed)]
    require_equal("the prepared data", (fingerprint_tokenizer(tokenizer), *sizes), DataError)
    return documents, tokenizer, packed


def _parts(packed: PackedData) -> list[Any]:
    return [packed.train, packed.validation]


def _check(
    args: TrainingArguments, model_args: ModelArguments, data_args: DataArguments, ranks: Ranks
) -> None:
    """Look at everything that needs neither data nor a model; all that is wrong is one error."""
    errors: list[DstrainError] = []
    with collected(errors):
        if ranks.is_main:
            check_writable(args.output_dir)
    with collected(errors):
        if ranks.is_main:
            check_there(args.resume_from_checkpoint, Path(args.output_dir))
    with collected(errors):
        resolve_config(args, ranks)
    with collected(errors):
        named = data_args.validation_file or data_args.validation_split
        if data_args.validation_percentage == 0 and not named:
            _refuse_evaluation(args, "validation_percentage is 0, and no validation data is named")
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
    with collected(errors):
        if model_args.model_name_or_path is None:
            config = _fresh_config(model_args, data_args)
        else:
            check_model_folder(model_args.model_name_or_path)
            config = _saved_config(model_args.model_name_or_path)
        _check_block_size(data_args, config)
    raise_errors(errors)


def _refuse_evaluation(args: TrainingArguments, why: str) -> None:
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


def _saved_config(name: str) -> Any:
    """The config of a model folder or of a model of the Hub."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem(
                f"model_name_or_path={name!r} cannot be read",
                str(error).strip(),
                "check the name: a folder written by save_pretrained, or a model of the Hub",
            )
        ) from error


def _fresh_config(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: Any = None
) -> Any:
    """The config of a model to train from scratch; a short form is completed with what is known.

    Without a tokenizer, before there is one, its sizes and ids are those of transformers.
    """
    spec = model_args.model_config or DEFAULT_MODEL
    defaults: dict[str, Any] = {"max_position_embeddings": max(2048, data_args.block_size)}
    if tokenizer is not None:
        defaults |= {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    return parse_model_config(spec, **defaults)


def _check_block_size(data_args: DataArguments, config: Any) -> None:
    limit = None if config is None else max_length(config)
    if limit is not None and data_args.block_size > limit:
        raise ConfigError(
            Problem(
                f"block_size={data_args.block_size}",
                f"the model takes sequences of at most {limit} tokens (by its config)",
                f"set --block_size {limit} or less",
            )
        )


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


def _comparison(before: dict[str, float], after: dict[str, float]) -> str:
    """A small table of evaluation before and after training."""
    lines = [f"\n{'evaluation':<16}{'before':>12}{'after':>12}"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        if f"eval_{name}" in after:
            old, new = before[f"eval_before_{name}"], after[f"eval_{name}"]
            lines.append(f"{name.replace('_', ' '):<16}{old:>12.4f}{new:>12.4f}")
    return "\n".join(lines)


def _complete(trainer: CausalLMTrainer, model_args: ModelArguments) -> str:
    """The prompt and its greedy continuation; all ranks generate together, as ZeRO-3 needs."""
    model: Any = trainer.model
    tokenizer = trainer.processing_class
    model.eval()
    device = next(model.parameters()).device
    prompt = tokenizer(model_args.completion_prompt, return_tensors="pt").to(device)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=model_args.completion_tokens,
            do_sample=False,
            no_repeat_ngram_size=4,  # a small model would repeat itself for ever
        )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)).rstrip()
