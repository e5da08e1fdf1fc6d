"""Job of the sequence-to-sequence task: evaluate, train, evaluate, save, show predictions."""

from __future__ import annotations

import functools
import textwrap
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from dstrain.arguments import Seq2SeqTrainingArguments
from dstrain.core.errors import ConfigError, DataError, Problem, collected, raise_errors
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, require_equal
from dstrain.models import build_seq2seq, count_seq2seq, load_seq2seq, parse_model_config
from dstrain.tasks.common.cache import fingerprint_tokenizer, main_caches_first
from dstrain.tasks.common.job import (
    Architecture,
    known_of,
    make_model,
    refuse_evaluation,
    saved_config,
    start_errors,
    train_and_report,
)
from dstrain.tasks.common.tokenizer import prepare_tokenizer
from dstrain.tasks.seq2seq.arguments import DEFAULT_MODEL, DataArguments, ModelArguments
from dstrain.tasks.seq2seq.metrics import GenerationMetrics
from dstrain.tasks.seq2seq.prepare import EncodedPairs, check_tokenizer, prepare
from dstrain.tasks.seq2seq.sources import Pairs, load_pairs
from dstrain.tasks.seq2seq.trainer import PairsTrainer
from dstrain.trainer.build import start_run
from dstrain.trainer.generation_config import changing

logger = get_logger(__name__)

SHOWN_CHARACTERS = 200
"""Most characters of a source in the samples that are printed at the end."""
SEQ2SEQ = Architecture(count_seq2seq, load_seq2seq, build_seq2seq)


def run(
    args: Seq2SeqTrainingArguments, model_args: ModelArguments, data_args: DataArguments
) -> int:
    """Train, evaluate and save a sequence-to-sequence model.

    Returns:
        The exit status.

    Raises:
        DstrainError: the user must change something; the same error on all ranks.
    """
    ranks = start_run(args)
    # Arguments are checked before data is read or a model is built, which take long.
    with all_or_none():
        _check(args, model_args, data_args, ranks)
    pairs, tokenizer, encoded = _prepare_data(data_args, model_args, ranks)
    if encoded.validation is None:
        refuse_evaluation(args, "the training data is too small to hold a part of it out")
    logger.info("data: %s", pairs.description)
    name = model_args.model_name_or_path
    model = make_model(
        args,
        SEQ2SEQ,
        name=name,
        ignore_missing=model_args.ignore_missing_keys,
        config=saved_config(name) if name else _fresh_config(model_args, data_args, tokenizer),
        tokenizer=tokenizer,
        sequence_length=_sequence_length(data_args),
        ranks=ranks,
    )
    # Saved with the model: otherwise transformers' default of 20 tokens would cut its texts.
    with changing(model.generation_config):
        model.generation_config.max_length = data_args.max_target_length + 1  # and the start token
    trainer = PairsTrainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        train_dataset=encoded.train,
        eval_dataset=encoded.validation,
        processing_class=tokenizer,
        compute_metrics=GenerationMetrics(tokenizer) if args.predict_with_generate else None,
        sequence_length=_sequence_length(data_args),
    )
    count = model_args.num_samples_shown if encoded.validation_pairs is not None else 0
    return train_and_report(
        trainer,
        figures=("loss", "rouge_l", "exact_match", "generated_length"),
        show=(lambda: _samples(trainer, encoded, count)) if count else None,
    )


def _check(
    args: Seq2SeqTrainingArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    ranks: Ranks,
) -> None:
    """Check all that needs neither data nor a model; raise one error with all problems."""
    errors = start_errors(args, data_args, ranks)
    with collected(errors):
        name = model_args.model_name_or_path
        config = saved_config(name) if name else _fresh_config(model_args, data_args)
        _check_kind(config, model_args)
        _check_lengths(config, data_args)
    raise_errors(errors)


def _check_kind(config: Any, model_args: ModelArguments) -> None:
    """Refuse a model without encoder and decoder."""
    if not getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            Problem(
                f"{model_args.model_name_or_path or model_args.model_config} is a "
                f"{config.model_type}, which has no encoder and decoder",
                "a sequence-to-sequence model reads the source whole and then writes the target",
                "give a T5, BART, ...; `dstrain train causal-lm --data_format chat` trains other "
                "models on prompts and answers",
            )
        )


