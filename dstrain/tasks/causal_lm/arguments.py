"""Arguments of the causal language model task: the model, the text, how it is packed."""

from __future__ import annotations

from dataclasses import dataclass, field

from dstrain.core.errors import Problem
from dstrain.tasks.common.arguments import SourceArguments, StartArguments, too_small

DEFAULT_MODEL = (
    "llama:hidden_size=256,intermediate_size=688,num_hidden_layers=4,num_attention_heads=4,"
    "num_key_value_heads=4,tie_word_embeddings=true"
)
"""A model small enough to learn something in minutes on two CPU cores (4 million parameters)."""


@dataclass
class ModelArguments(StartArguments):
    """What to show of the model at the end."""

    model_config: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch: a config.json, or a short form such as "
            "llama:hidden_size=256,num_hidden_layers=4. Default: a llama of 4 million parameters."
        },
    )
    completion_prompt: str = field(
        default="def __init__(self,",
        metadata={"help": "Text that the trained model completes at the end; empty for none."},
    )
    completion_tokens: int = field(
        default=48,
        metadata={
            "help": "Tokens of that completion, chosen greedily without repeating four of them."
        },
    )


@dataclass
class DataArguments(SourceArguments):
    """How text is read and cut into samples.

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
    text_column: str = field(
        default="text",
        metadata={"help": "Column of jsonl, csv, parquet and dataset rows with the text."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read, tokenise and pack the training text while training, with nothing "
            "written to disk. Rows held out for validation are then the first 1,000 documents."
        },
    )
    block_size: int = field(
        default=512,
        metadata={"help": "Tokens per sample: documents are joined and cut into such blocks."},
    )

    def _problems(self) -> list[Problem]:
        minimums = {"block_size": (2, "a block needs a token to read and one to predict")}
        return [*super()._problems(), *too_small(self, minimums)]
