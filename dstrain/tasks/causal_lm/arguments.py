"""Arguments of the causal language model task: the model, the text, and its packing."""

from __future__ import annotations

from dataclasses import dataclass, field

from dstrain.core.errors import DataError, Problem
from dstrain.core.files import expanded, told_refused
from dstrain.tasks.common.arguments import SourceArguments, StartArguments, too_small

DEFAULT_MODEL = (
    "llama:hidden_size=256,intermediate_size=688,num_hidden_layers=4,num_attention_heads=4,"
    "num_key_value_heads=4,tie_word_embeddings=true"
)
"""A model small enough to learn something in minutes on two CPU cores (4 million parameters)."""
DEFAULT_PROMPT = "def __init__(self,"


@dataclass
class ModelArguments(StartArguments):
    """Model to train, and the completion that is shown at the end."""

    model_config: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch: a config.json, or a short form such as "
            "llama:hidden_size=256,num_hidden_layers=4. Default: a llama of 4 million parameters."
        },
    )
    completion_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Text that the trained model completes at the end, or with chat data what the "
            f"user says; empty for none. Default: {DEFAULT_PROMPT!r}, or with chat data the first "
            "held-out conversation up to its last answer."
        },
    )
    completion_tokens: int = field(
        default=48,
        metadata={
            "help": "Tokens of that completion, chosen greedily without repeating four of them."
        },
    )


@dataclass
class DataArguments(SourceArguments):
    """Text or conversations to read, and the way in which samples are made of them.

    With neither ``train_file`` nor ``dataset_name`` the text is the source code of the standard
    library of the running interpreter, which needs no network.
    """

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training text: a .txt or .md file, .jsonl/.json, .csv or .parquet rows, or a "
            "folder (every UTF-8 text file in it, or its .jsonl or .parquet shards). Default: the "
            "source of the running Python's standard library."
        },
    )
    data_format: str = field(
        default="text",
        metadata={
            "help": "What a row is: text to be continued, or chat, a conversation to be answered "
            "(messages, conversations, or prompt and completion), with the loss on answers only.",
            "choices": ("text", "chat"),
        },
    )
    text_column: str = field(
        default="text",
        metadata={"help": "Column of jsonl, csv, parquet and dataset rows with the text."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "File with the Jinja template that writes conversations; saved with the "
            "tokenizer. Default: the tokenizer's own, or a simple one."
        },
    )
    train_on_answers: str = field(
        default="all",
        metadata={
            "help": "Which answers of a conversation are learned.",
            "choices": ("all", "last"),
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put several conversations into one sample of --block_size tokens, none of "
            "which sees another; else each is a sample of its own, padded to the longest of its "
            "batch. Text is always packed."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read, tokenise and pack the training data while training, with nothing "
            "written to disk. Rows held out for validation are then the first 1,000; a row that is "
            "no conversation is left out with a warning. A run that goes on begins to read at the "
            "shard in which it was: 64 MiB of text or JSON lines, a row group of a parquet file; "
            "other files and named datasets have larger ones."
        },
    )
    block_size: int = field(
        default=512,
        metadata={
            "help": "Tokens per sample: documents are joined and cut into such blocks. A longer "
            "conversation keeps its first tokens, and is left out where no answer is among them."
        },
    )

    @property
    def is_chat(self) -> bool:
        """Tell whether rows are conversations."""
        return self.data_format == "chat"

    def _problems(self) -> list[Problem]:
        minimums = {"block_size": (2, "a block needs a token to read and one to predict")}
        problems = [*super()._problems(), *too_small(self, minimums)]
        return problems + (_chat_problems(self) if self.is_chat else _text_problems(self))


def _text_problems(args: DataArguments) -> list[Problem]:
    given = {
        "chat_template": args.chat_template,
        "train_on_answers": None if args.train_on_answers == "all" else args.train_on_answers,
        "packing": args.packing or None,
    }
    return [
        Problem(
            f"--{name} {value} with --data_format text",
            f"--{name} says how conversations become samples",
            f"add --data_format chat, or drop --{name}",
        )
        for name, value in given.items()
        if value is not None
    ]


@told_refused(DataError)
def _chat_problems(args: DataArguments) -> list[Problem]:
    problems = []
    if args.train_file is None and args.dataset_name is None:
        problems.append(
            Problem(
                "--data_format chat without data",
                "there are no conversations in the standard library",
                "give --train_file or --dataset_name",
            )
        )
    if args.text_column != "text":
        problems.append(
            Problem(
                f"--text_column {args.text_column} with --data_format chat",
                "a conversation is in 'messages', 'conversations', or 'prompt' and 'completion'",
                "drop --text_column, and rename the column",
            )
        )
    if args.chat_template is not None and not expanded(args.chat_template).is_file():
        problems.append(
            Problem(
                f"--chat_template {args.chat_template} is no file",
                f"looked for {expanded(args.chat_template).absolute()}",
                "give a file with a Jinja template",
            )
        )
    return problems
