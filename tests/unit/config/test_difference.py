"""``dstrain explain --diff``: what differs between two runs, keys and reasons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.cli import explain
from dstrain.cli.main import main
from dstrain.config import Facts, ModelFacts, resolve
from dstrain.config.difference import RECORD_FILE, as_text, differences
from dstrain.config.explain import as_record
from dstrain.core.errors import ConfigError, ModelError

LLAMA = "llama:hidden_size=256,intermediate_size=512,num_hidden_layers=2,vocab_size=1000"
MODEL = ModelFacts(10**6, 10**6, largest=10**5, largest_vector=100)


def record(facts: Facts | None = None, **arguments: Any) -> dict[str, Any]:
    args = TrainingArguments(**arguments)
    return as_record(resolve(args, facts or Facts()), args)


def by_name(this: dict[str, Any], other: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {(d.kind, d.name): d for d in differences(this, other)}


@pytest.fixture
def compared(capsys):
    """Give standard output and exit status of a comparison."""

    def run(*words: str) -> tuple[str, int]:
        status = explain.run(words)
        return capsys.readouterr().out, status

    return run


# --- what is a difference ------------------------------------------------------------------------


def test_equal_runs_differ_in_nothing():
    facts = Facts(world_size=4, model=MODEL)
    assert not differences(record(facts, bf16=True), record(facts, bf16=True))


def test_a_key_comes_with_both_values_and_both_reasons():
    found = by_name(record(learning_rate=1e-3), record(deepspeed={"gradient_clipping": 0.5}))
    rate = found["key", "optimizer.params.lr"]
    assert (rate.this.value, rate.other.value) == (1e-3, 5e-5)
    assert (rate.this.why, rate.other.why) == (
        "argument learning_rate", "default of argument learning_rate",
    )  # fmt: skip
    clipping = found["key", "gradient_clipping"]
    assert (clipping.this.value, clipping.other.value) == (1.0, 0.5)
    assert clipping.other.why == "your config"


def test_a_key_that_only_one_has_is_a_difference_and_says_so():
    found = by_name(record(zero_stage="3", offload_param="cpu"), record(zero_stage="3"))
    device = found["key", "zero_optimization.offload_param.device"]
    assert (device.this.present, device.other.present) == (True, False)
    text = as_text(tuple(found.values()), other="run 2")
    assert "zero_optimization.offload_param.device" in text
    assert "not in it" in text


def test_a_key_that_is_missing_for_want_of_the_model_says_that():
    found = by_name(record(Facts(model=MODEL)), record())
    bucket = found["key", "zero_optimization.reduce_bucket_size"]
    assert "sizes are not known" in bucket.other.why


def test_arguments_facts_and_versions_differ_too():
    this, other = record(Facts(8), num_train_epochs=1), record(Facts(16))
    other["versions"]["torch"] = "1.0"
    found = by_name(this, other)
    epochs = found["argument", "num_train_epochs"]
    assert (epochs.this.value, epochs.this.why) == (1.0, "set")
    assert (epochs.other.value, epochs.other.why) == (3.0, "default")
    assert found["fact", "world_size"].other.value == 16
    assert found["version", "torch"].other.value == "1.0"
    assert found["key", "train_batch_size"].this.value == 64


def test_an_argument_that_the_config_decided_is_compared_by_what_it_became():
    """Written in the config or in the arguments: the run is the same."""
    written = record(deepspeed={"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})
    found = by_name(written, record(learning_rate=1e-3))
    assert ("argument", "learning_rate") not in found
    assert ("key", "optimizer.params.lr") not in found
    assert set(found) == {("argument", "deepspeed")}


def test_where_a_run_writes_is_no_difference():
    assert not differences(record(output_dir="a", run_name="x"), record(output_dir="b"))


def test_what_only_one_knows_is_no_difference_of_facts():
    """A run knows its model and steps; a command that looks ahead may not."""
    kinds = {kind for kind, _ in by_name(record(Facts(num_training_steps=9)), record())}
    assert "fact" not in kinds


def test_a_record_is_plain_json_and_hides_tokens():
    foreign = {"tensor_parallel": {"tp": {"mpu": object()}}}
    found = record(Facts(model=MODEL), hub_token="hf_secret", deepspeed=foreign)
    text = json.dumps(found)
    assert json.loads(text) == found
    assert "hf_secret" not in text
    assert {"dstrain", "deepspeed", "torch", "transformers", "python"} <= set(found["versions"])
    assert found["facts"]["world_size"] == 1
    assert set(found["arguments"]) >= {"learning_rate", "output_dir", "zero_stage"}
    assert "hub_token" in found["set_arguments"]


# --- the other run, in each form -----------------------------------------------------------------


def saved(folder: Path, **arguments: Any) -> Path:
    path = folder / RECORD_FILE
    path.write_text(json.dumps(record(Facts(), **arguments)))
    return path


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_run_is_given_by_its_folder_or_file(tmp_path, compared, as_folder):
    path = saved(tmp_path, learning_rate=1e-3)
    given = str(tmp_path if as_folder else path)
    text, status = compared("--learning_rate", "1e-3", "--diff", given)
    assert status == 0
    assert text.startswith("nothing differs from ")
    text, status = compared("--diff", given)
    assert status == 1
    assert "optimizer.params.lr" in text
    assert "argument learning_rate" in text


def test_a_run_is_given_by_its_flags(compared, tmp_path):
    text, status = compared("--bf16", "--diff", "--zero_stage 3 --learning-rate 1e-3 --bf16")
    assert status == 1
    assert "zero_optimization.stage" in text
    assert "bf16" not in text.split("DeepSpeed config:")[1]
    assert compared("--bf16", "--diff=--bf16") == ("nothing differs from --bf16\n", 0)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    text, _ = compared("--model_config", LLAMA, "--diff", f"--model-name-or-path={folder}")
    assert "gpt2" in text  # and not two models at once
    assert compared("--bf16", "--diff", "--bf16", "--json") == ("[]\n", 0)
    own = "--block_size=9 --max_steps 3"
    text, status = compared("causal-lm", "--max_steps", "3", "--diff", own)
    assert status == 1
    assert text.startswith(f"1 difference from {own}: 1 in facts")
    assert "sequence_length" in text
    assert compared("--diff", "--seed 42") == ("nothing differs from --seed 42\n", 0)


def test_flags_share_the_model_and_the_world_unless_they_say_otherwise(compared):
    ours = ("--model_config", LLAMA, "--world_size", "4", "--zero_stage", "2", "--json")
    text, _ = compared(*ours, "--diff", "--zero_stage 3")
    names = {d["name"] for d in json.loads(text)}
    assert "zero_optimization.stage3_prefetch_bucket_size" in names
    assert not {"world_size", "train_batch_size", "zero_optimization.reduce_bucket_size"} & names
    text, _ = compared(*ours, "--diff", "--zero_stage 2 --world_size 8")
    assert {d["name"] for d in json.loads(text)} == {"world_size", "train_batch_size"}


def test_a_deepspeed_config_is_taken_with_the_same_other_flags(tmp_path, compared):
    path = tmp_path / "other.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}')
    for given in (str(path), "zero3"):
        text, status = compared("--zero_stage=auto", "--max_grad_norm", "0.5", "--diff", given)
        assert status == 1
        assert "zero_optimization.stage\n" in text
        assert "gradient_clipping" not in text


def test_json_has_every_field(compared):
    (entry, *_), status = [
        json.loads(part) if isinstance(part, str) else part
        for part in compared("--json", "--diff", "--max_grad_norm 0.5")
    ]
    assert status == 1
    assert entry["name"] == "gradient_clipping"
    assert entry["this"] == {
        "present": True, "value": 1.0, "why": "default of argument max_grad_norm",
    }  # fmt: skip
    assert entry["other"]["value"] == 0.5


def test_the_exit_status_of_a_mistake_is_that_of_trouble(tmp_path, capsys, monkeypatch):
    """As of diff(1): 0 the same, 1 different, 2 trouble."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["explain", "--diff", "--max_grad_norm 0.5"]) == 1
    assert main(["explain", "--diff", "--seed 42"]) == 0
    assert main(["explain", "--diff", ""]) == main(["explain", "--diff= "]) == 2
    assert main(["explain", "--diff", str(tmp_path)]) == 2
    assert RECORD_FILE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--zero_stag 3", "--zero_stage"),
        ("zero33", "did you mean 'zero3'?"),
        ("--deepspeed '{\"gradient_cliping\":1}'", "gradient_clipping"),
        ("--deepspeed 'x", "No closing quotation"),
    ],
)
def test_mistakes_in_the_other_run_are_named(given, named):
    with pytest.raises(ConfigError, match="the run to compare with") as caught:
        explain.run(["--diff", given])
    assert named in str(caught.value)


