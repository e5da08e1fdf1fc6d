"""What is shown of a resolved config: every key, its value, its reason; as lines and as data."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.cli import explain
from dstrain.config import Facts, ResolvedConfig, resolve
from dstrain.config.explain import as_dict, as_table
from dstrain.core.errors import ConfigError

CONFIG = {
    "gradient_clipping": 0.5,
    "train_batch_size": 64,
    "optimizer": {"params": {"betas": [0.9, 0.95]}},
    "zero_optimization": {"stage": 2, "cpu_offload": True},
}


def example(**arguments: Any) -> ResolvedConfig:
    """Return a config with keys of every origin, and a warning."""
    return resolve(TrainingArguments(deepspeed=CONFIG, **arguments), Facts(world_size=2))


def lines_by_key(resolved: ResolvedConfig) -> dict[str, str]:
    return {line.split()[0]: line for line in as_table(resolved).splitlines()}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what ``dstrain explain`` prints."""
    assert explain.run(words) == 0
    return capsys.readouterr().out


def test_table_has_one_line_per_key_with_value_and_reason():
    """Catches a key, or its reason, that is not shown: "nothing silent" rests on this table."""
    got = example(learning_rate=1e-3)
    lines = lines_by_key(got)
    assert set(got.values) <= set(lines)
    for key, value in got.values.items():
        assert json.dumps(value) in lines[key]
        assert str(got.provenance[key]) in lines[key]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("gradient_clipping", "0.5 your config"),
        ("optimizer.params.lr", "0.001 argument learning_rate"),
        ("optimizer.params.eps", "1e-08 default of argument adam_epsilon"),
        ("optimizer.params.betas", "[0.9, 0.95] your config"),
        ("train_batch_size", "64 your config"),
        ("gradient_accumulation_steps", "4 train_batch_size 64 / (micro-batch 8 x ranks 2)"),
        ("bf16.enabled", "false default of argument bf16"),
        ("optimizer.type", "\"AdamW\" optim='adamw_torch' with offload"),
    ],
)
def test_table_gives_the_reason_of_every_kind(key, expected):
    line = lines_by_key(example(learning_rate=1e-3))[key]
    assert " ".join(line.split()[1:]).startswith(expected)


def test_table_is_aligned():
    """Columns make a long table readable."""
    lines = lines_by_key(example())
    starts = {line.index(line.split(maxsplit=1)[1]) for key, line in lines.items() if "." in key}
    assert len(starts) == 1


def test_a_long_reason_goes_on_below_itself(capsys):
    """That of zero_stage="auto" names what every faster choice lacks."""
    words = ("--model_config", "llama:hidden_size=8192,num_hidden_layers=80", "--world_size", "64")
    text = printed(capsys, *words, "--gpu_memory", "80GB", "--host_memory", "1TB")
    first, *others = text.splitlines()
    column = first.index("zero_stage='auto'")
    below = itertools.takewhile(lambda line: line[:column].isspace(), others)
    going_on = [line[column:] for line in below]
    assert going_on
    assert max(map(len, [first[column:], *going_on])) <= 88
    whole = json.loads(
        printed(capsys, "--json", *words, "--gpu_memory", "80GB", "--host_memory", "1TB")
    )
    reason = whole["provenance"]["zero_optimization.stage"]["detail"]
    assert " ".join([first[column:], *going_on]) == reason


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ((), "--model_config, --gpu_memory, --block_size"),
        (("--device", "cpu"), "--model_config, --host_memory, --block_size"),
        (("--zero_stage", "2"), "--model_config"),
        (("--zero_stage", "2", "--model_config", "llama"), ""),
        (("--model_config", "llama", "--gpu_memory", "80GB"), "--block_size"),
    ],
)
def test_what_a_run_would_know_in_addition_is_named(capsys, words, flags):
    """Else its config may differ from what was shown here, and nobody would know why."""
    last = printed(capsys, *words).splitlines()[-1]
    if flags:
        assert last == f"note: a run knows more than this command: tell it with {flags}"
    else:
        assert not last.startswith("note:")


def test_warnings_are_shown_after_the_keys():
    last = as_table(example()).splitlines()[-1]
    assert last.startswith("warning: ")
    assert "cpu_offload" in last


