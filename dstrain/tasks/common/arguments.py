"""Arguments of all tasks: the model, the tokenizer, the source of the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from dstrain.core.errors import ConfigError, DataError, Problem, raise_problems

BYTE_VOCABULARY = 258
"""Smallest vocabulary of a byte-level tokenizer: 256 bytes, ``<|endoftext|>`` and ``<|pad|>``."""


@dataclass
class StartArguments:
    """Model to train.

    Raises:
        ConfigError: from the constructor, when two models are named.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name of a model to train further."}
    )
    model_config: str | None = field(
        default=None,
        metadata={"help": "Train from scratch: a config.json, or a short form, type:key=value,..."},
    )

    ignore_missing_keys: bool = field(
        default=False,
        metadata={
            "help": "Begin with random weights where the named model lacks some, which is an error "
            "otherwise."
        },
    )

    def __post_init__(self) -> None:
        """Refuse arguments that name two models."""
        if self.model_name_or_path is not None and self.model_config is not None:
            raise ConfigError(
                Problem(
                    f"--model_name_or_path {self.model_name_or_path} and --model_config "
                    f"{self.model_config} are both given",
                    "a checkpoint brings its own config",
                    "drop one of the two",
                )
            )


@dataclass
class SourceArguments:
    """Source of the data, its split, and the processes that read it.

    Raises:
        DataError: from the constructor, with all illegal values and pairs of values at once. Files
            and datasets are looked for later, when they are read.
    """

    train_file: str | None = field(default=None, metadata={"help": "Training data."})
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "Validation data in any form --train_file accepts, never streamed. Default: a "
            "part of the training data (--validation_percentage)."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Name or local path for datasets.load_dataset, instead of --train_file."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of --dataset_name."}
    )
    train_split: str = field(
        default="train",
        metadata={"help": "Split of --dataset_name to train on; slices such as train[:1%] work."},
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of --dataset_name to evaluate on. Default: a part of --train_split "
            "(--validation_percentage), also when the dataset has a validation split."
        },
    )
    validation_percentage: float = field(
        default=5.0,
        metadata={
            "help": "Percent of the training data held out when no validation data is named, "
            "chosen by hash and so the same on every machine; 0 holds out nothing."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and tokenise the training data while training."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on at most this many samples, the first ones."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many samples, the first ones."}
    )
    vocab_size: int = field(
        default=4096,
        metadata={
            "help": "Vocabulary of the byte-level BPE trained on the training data; it ends up "
            "smaller where the data has too few repeated words. Unused with another tokenizer."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Name or path of a tokenizer. Default: the model's, or one trained here."
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read and split jsonl, csv, parquet and dataset rows, and that "
            "tokenise conversations (default 1). Other text is tokenised by the threads of the "
            "fast tokenizer."
        },
    )

    def __post_init__(self) -> None:
        """Refuse values, and pairs of values, that cannot be used, all in one error."""
        raise_problems(self._problems(), error=DataError)

    def _problems(self) -> list[Problem]:
        """List what is wrong with the arguments; the class of a task adds its problems."""
        problems = _source_problems(self)
        problems += too_small(
            self,
            {
                "max_train_samples": (1, "it counts samples; leave it out for all of them"),
                "max_eval_samples": (1, "it counts samples; leave it out for all of them"),
                "vocab_size": (BYTE_VOCABULARY, "256 bytes and two special tokens come first"),
                "preprocessing_num_workers": (1, "it counts processes; leave it out for one"),
            },
        )
        if not 0 <= self.validation_percentage < 100:
            problems.append(
                Problem(
                    f"--validation_percentage {self.validation_percentage} is not a share of the "
                    "data",
                    "it is a percentage: 0 <= value < 100, and something must be left to train on",
                    "give for example 5 (percent), or 0 to hold out nothing",
                )
            )
        return problems


def too_small(args: object, minimums: dict[str, tuple[int, str]]) -> list[Problem]:
    """Return a problem for each field of ``args`` below its minimum; None is below no minimum."""
    problems = []
    for name, (minimum, why) in minimums.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            problems.append(
                Problem(f"--{name} {value} is too small", why, f"give {minimum} or more")
            )
    return problems


def _source_problems(args: SourceArguments) -> list[Problem]:
    problems = []
    if args.train_file is not None and args.dataset_name is not None:
        problems.append(
            Problem(
                f"--train_file {args.train_file} and --dataset_name {args.dataset_name} "
                "are both given",
                "the training data has one source",
                "drop one of the two",
            )
        )
    if args.validation_file is not None and args.validation_split is not None:
        problems.append(
            Problem(
                f"--validation_file {args.validation_file} and --validation_split "
                f"{args.validation_split} are both given",
                "the validation data has one source",
                "drop one of the two",
            )
        )
    if args.dataset_name is None:
        values = {
            "dataset_config_name": args.dataset_config_name,
            "train_split": None if args.train_split == "train" else args.train_split,
            "validation_split": args.validation_split,
        }
        problems += [
            Problem(
                f"--{name} {value} is given without --dataset_name",
                f"--{name} names a part of the dataset that --dataset_name loads",
                f"add --dataset_name, or drop --{name}",
            )
            for name, value in values.items()
            if value is not None
        ]
    return problems
