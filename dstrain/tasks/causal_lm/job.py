"""The main job: data, tokenizer, model; evaluate, train, evaluate, save, complete a line."""

from __future__ import annotations

import functools
from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError, DataError, Problem, collected, raise_errors
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, main_first, require_equal
from dstrain.core.seeds import seed_everything
from dstrain.engine import full_numel
from dstrain.models import (
    build_causal_lm,
    count_causal_lm,
    load_causal_lm,
    max_length,
    parse_model_config,
)
from dstrain.tasks.causal_lm.arguments import DEFAULT_MODEL, DataArguments, ModelArguments
from dstrain.tasks.causal_lm.packing import collate_blocks
from dstrain.tasks.causal_lm.prepare import PackedData, prepare
from dstrain.tasks.causal_lm.sources import Documents, load_documents
from dstrain.tasks.causal_lm.trainer import CausalLMTrainer
from dstrain.tasks.common.cache import fingerprint_tokenizer
from dstrain.tasks.common.job import (
    check_vocabulary,
    refuse_evaluation,
    saved_config,
    start_errors,
    train_and_report,
)
from dstrain.tasks.common.tokenizer import prepare_tokenizer
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
        refuse_evaluation(args, "the training text is too short to hold a part of it out")
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
    prompt = model_args.completion_prompt
    train_and_report(
        trainer,
        figures=("loss", "perplexity", "bits_per_byte"),
        show=(lambda: _completion(trainer, model_args)) if prompt else None,
    )


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
    config = saved_config(name) if name else _fresh_config(model_args, data_args, tokenizer)
    check_vocabulary(config, tokenizer)
    resolved = resolve_config(
        args, ranks, sizes=count_causal_lm(config), sequence_length=data_args.block_size
    )
    seed_everything(args.seed)
    return load_causal_lm(name, resolved) if name else build_causal_lm(config, resolved)


def _prepare_data(
    data_args: DataArguments, model_args: ModelArguments, ranks: Ranks
) -> tuple[Documents, Any, PackedData]:
    """Documents, tokenizer and blocks; one rank per machine prepares, the others load."""
    first = functools.partial(main_first, ranks)
    documents = load_documents(data_args, main_first=first)
    tokenizer = prepare_tokenizer(
        documents.train,
        name=data_args.tokenizer_name or model_args.model_name_or_path,
        vocab_size=data_args.vocab_size,
        fingerprint=documents.train_fingerprint,
        text_of=lambda row: str(row["text"]),
        main_first=first,
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
    errors = start_errors(args, data_args, ranks)
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
        name = model_args.model_name_or_path
        config = saved_config(name) if name else _fresh_config(model_args, data_args)
        _check_block_size(data_args, config)
    raise_errors(errors)


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


def _completion(trainer: CausalLMTrainer, model_args: ModelArguments) -> str:
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
    text = str(tokenizer.decode(tokens[0], skip_special_tokens=True)).rstrip()
    return f"completion of {model_args.completion_prompt!r}:\n{text}"
