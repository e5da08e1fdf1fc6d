"""``dstrain plan`` as a user runs it: a table, or JSON; at once, without torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from dstrain.cli.main import main

LLAMA_8B = (
    "llama:hidden_size=4096,intermediate_size=14336,num_hidden_layers=32,num_attention_heads=32,"
    "num_key_value_heads=8,vocab_size=128256"
)
MACHINES = ("--gpus", "16", "--gpu_memory", "80GB", "--host_memory", "1TB")


@pytest.fixture
def printed(capsys, monkeypatch):
    """Give standard output of a command that succeeds."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*words: str) -> str:
        assert main(["plan", *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Give standard error of a command that a user got wrong."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> str:
        assert main(["plan", *words]) == 2
        return capsys.readouterr().err

    return run


def test_json_has_every_choice_and_the_one_taken(printed):
    got = json.loads(printed("--json", "--model_config", LLAMA_8B, *MACHINES))
    assert got["model"]["num_parameters"] == 8_030_261_248
    assert got["model"]["source"] == "closed form"
    keys = [(r["zero_stage"], r["offload_optimizer"], r["offload_param"]) for r in got["rows"]]
    assert len(set(keys)) == len(keys)
    for stage in "0123":
        assert (stage, "none", "none") in keys
    for row in got["rows"]:
        assert row["peak_bytes"] == max(row["moments_bytes"].values())
        assert row["fits"] == (not row["lacking_bytes"])
        assert all(v >= 0 for v in row["device_bytes"].values())
    taken = got["choice"]
    row = next(r for r in got["rows"] if r["zero_stage"] == taken["zero_stage"])
    assert taken["fits"]
    assert row["fits"]
    assert taken["reason"]


def test_table_shows_every_choice_the_reason_and_the_assumptions(printed):
    text = printed("--model_config", LLAMA_8B, *MACHINES)
    for part in ("stage 0", "stage 3, optimizer on cpu, parameters on cpu", "zero_stage=auto:"):
        assert part in text
    assert "because" in text
    assert "Assumed" in text
    assert "8,030,261,248" in text


def test_activations_are_shown_with_and_without_checkpointing(printed):
    """Both, whichever was asked for: the columns stand under their group's title."""
    words = ("--model_config", LLAMA_8B, *MACHINES)
    for flag in ((), ("--gradient_checkpointing",)):
        lines = printed(*words, *flag).splitlines()
        titles = next(line for line in lines if "not checkpointed" in line)
        heads, *rows = (line for line in lines if line.count("|") == 3 and line != titles)
        assert len(rows) == 10
        bars = [i for i, sign in enumerate(heads) if sign == "|"]
        assert all([i for i, sign in enumerate(r) if sign == "|"] == bars for r in (titles, *rows))
        stage_1 = next(row for row in rows if "stage 1 " in row)
        plain, checkpointed = (tuple(map(float, p.split())) for p in stage_1.split("|")[1:3])
        assert plain[0] > 10 * checkpointed[0]
        assert plain[2] > checkpointed[2]
        got = json.loads(printed("--json", *words, *flag))["rows"][1]
        for part, key in ((plain, "without_checkpointing"), (checkpointed, "with_checkpointing")):
            activations, peak, needed = (round(v / 2**30, 1) for v in got[key].values())
            assert part == (activations, peak, needed)


def test_what_fits_once_checkpointed_says_so(printed):
    words = ("--model_config", LLAMA_8B, "--gpus", "16", "--gpu_memory", "40GB")
    rows = [line for line in printed(*words).splitlines() if line.count("|") == 3]
    row = next(line for line in rows if "stage 3 " in line)
    assert "no, lacks" in row
    assert row.endswith("(checkpointed: yes)")
    again = printed(*words, "--gradient_checkpointing").splitlines()
    assert next(line for line in again if "stage 3 " in line).endswith(" yes")


def test_says_by_how_much_it_does_not_fit_and_what_would_help(printed):
    words = ("--model_config", LLAMA_8B, "--gpus", "1", "--gpu_memory", "24GB")
    text = printed(*words, "--micro_batch", "8")
    assert "does not fit" in text
    assert "GiB of GPU memory" in text
    assert re.search(r"with \d+ GPUs and --gradient_checkpointing and --micro_batch 1 stage", text)
    assert "--host_memory" in text


def test_reads_a_file(printed, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    got = json.loads(printed("--json", "--model_config", str(tmp_path / "config.json")))
    assert got["model"]["num_parameters"] == 124_439_808


@pytest.mark.slow
def test_counts_what_has_no_closed_form_in_a_child(printed):
    got = json.loads(printed("--json", "--model_config", "mamba:num_hidden_layers=2"))
    assert got["model"]["source"] == "built without memory"
    assert got["model"]["num_parameters"] > 1e6


@pytest.mark.slow
def test_a_misspelt_key_is_named_with_the_nearest(refused):
    assert "hidden_size" in refused("--model_config", "llama:hiden_size=64")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--model_config is missing"),
        (("--model_config", "llama", "--gpus", "0"), "--gpus 0"),
        (("--model_config", "llama", "--gpu_memory", "80 apples"), "80 apples"),
        (("--model_config", "llama", "--host_memory", "1QB"), "1QB"),
        (("--model_config", "llama", "--precision", "fp8"), "fp8"),
        (("--model_config", "llama", "--optimizer", "sophia"), "sophia"),
        (("--model_config", "llama", "--seq_length", "10"), "--seq_len"),
        (("--model_config", "/nowhere/config.json"), "/nowhere/config.json"),
    ],
)
def test_mistakes_are_refused_by_name(refused, words, named):
    assert named in refused(*words)


def test_help_names_every_flag(printed, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    for flag in ("--model_config", "--gpus", "--gpu_memory", "--nvme", "--seq_len", "--json"):
        assert flag in text
    assert max(map(len, text.splitlines())) <= 100


def test_needs_no_torch_and_is_done_at_once():
    """It is for a laptop."""
    code = (
        "import sys; from dstrain.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed', 'transformers')))"
    )
    command = [sys.executable, "-c", code, "plan", "--model_config", LLAMA_8B, *MACHINES]
    started = os.times().children_user
    clock = time.monotonic()
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"zero_stage=auto" in done.stdout
    # Processor time, since the machine may be busy; wall time is a little more on a quiet one.
    assert os.times().children_user - started < 1.0, f"{time.monotonic() - clock:.2f} s in all"
