"""Arguments of the sequence-to-sequence task: the model, the pairs, limits of their lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

from dstrain.core.errors import Problem, raise_problems
from dstrain.tasks.common.arguments import SourceArguments, StartArguments, too_small

DEFAULT_MODEL = (
    "t5:d_model=192,d_kv=32,d_ff=512,num_layers=3,num_heads=6,feed_forward_proj=gated-gelu,"
    "dropout_rate=0.1"
)
"""A model small enough to learn something in minutes on two CPU cores (4 million parameters)."""


@dataclass
class ModelArguments(StartArguments):
    """Model to train, and the predictions that are shown at the end."""

    model_config: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch: a config.json, or a short form such as "
            "t5:d_model=256,num_layers=4. Default: a T5 of 4 million parameters."
        },
    )
    num_samples_shown: int = field(
        default=5,
        metadata={
            "help": "Validation samples printed at the end: source, prediction and reference; 0 "
            "for none."
        },
    )

    def __post_init__(self) -> None:
        """Refuse arguments that name two models, and a negative number of samples."""
        super().__post_init__()
        raise_problems(too_small(self, {"num_samples_shown": (0, "it counts samples")}))


@dataclass
class DataArguments(SourceArguments):
    """Pairs of texts to read, and the limits of their lengths.

    With neither ``train_file`` nor ``dataset_name`` a pair is a documented function of the standard
    library of the running interpreter: the source is its body without the docstring, the target
    the first line of the docstring. That needs no network.
    """

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training pairs: .jsonl/.json, .csv or .parquet rows, or a folder of .jsonl or "
            ".parquet shards. Default: bodies and docstrings of the functions of the running "
            "Python's standard library."
        },
    )
    source_column: str = field(
        default="source", metadata={"help": "Column of rows with the text that goes in."}
    )
    target_column: str = field(
        default="target", metadata={"help": "Column of rows with the text that comes out."}
    )
    source_prefix: str = field(
        default="",
        metadata={"help": "Text put before every source, such as 'summarize: ' for T5."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenise training pairs while training, with nothing written to "
            "disk. Rows held out for validation are then the first 1,000. A run that goes on "
            "begins to read at the shard in which it was: 64 MiB of JSON lines, a row group of a "
            "parquet file; other files and named datasets have larger ones."
        },
    )
    max_source_length: int = field(
        default=512,
        metadata={"help": "Tokens of a source, with EOS; what is longer is cut at its end."},
    )
    max_target_length: int = field(
        default=64,
        metadata={
            "help": "Tokens of a target, with EOS; what is longer is cut at its end. Also how "
            "many are generated at most, unless --generation_max_length says otherwise."
        },
    )

    def _problems(self) -> list[Problem]:
        why = "a text needs a token, and EOS after it"
        minimums = {"max_source_length": (2, why), "max_target_length": (2, why)}
        problems = [*super()._problems(), *too_small(self, minimums)]
        if self.source_column == self.target_column:
            problems.append(
                Problem(
                    f"--source_column and --target_column are both {self.source_column!r}",
                    "the model would learn to copy",
                    "name two columns",
                )
            )
        return problems