def test_dict_holds_the_whole_answer_and_is_json():
    """``resolved_config.json`` of a run is this."""
    got = example()
    data = json.loads(json.dumps(as_dict(got)))
    assert data["deepspeed"] == json.loads(json.dumps(got.to_deepspeed()))
    assert set(data["provenance"]) == set(got.values)
    assert data["provenance"]["gradient_clipping"] == {"source": "config", "detail": "your config"}
    assert data["adopted_from_config"]["max_grad_norm"] == 0.5
    assert data["adopted_from_config"]["gradient_accumulation_steps"] == 4
    assert len(data["warnings"]) == 1


def test_dict_is_accepted_as_a_config_again():
    """Copying the shown config back must give the same run, not a conflict."""
    got = example(learning_rate=1e-3)
    again = resolve(TrainingArguments(deepspeed=as_dict(got)["deepspeed"]), Facts(world_size=2))
    assert dict(again.values) == dict(got.values)


def test_table_shows_what_json_does_not_know():
    """A dict config may hold Python objects."""
    got = example()
    values = {**got.values, "mpu": object()}
    object.__setattr__(got, "values", values)
    object.__setattr__(got, "provenance", {**got.provenance, "mpu": "your config"})
    assert "object at" in as_table(got)


def test_command_prints_the_table_for_a_world(capsys):
    text = printed(capsys, "--deepspeed", "zero3", "--bf16", "--world_size", "64")
    assert "micro-batch 8 x accumulation 1 x ranks 64" in text
    assert "preset zero3" in text


def test_command_prints_json(capsys):
    data = json.loads(printed(capsys, "--json", "--world_size", "4", "--zero_stage", "1"))
    assert data["deepspeed"]["train_batch_size"] == 32
    assert data["deepspeed"]["zero_optimization"]["stage"] == 1


def test_command_knows_the_device(capsys):
    words = ("--json", "--offload_optimizer", "cpu")
    for device, pinned in (("cuda", True), ("cpu", False)):
        data = json.loads(printed(capsys, *words, "--device", device))
        assert data["deepspeed"]["zero_optimization"]["offload_optimizer"]["pin_memory"] is pinned


def test_command_knows_the_steps_of_the_run_from_max_steps(capsys):
    config = '{"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}'
    data = json.loads(printed(capsys, "--json", "--deepspeed", config, "--max_steps", "70"))
    assert data["deepspeed"]["scheduler"]["params"]["total_num_steps"] == 70


def test_the_command_of_a_run_is_explained_with_its_task(capsys):
    """Its flags about data need not be picked out, and tokens per sample are those of the run."""
    words = ("causal-lm", "--output_dir", "out", "--train_file", "corpus.txt", "--bf16")
    machine = ("--world_size", "16", "--gpu_memory", "80GB", "--model_config", "llama")
    for command in (words, ("train", *words)):
        data = json.loads(printed(capsys, *command, *machine, "--json"))
        assert data["facts"]["sequence_length"] == 512  # the task's default
        assert data["facts"]["model"]["model_type"] == "llama"
        assert data["set_arguments"] == ["bf16", "output_dir"]
    data = json.loads(printed(capsys, *words, *machine, "--block_size", "2048", "--json"))
    assert data["facts"]["sequence_length"] == 2048


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("--train_file", "a.txt"), "dstrain explain causal-lm"),
        (("casual-lm",), "did you mean 'causal-lm'?"),
        (("causal-lm", "--train_fil", "a.txt"), "did you mean --train_file?"),
        (("causal-lm", "--block_size", "1"), "give 2 or more"),
    ],
)
def test_mistakes_about_tasks_are_named(words, remedy):
    with pytest.raises(ConfigError) as caught:
        explain.run(words)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("world_size", ["0", "-2", "many"])
def test_command_refuses_a_world_that_cannot_be(world_size):
    """Catches a division by zero where the config gives train_batch_size."""
    with pytest.raises(ConfigError, match="world_size"):
        explain.run(["--deepspeed", '{"train_batch_size": 8}', "--world_size", world_size])


def test_command_refuses_what_training_would_refuse():
    with pytest.raises(ConfigError, match="gradient_clipping"):
        explain.run(["--deepspeed", '{"gradient_clipping": 0.5}', "--max_grad_norm", "0.1"])


def test_command_needs_no_torch():
    """It is for a laptop, and answers at once."""
    code = (
        "import sys; from dstrain.cli.main import main; main(['explain', '--deepspeed', 'zero3']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0
    assert b"zero_optimization.stage" in done.stdout