def test_a_record_that_is_none_is_refused(tmp_path):
    (tmp_path / RECORD_FILE).write_text('{"deepspeed": {}}')
    with pytest.raises(ConfigError, match="no record"):
        explain.run(["--diff", str(tmp_path)])
    (tmp_path / RECORD_FILE).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        explain.run(["--diff", str(tmp_path)])


def test_it_needs_no_torch_and_is_done_at_once(tmp_path):
    """It is for a laptop: processor time, since the machine may be busy."""
    saved(tmp_path, learning_rate=1e-3)
    code = (
        "import sys; from dstrain.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed', 'transformers')))"
    )
    words = ["--model_config", LLAMA, "--gpu_memory", "80GB", "--diff", str(tmp_path)]
    before = os.times().children_user
    command = [sys.executable, "-c", code, "explain", "--world_size", "64", *words]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"optimizer.params.lr" in done.stdout
    assert os.times().children_user - before < 1.0


# --- the model and the machine -------------------------------------------------------------------


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert explain.run([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_model_is_read_from_its_config_and_memory_decides_the_stage(capsys):
    words = ("--model_config", LLAMA, "--world_size", "8", "--block_size", "128")
    found = explained(capsys, *words, "--gpu_memory", "80GB", "--host_memory", "1TB")
    assert found["deepspeed"]["zero_optimization"]["stage"] == 1
    assert "stage 1 fits" in found["provenance"]["zero_optimization.stage"]["detail"]
    assert found["facts"]["model"]["model_type"] == "llama"
    assert found["facts"]["machine"]["device_bytes"] == 80 * 10**9
    unknown = explained(capsys, *words)
    assert unknown["deepspeed"]["zero_optimization"]["stage"] == 2
    assert "memory of the machine" in unknown["provenance"]["zero_optimization.stage"]["detail"]


def test_a_model_folder_is_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    found = explained(capsys, "--model_name_or_path", str(tmp_path))
    assert found["facts"]["model"]["num_parameters"] == 124_439_808


def test_memory_of_the_host_is_shared_by_its_ranks(capsys):
    words = ("--model_config", LLAMA, "--world_size", "4", "--device", "cpu")
    found = explained(capsys, *words, "--host_memory", "16GB")
    assert found["facts"]["machine"]["device_bytes"] == 4 * 10**9


def test_the_choice_is_that_of_dstrain_plan(capsys):
    """Two commands that disagree would be worse than none."""
    spec = "llama:hidden_size=4096,intermediate_size=14336,num_hidden_layers=32,vocab_size=128256"
    for memory in ("80GB", "60GB", "46GB"):
        world = ("--model_config", spec, "--gpu_memory", memory, "--host_memory", "1TB")
        found = explained(
            capsys, *world, "--world_size", "8", "--bf16", "--block_size", "2048",
            "--per_device_train_batch_size", "1",
        )  # fmt: skip
        assert main(["plan", *world, "--gpus", "8", "--seq_len", "2048", "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)["rows"]
        fitting = [r for r in planned if r["fits"] and r["offload_optimizer"] == "none"]
        stages = [int(r["zero_stage"]) for r in fitting if r["zero_stage"] != "0"]
        assert found["deepspeed"]["zero_optimization"]["stage"] == min(stages)


@pytest.mark.parametrize(
    ("words", "error", "named"),
    [
        (("--model_config", LLAMA, "--model_name_or_path", "x"), ConfigError, "one of them"),
        (("--model_name_or_path", "meta/llama"), ModelError, "config.json"),
        (("--model_config", "/nowhere/config.json"), ModelError, "/nowhere"),
        (("--gpu_memory", "80 apples"), ConfigError, "80 apples"),
        (("--block_size", "0"), ConfigError, "--block_size 0"),
        (("--device", "cpu", "--gpu_memory", "1GB"), ConfigError, "--host_memory"),
    ],
)
def test_mistakes_are_refused_by_name(words, error, named):
    with pytest.raises(error) as caught:
        explain.run(words)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("provenance", [["bf16", "argument bf16"]], "provenance"),
        ("provenance", {"bf16": "argument bf16"}, "provenance.bf16"),
        ("provenance", {"bf16": {"source": "argument"}}, "provenance.bf16.detail: field required"),
        ("deepspeed", ["x"], "deepspeed"),
        ("arguments", 3, "arguments"),
        ("set_arguments", {"a": 1}, "set_arguments"),
        ("adopted_from_config", "x", "adopted_from_config"),
        ("facts", [1], "facts"),
        ("versions", {"torch": 2}, "versions.torch"),
        ("provenance", None, "holds no config"),
    ],
)
def test_a_record_of_another_form_is_an_error_that_names_the_field(tmp_path, name, value, said):
    path = saved(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match=f"--diff.*\n?.*{said}"):
        explain.run(["--diff", str(path)])
