"""Bad command lines: one error for all mistakes, without a process group or the job's imports."""

from __future__ import annotations

import json
import sys

import pytest

from dstrain.cli.main import main
from tests.cli.refusals import TRAIN, ZERO_STAGE_TWICE, the_error


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a command in this process; its error, after the checks that hold for every error."""

    def run(*words: str) -> str:
        # A rank's variables would make the command end this process.
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(sys.modules, "dstrain.tasks.causal_lm.job", None)
        status = main(words)
        return the_error(status, capsys.readouterr())

    return run


COMMAND_LINES = [
    # a command, and parts of its error
    (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
    (["frobnicate"], ["unknown command 'frobnicate'", "see dstrain --help"]),
    (["train"], ["no task is named", "causal-lm", "dstrain train causal-lm --output_dir"]),
    (["train", "casual-lm"], ["unknown task 'casual-lm'", "did you mean 'causal-lm'?"]),
    # flags
    ([*TRAIN, "--learnig_rate", "1"], ["unknown flag --learnig_rate", "--learning_rate?"]),
    ([*TRAIN, "--learnig-rate=1"], ["unknown flag --learnig_rate", "--learning_rate?"]),
    ([*TRAIN, "--frobnicate", "1"], ["unknown flag --frobnicate", "causal-lm --help"]),
    ([*TRAIN, "--num_gpus=2"], ["unknown flag --num_gpus", "causal-lm --help"]),
    ([*TRAIN, "stray"], ["unexpected argument 'stray'", "causal-lm --help"]),
    ([*TRAIN, "--max_steps"], ["--max_steps: expected one argument", "causal-lm --help"]),
    # values
    ([*TRAIN, "--max_steps", "1.5"], ["max_steps='1.5'", "expected an integer"]),
    ([*TRAIN, "--learning_rate", "fast"], ["learning_rate='fast'", "expected a number"]),
    ([*TRAIN, "--bf16", "perhaps"], ["bf16='perhaps'", "expected true or false"]),
    ([*TRAIN, "--learning_rate", "nan"], ["learning_rate=nan", "a finite number"]),
    ([*TRAIN, "--eval_strategy", "step"], ["eval_strategy='step'", "did you mean 'steps'?"]),
    ([*TRAIN, "--zero_stage", "4"], ["zero_stage='4'", "one of auto, 0, 1, 2, 3"]),
    ([*TRAIN, "--block_size", "1"], ["--block_size 1 is too small", "give 2 or more"]),
    ([*TRAIN, "--max_train_samples", "0"], ["--max_train_samples 0", "give 1 or more"]),
    ([*TRAIN, "--validation_percentage", "100"], ["100.0 is not a share", "0 <= value < 100"]),
    ([*TRAIN, "--output_dir", ""], ["output_dir=''", "names none", "shell variable"]),
    ([*TRAIN, "--output_dir="], ["output_dir=''", "leave it out for trainer_output"]),
    ([*TRAIN, "--output_dir", " \t"], ["output_dir=", "names none"]),
    ([*TRAIN, "--train_file", ""], ["--train_file is empty", "is a shell variable empty?"]),
    ([*TRAIN, "--model_name_or_path", " "], ["--model_name_or_path is empty"]),
    (["checkpoint", "ls", ""], ["checkpoint ls with an empty argument", "current folder"]),
    (["checkpoint", "export", "x", " "], ["checkpoint export with an empty argument"]),
    # pairs
    ([*TRAIN, "--bf16", "--fp16"], ["fp16=True and bf16=True", "one 16-bit format", "keep"]),
    (
        [*TRAIN, "--train_file", "a.txt", "--dataset_name", "b"],
        ["--train_file a.txt and --dataset_name b are both given", "drop one of the two"],
    ),
    (
        [*TRAIN, "--model_name_or_path", "a", "--model_config", "llama"],
        ["are both given", "drop one of the two"],
    ),
    (
        [*TRAIN, "--zero_stage", "2", "--offload_param", "cpu"],
        ["offload_param='cpu' with zero_stage=2", "set zero_stage to 3"],
    ),
    # DeepSpeed's config
    (
        ["explain", "--deepspeed", '{"zero_optimizaton": {}}'],
        ["zero_optimizaton", "has no such key", "did you mean zero_optimization?"],
    ),
    (
        ["explain", "--deepspeed", '{"zero_optimization": {"stagee": 2}}'],
        ["zero_optimization.stagee", "did you mean zero_optimization.stage?"],
    ),
    (["explain", "--deepspeed", ZERO_STAGE_TWICE], ["stage", "stands twice", "keep one"]),
    (["explain", "--deepspeed", '{"a": 1'], ["not valid JSON", "line 1, column 8"]),
    (["explain", "--deepspeed", "zero22"], ["deepspeed='zero22'", "did you mean 'zero2'?"]),
    (["explain", "--deepspeed", "no/such.json"], ["neither a file nor a preset", "fix: "]),
    (
        ["explain", "--world_size", "2", "--deepspeed", '{"train_batch_size": 7}'],
        ["train_batch_size=7", "micro-batch 8 x accumulation 1 x ranks 2 = 16", "auto"],
    ),
    (
        ["explain", "--bf16", "--deepspeed", '{"fp16": {"enabled": true}}'],
        ["bf16.enabled and fp16.enabled", "one 16-bit format"],
    ),
    (
        [
            "explain",
            "--learning_rate",
            "1e-3",
            "--deepspeed",
            json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}),
        ],
        ["optimizer.params.lr=0.0001", "learning_rate=0.001", 'set optimizer.params.lr to "auto"'],
    ),
]


@pytest.mark.parametrize(
    ("words", "expected"), COMMAND_LINES, ids=[" ".join(words)[:60] for words, _ in COMMAND_LINES]
)
def test_what_the_command_line_alone_shows_to_be_wrong(refused, words, expected):
    error = refused(*words)
    for part in expected:
        assert part in error


def test_all_mistakes_of_the_command_line_are_listed_together(refused):
    """Catches one error per attempt, at a minute of queueing each."""
    error = refused(
        *TRAIN, *("--output_dri", "x", "--learing_rate=1", "--zero_stage", "7", "--bf16", "--fp16"),
        *("--per_device_train_batch_size", "many", "--block_size", "1", "--max_steps", "0.5"),
    )  # fmt: skip
    assert error.startswith("the command line:\n")
    listed = [line for line in error.splitlines() if line.startswith("  - ")]
    for part in (
        "unknown flag --output_dri",
        "unknown flag --learing_rate",
        "per_device_train_batch_size='many'",
        "max_steps='0.5'",
        "zero_stage='7'",
        "fp16=True and bf16=True",
        "--block_size 1 is too small",
    ):
        assert sum(part in line for line in listed) == 1, error
    assert len(listed) == 7, error


def test_all_mistakes_of_a_deepspeed_config_are_listed_together(refused):
    config = {"zero_optimizaton": {}, "train_batch_siz": 8, "gradient_clipping": "hard"}
    error = refused("explain", "--deepspeed", json.dumps(config))
    assert error.count("\n  - ") == 3
    for name in ("did you mean zero_optimization?", "did you mean train_batch_size?", "'hard'"):
        assert name in error


def test_a_config_file_is_named_in_its_errors(refused, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 2},\n "zero_optimization": {"stage": 3}}')
    error = refused("explain", "--deepspeed", str(path))
    assert "'zero_optimization'" in error
    assert "stands twice" in error
    assert str(path) in error
