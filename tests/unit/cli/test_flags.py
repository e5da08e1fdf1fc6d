"""Flags from dataclasses: every field is a flag, every mistake is reported, all of them at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.arguments.fields import arg
from dstrain.cli.flags import make_parser, parse
from dstrain.core.errors import ConfigError, DataError


@dataclass
class DataOptions:
    """What to read.

    Further lines do not belong to the title.
    """

    train_file: str | None = field(default=None, metadata={"help": "A file; 100% of it is read."})
    block_size: int = field(default=512, metadata={"help": "Tokens per sample."})
    streaming: bool = field(default=False, metadata={"help": "Read while training."})

    def __post_init__(self) -> None:
        """Refuse a block of one token."""
        if self.block_size < 2:
            raise DataError("block_size is too small")


CLASSES = [TrainingArguments, DataOptions]


def read(*words: str, classes: list[type[Any]] | None = None) -> tuple[TrainingArguments, Any]:
    """Parse words into the training arguments and the data options."""
    chosen = classes or CLASSES
    _, instances = parse(make_parser("prog", "", chosen), words, chosen)
    return instances[0], instances[-1]


def refusal(*words: str) -> list[str]:
    """Return the problems, as text, of the one error that these words give."""
    with pytest.raises(ConfigError) as caught:
        read(*words)
    return [str(problem) for problem in caught.value.problems]


# --- what is understood --------------------------------------------------------------------------


def test_no_words_give_the_defaults():
    """Catches a parser with defaults of its own, beside those of the dataclass."""
    assert read() == (TrainingArguments(), DataOptions())


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--max_steps", "-1"], "max_steps", -1),  # a value that looks like a flag
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--bf16"], "bf16", True),
        (["--bf16", "true"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--bf16=0"], "bf16", False),
        (["--tf32"], "tf32", True),
        (["--tf32", "none"], "tf32", None),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--report_to", "none"], "report_to", []),
        (["--label_names", "labels"], "label_names", ["labels"]),
        (["--zero_stage", "3"], "zero_stage", "3"),
        (["--deepspeed", '{"bf16": {}}'], "deepspeed", '{"bf16": {}}'),
        (["--lr_scheduler_kwargs", '{"min_lr": 0.1}'], "lr_scheduler_kwargs", {"min_lr": 0.1}),
        (["--run_name", "a b"], "run_name", "a b"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--seed", "12345678901234567"], "seed", 12345678901234567),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_flag_of_every_kind_is_read(words, name, expected):
    value = getattr(read(*words)[0], name)
    assert value == expected
    assert type(value) is type(expected)


def test_a_dash_in_a_value_stays():
    assert read("--run_name=my-run_1")[0].run_name == "my-run_1"
    assert read("--output_dir", "out-dir/a_b")[0].output_dir == "out-dir/a_b"


@pytest.mark.parametrize("field", dataclasses.fields(TrainingArguments), ids=lambda f: f.name)
def test_every_field_is_a_flag(field):
    """Writing a field's default on the command line must change nothing."""
    default = getattr(TrainingArguments(), field.name)
    if default is None:
        assert f"--{field.name}" in make_parser("prog", "", CLASSES).format_help()
    else:
        assert read(f"--{field.name}", str(default))[0] == TrainingArguments()


def test_several_classes_share_the_command_line():
    args, options = read("--learning_rate", "1e-3", "--train_file", "a.txt", "--streaming")
    assert args.learning_rate == 1e-3
    assert options == DataOptions(train_file="a.txt", streaming=True)


def test_what_else_the_parser_declares_is_handed_back():
    parser = make_parser("prog", "", CLASSES)
    parser.add_argument("--json", action="store_true", default=False)
    known, _ = parse(parser, ["--json", "--seed", "7"], CLASSES)
    assert vars(known) == {"json": True}


def test_the_local_rank_of_a_launcher_is_no_unknown_flag():
    """torch.distributed.launch and old deepspeed add it to every command."""
    assert read("--local_rank=3")[0].learning_rate == 5e-5
    assert read("--local-rank=3")[0].learning_rate == 5e-5


def test_transformers_parser_may_have_seen_the_class_before():
    """HfArgumentParser writes other types into the fields of the class: ``--bf16`` must go on
    working in a process that has used it."""
    from transformers import HfArgumentParser

    HfArgumentParser(TrainingArguments)
    assert read("--bf16", "--report_to", "a", "b")[0].report_to == ["a", "b"]


@dataclass
class OtherDefaults(TrainingArguments):
    """A subclass that declares fields of its base again."""

    num_train_epochs: float = arg(1.0, "Passes over the data.")
    temperature: float = arg(0.5, "Ours.")


def test_a_subclass_may_declare_a_field_again():
    """Catches one flag declared twice, which argparse refuses for the whole command."""
    args, _ = read(classes=[OtherDefaults])
    assert args.num_train_epochs == 1.0
    args, _ = read("--num_train_epochs", "2", "--temperature", "0.1", classes=[OtherDefaults])
    assert (args.num_train_epochs, args.temperature) == (2.0, 0.1)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "shown", "close"),
    [
        ("--learnin_rate", "--learnin_rate", "--learning_rate"),
        ("--learnin_rate=1e-3", "--learnin_rate", "--learning_rate"),
        ("--block-sise", "--block_sise", "--block_size"),
    ],
)
def test_an_unknown_flag_names_the_nearest(word, shown, close):
    (text,) = refusal(word)
    assert text.startswith(f"unknown flag {shown}\n")
    assert f"did you mean {close}?" in text


def test_an_abbreviation_is_unknown_and_not_guessed():
    """argparse would take ``--learn`` today, and break the script when a field is added."""
    assert "unknown flag --learning_r" in refusal("--learning_r", "1e-3")[0]


def test_a_flag_like_no_other_points_to_the_help():
    assert "prog --help" in refusal("--zzzzzz")[0]


def test_all_mistakes_come_in_one_error():
    """Unknown flags, wrong types, illegal values of both classes."""
    texts = refusal(
        "--learnin_rate", "1e-3", "--sed", "1", "--seed", "x", "--optim", "adem",
        "--fp16", "--bf16", "--block_size", "1",
    )  # fmt: skip
    assert [t.split("\n")[0] for t in texts] == [
        "unknown flag --learnin_rate",
        "unknown flag --sed",
        "seed='x'",
        "optim='adem'",
        "fp16=True and bf16=True",
        "block_size is too small",
    ]


def test_a_word_that_belongs_to_no_flag_is_refused():
    assert "unexpected argument 'prompt'" in refusal("--run_name", "my", "prompt")[0]


def test_a_flag_without_its_value_is_refused():
    assert "--learning_rate" in refusal("--learning_rate")[0]
    assert "--learning_rate" in refusal("--learning_rate", "--bf16")[0]


def test_a_value_of_the_wrong_type_names_flag_value_and_expectation():
    (text,) = refusal("--max_steps", "1.5")
    assert "max_steps='1.5'" in text
    assert "an integer" in text


# --- help ----------------------------------------------------------------------------------------


def test_help_shows_groups_meanings_choices_and_defaults():
    text = " ".join(make_parser("prog", "What it does.", CLASSES).format_help().split())
    assert "What it does." in text
    for expected in (
        "What to read:",  # the first line of a docstring titles its flags
        "A file; 100% of it is read.",
        "Tokens per sample. (default: 512)",
        "stop|continue",
        "(default: 5e-05)",
    ):
        assert expected in text
    assert "Further lines" not in text
    assert "==SUPPRESS==" not in text