def _check_lengths(config: Any, data_args: DataArguments) -> None:
    """Refuse lengths above the model's number of positions.

    Models with relative positions, such as T5, have no limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    lengths = {n: getattr(data_args, n) for n in ("max_source_length", "max_target_length")}
    problems = [
        Problem(
            f"{name}={length}",
            f"the model takes sequences of at most {limit} tokens (by its config)",
            f"set --{name} {limit} or less",
        )
        for name, length in lengths.items()
        if isinstance(limit, int) and length > limit
    ]
    if problems:
        raise ConfigError(problems)


def _fresh_config(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: Any = None
) -> Any:
    """Make the config of a model to train from scratch, from a file or a short form.

    Keys that a short form leaves out are completed: positions for the longest text, and vocabulary
    size and special tokens of the tokenizer. Without a tokenizer these are transformers' defaults.
    """
    spec = model_args.model_config or DEFAULT_MODEL
    longest = max(data_args.max_source_length, data_args.max_target_length)
    defaults: dict[str, Any] = {"max_position_embeddings": max(1024, longest)}
    if tokenizer is not None:
        defaults |= known_of(tokenizer) | {
            "decoder_start_token_id": tokenizer.pad_token_id,
            "forced_eos_token_id": tokenizer.eos_token_id,  # BART's
        }
    config = parse_model_config(spec, **defaults)
    # T5's config does not know this key by itself, but its model needs it.
    if tokenizer is not None and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = tokenizer.pad_token_id
    return config


def _prepare_data(
    data_args: DataArguments, model_args: ModelArguments, ranks: Ranks
) -> tuple[Pairs, Any, EncodedPairs]:
    """Prepare pairs, tokenizer and samples; one rank per machine does it, other ranks load."""
    first = functools.partial(main_caches_first, ranks)
    pairs = load_pairs(data_args, main_first=first)
    tokenizer = prepare_tokenizer(
        pairs.train,
        name=data_args.tokenizer_name or model_args.model_name_or_path,
        vocab_size=data_args.vocab_size,
        fingerprint=pairs.train_fingerprint,
        text_of=lambda row: f"{row['source']}\n{row['target']}",
        adds_eos=True,
        main_first=first,
    )
    check_tokenizer(tokenizer)
    encoded = prepare(pairs, tokenizer, data_args, main_first=first)
    parts = (encoded.train, encoded.validation)
    sizes = [len(part) if isinstance(part, Dataset) else None for part in parts]
    require_equal("the prepared data", (fingerprint_tokenizer(tokenizer), *sizes), DataError)
    return pairs, tokenizer, encoded


def _sequence_length(data_args: DataArguments) -> int:
    """Return the tokens of the longest sample: those of encoder and decoder, for activations."""
    return data_args.max_source_length + data_args.max_target_length


def _samples(trainer: PairsTrainer, encoded: EncodedPairs, count: int) -> str:
    """Return sources, predictions and references of validation samples as text to print.

    Samples are taken at equal distances, or from a stream the first ones. All ranks must call it,
    as at ZeRO stage 3, and generate the same tokens, so that none is drawn at random.
    """
    samples, pairs = encoded.validation, encoded.validation_pairs
    assert samples is not None
    assert pairs is not None
    if isinstance(samples, Dataset):
        total = len(samples)
        indices = sorted({index * total // count for index in range(min(count, total))})
        samples, pairs = samples.select(indices), pairs.select(indices)
    else:
        indices = list(range(count))
    model: Any = trainer.model
    model.eval()
    batch = trainer.data_collator(list(islice(samples, count)))
    device = next(model.parameters()).device
    args: Any = trainer.args
    options: dict[str, Any] = {"do_sample": False, "num_beams": args.generation_num_beams or 1}
    if args.generation_max_length is not None:
        options["max_length"] = args.generation_max_length
    with torch.no_grad():
        ids = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            **options,
        )
    predictions = GenerationMetrics(trainer.processing_class).decode(ids.cpu().numpy())
    parts = []
    for index, pair, prediction in zip(indices, pairs, predictions, strict=False):
        source = textwrap.indent(textwrap.shorten(pair["source"], SHOWN_CHARACTERS), "  ")
        parts.append(
            f"sample {index}\n{source}\n"
            f"  prediction: {prediction.strip()}\n  reference:  {pair['target'].strip()}"
        )
    return "\n\n".join(parts)
