"""Job of the causal language model task: evaluate, train, evaluate, save, complete a text."""

from __future__ import annotations

from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError, Problem, collected, raise_errors
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none
from dstrain.data import forward_columns
from dstrain.models import (
    build_causal_lm,
    count_causal_lm,
    load_causal_lm,
    max_length,
    parse_model_config,
)
from dstrain.tasks.causal_lm.arguments import (
    DEFAULT_MODEL,
    DEFAULT_PROMPT,
    DataArguments,
    ModelArguments,
)
from dstrain.tasks.causal_lm.chat import ChatEncoder
from dstrain.tasks.causal_lm.conversations import messages_of
from dstrain.tasks.causal_lm.data import PreparedData, prepare_data
from dstrain.tasks.causal_lm.trainer import CausalLMTrainer
from dstrain.tasks.common.job import (
    Architecture,
    known_of,
    make_model,
    refuse_evaluation,
    saved_config,
    start_errors,
    train_and_report,
)
from dstrain.trainer.build import start_run
from dstrain.trainer.processing import stop_at

logger = get_logger(__name__)

CAUSAL_LM = Architecture(count_causal_lm, load_causal_lm, build_causal_lm)


def run(args: TrainingArguments, model_args: ModelArguments, data_args: DataArguments) -> int:
    """Train, evaluate and save a causal language model.

    Returns:
        The exit status.

    Raises:
        DstrainError: the user must change something; the same error on all ranks.
    """
    ranks = start_run(args)
    # Arguments are checked before data is read or a model is built, which take long.
    with all_or_none():
        _check(args, model_args, data_args, ranks)
    data = prepare_data(data_args, model_args.model_name_or_path, ranks)
    if data.validation is None:
        refuse_evaluation(args, "the training text is too short to hold a part of it out")
    logger.info("data: %s", data.description)
    name = model_args.model_name_or_path
    model = make_model(
        args,
        CAUSAL_LM,
        name=name,
        ignore_missing=model_args.ignore_missing_keys,
        config=saved_config(name) if name else _fresh_config(model_args, data_args, data.tokenizer),
        tokenizer=data.tokenizer,
        sequence_length=data_args.block_size,
        ranks=ranks,
    )
    if data_args.packing:
        _check_packing(model)
    trainer = CausalLMTrainer(
        model,
        args,
        data_collator=data.collate,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        tokens_per_byte=data.tokens_per_byte,
        sequence_length=data_args.block_size,
    )
    if data_args.packing:
        trainer.refuse_mixing()
    if data_args.is_chat:
        _stop_at_answers(model, data)
    return train_and_report(
        trainer,
        figures=("loss", "perplexity", "bits_per_byte"),
        show=lambda: _shown(trainer, data, model_args),
    )


def _check(
    args: TrainingArguments, model_args: ModelArguments, data_args: DataArguments, ranks: Ranks
) -> None:
    """Check all that needs neither data nor a model; raise one error with all problems."""
    errors = start_errors(args, data_args, ranks)
    with collected(errors):
        name = model_args.model_name_or_path
        config = saved_config(name) if name else _fresh_config(model_args, data_args)
        _check_block_size(data_args, config)
    raise_errors(errors)


def _fresh_config(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: Any = None
) -> Any:
    """Make the config of a model to train from scratch, from a file or a short form.

    Keys that a short form leaves out are completed: positions for ``block_size``, and vocabulary
    size and special tokens of the tokenizer. Without a tokenizer these are transformers' defaults.
    """
    spec = model_args.model_config or DEFAULT_MODEL
    defaults: dict[str, Any] = {"max_position_embeddings": max(2048, data_args.block_size)}
    if tokenizer is not None:
        defaults |= known_of(tokenizer)
    return parse_model_config(spec, **defaults)


def _check_block_size(data_args: DataArguments, config: Any) -> None:
    """Refuse blocks that are longer than the sequences of the model."""
    limit = None if config is None else max_length(config)
    if limit is not None and data_args.block_size > limit:
        raise ConfigError(
            Problem(
                f"block_size={data_args.block_size}",
                f"the model takes sequences of at most {limit} tokens (by its config)",
                f"set --block_size {limit} or less",
            )
        )


def _check_packing(model: Any) -> None:
    """Refuse to pack conversations for a model that does not take ``position_ids``.

    Without them the model cannot tell where a conversation begins.

    Raises:
        ConfigError: the model's ``forward`` takes no ``position_ids``.
    """
    if "position_ids" not in (forward_columns(model) or []):
        raise ConfigError(
            Problem(
                f"packing=True with {type(model).__name__}",
                "packed conversations are kept apart by position_ids, and this model takes none",
                "drop --packing",
            )
        )


def _stop_at_answers(model: Any, data: PreparedData) -> None:
    """Let generation stop at the token by which the chat template ends an answer, besides EOS."""
    token = ChatEncoder(data.tokenizer).end_of_answer()
    if token is not None and stop_at(model, token):
        text = data.tokenizer.decode([token])
        logger.info("generation stops at %s (%d) too, which ends an answer", text, token)


def _shown(trainer: CausalLMTrainer, data: PreparedData, model_args: ModelArguments) -> str:
    """Return the text to print at the end: a completion, or an answer of the trained model.

    It is empty if the prompt is, or if there is no held-out conversation to answer.
    """
    prompt, length = model_args.completion_prompt, model_args.completion_tokens
    if prompt == "":
        return ""
    if data.conversations is None:
        prompt = prompt or DEFAULT_PROMPT
        ids = data.tokenizer(prompt)["input_ids"]
        text = data.tokenizer.decode(
            [*ids, *_generate(trainer, ids, length)], skip_special_tokens=True
        )
        return f"completion of {prompt!r}:\n{str(text).rstrip()}"
    if prompt:
        messages, reference = [{"role": "user", "content": prompt}], ""
    elif not data.conversations:
        return ""
    else:
        messages = messages_of(data.conversations[0])
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages, reference = messages[:last], messages[last]["content"]
    asked = ChatEncoder(data.tokenizer).question(messages)
    text = data.tokenizer.decode(_generate(trainer, asked, length), skip_special_tokens=True)
    lines = [f"  {message['role']}: {message['content'].strip()}" for message in messages]
    lines.append(f"  answer of the model: {str(text).strip()}")
    if reference:
        lines.append(f"  answer in the data:  {reference.strip()}")
    return "\n".join(["a conversation:", *lines])


def _generate(trainer: CausalLMTrainer, prompt: list[int], length: int) -> list[int]:
    """Generate a greedy continuation of a prompt; all ranks must call it, as at ZeRO stage 3."""
    model: Any = trainer.model
    model.eval()
    limit = max_length(model.config)
    if limit is not None:
        prompt = prompt[-max(1, limit - length) :]
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            no_repeat_ngram_size=4,  # a small model would repeat itself for ever
        )
    continuation: list[int] = tokens[0, len(prompt) :].tolist()
    return continuation
