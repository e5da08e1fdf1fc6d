"""The main job as a user starts it: the launcher, plain Python, one rank that breaks.

A start costs seconds of imports, so one run of two ranks is looked at from many sides, and the
model that it saved is trained further.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cli.corpus import TINY_MODEL, flags, text, write_corpus
from tests.cli.launched import TIMEOUT_SECONDS, the_others_end
from tests.launch import ROOT, launch

BLOCK_SIZE, STEPS = 32, 40
TRAIN = ("train", "causal-lm")
LAUNCH_NOTHING_ELSE = ("--quiet", "--module", "dstrain", *TRAIN)


@dataclass(frozen=True)
class Run:
    """A finished run of two ranks, and what it read and wrote."""

    folder: Path
    corpus: Path
    cache: Path
    stdout: str
    stderr: str

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Train from scratch on two ranks at stage 3, in fp32."""
    home = tmp_path_factory.mktemp("run")
    corpus, folder, cache = write_corpus(home / "corpus"), home / "out", home / "hf"
    words = flags(
        folder,
        train_file=corpus,
        zero_stage=3,
        block_size=BLOCK_SIZE,
        max_steps=STEPS,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=STEPS // 2,
    )
    done = launch(
        ["--module", "dstrain", *TRAIN, *words],
        timeout=TIMEOUT_SECONDS,
        env={"HF_HOME": str(cache)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder, corpus, cache, done.stdout, done.stderr)


def test_evaluation_before_and_after_is_printed_and_falls(run):
    rows = dict(re.findall(r"^(loss|perplexity|bits per byte) +(.*)$", run.stdout, re.MULTILINE))
    assert re.search(r"^evaluation +before +after$", run.stdout, re.MULTILINE)
    results = run.json("eval_results.json")
    for title, name in {
        "loss": "loss",
        "perplexity": "perplexity",
        "bits per byte": "bits_per_byte",
    }.items():
        before, after = map(float, rows[title].split())
        assert after == pytest.approx(results[f"eval_{name}"], abs=1e-3)
        assert before == pytest.approx(results[f"eval_before_{name}"], abs=1e-3)
    before, after = map(float, rows["loss"].split())
    assert before == pytest.approx(math.log(300), rel=0.1)  # the uniform guess
    assert after < before - 1


def test_results_are_written(run):
    train, evaluation = run.json("train_results.json"), run.json("eval_results.json")
    assert train["train_loss"] > 0
    assert train["train_runtime"] > 0
    assert train["train_tokens_per_second"] > 0
    assert run.json("all_results.json") == train | evaluation


def test_state_holds_the_whole_run(run):
    state = run.json("trainer_state.json")
    assert state["global_step"] == state["max_steps"] == STEPS
    assert state["num_input_tokens_seen"] > STEPS * 15 * BLOCK_SIZE  # 16 blocks, some shorter
    history = state["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS // 5
    assert losses[-1] < losses[0] - 1
    assert [e["step"] for e in history if "eval_loss" in e] == [
        STEPS // 2,
        STEPS,
    ]  # the last one is not repeated
    for entry in (e for e in history if "loss" in e):
        assert {"grad_norm", "learning_rate", "tokens_per_second", "epoch"} <= set(entry)


def test_the_config_that_ran_is_written_with_its_reasons(run):
    written = run.json("resolved_config.json")
    assert written["deepspeed"]["zero_optimization"]["stage"] == 3
    assert written["deepspeed"]["train_batch_size"] == 16
    reason = written["provenance"]["train_batch_size"]["detail"]
    assert reason == "micro-batch 8 x accumulation 1 x ranks 2"


def test_loss_curve_is_a_picture(run):
    from matplotlib.image import imread

    height, width = imread(run.folder / "loss_curve.png").shape[:2]
    assert width > height > 400


def test_progress_shows_loss_speed_and_time_left(run):
    bars = [line for line in re.split(r"[\r\n]", run.stderr) if line.startswith("train: ")]
    middle = [line for line in bars if f" {STEPS // 2}/{STEPS} " in line]
    assert middle, bars
    elapsed_left = r"\[\d+:\d\d<\d+:\d\d, +[\d.]+s?(tep)?/s(tep)?, loss=\d+\.\d+, tok/s=[\d,]+\]"
    assert re.search(elapsed_left, middle[-1]), middle[-1]


def test_completion_is_printed(run):
    assert "completion of 'def __init__(self,':\ndef __init__(self," in run.stdout
    assert str(run.folder) in run.stdout.split("completion of")[1]


def test_each_line_is_printed_by_one_rank(run):
    """Catches a line of ours, or a library's warning, that comes once per rank."""
    ours = [line.strip() for line in run.stdout.splitlines() if not line.startswith("[20")]
    assert sum(line.startswith("evaluation ") for line in ours) == 1
    assert sum(line.startswith("***** train metrics") for line in ours) == 1
    logged = [line for line in run.stderr.splitlines() if line.startswith(("INFO", "WARNING"))]
    assert len(logged) == len(set(logged)), logged
    for noise in ("Traceback", "Warning:", "[rank 1]", "overridden", "destroy_process_group"):
        assert noise not in run.stderr
        assert noise not in run.stdout


@pytest.fixture
def loaded(run):
    """Give tokenizer and model as transformers loads them, without anything of ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(run.folder), AutoModelForCausalLM.from_pretrained(
        run.folder
    )


def test_saved_model_has_the_loss_that_was_reported(run, loaded, monkeypatch):
    """By hand: tokenise what was held out, join, cut, mean over all targets; and what follows."""
    import datasets

    from dstrain.tasks.causal_lm.arguments import DataArguments
    from dstrain.tasks.causal_lm.sources import load_documents

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", run.cache / "datasets")
    tokenizer, model = loaded
    held_out = load_documents(DataArguments(train_file=str(run.corpus))).validation["text"]
    assert held_out
    tokens = [t for d in held_out for t in [*tokenizer(d)["input_ids"], tokenizer.eos_token_id]]
    total, num_targets = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens), BLOCK_SIZE):
            block = torch.tensor([tokens[start : start + BLOCK_SIZE]])
            if block.shape[1] < 2:
                continue
            logits = model(block).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(
                logits.double(), block[0, 1:], reduction="sum"
            ).item()
            num_targets += block.shape[1] - 1
    results = run.json("eval_results.json")
    assert results["eval_loss"] == pytest.approx(total / num_targets, rel=1e-5)
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    tokens_per_byte = len(tokens) / sum(len(document.encode()) for document in held_out)
    bits_per_byte = results["eval_loss"] * tokens_per_byte / math.log(2)
    assert results["eval_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-6)


def test_saved_tokenizer_gives_every_text_back(loaded):
    tokenizer, model = loaded
    sample = "    def f(self):\n\treturn 'ünïcödé', 1234\r\n"
    assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    assert len(tokenizer) == model.config.vocab_size == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_an_error_of_all_ranks_is_printed_once_by_rank_0(tmp_path):
    words = flags(
        tmp_path / "out", block_size=65, model_config=TINY_MODEL + ",max_position_embeddings=64"
    )
    done = launch([*LAUNCH_NOTHING_ELSE, *words], timeout=TIMEOUT_SECONDS)
    assert done.returncode != 0
    both = done.stdout + done.stderr
    assert both.count("at most 64 tokens") == 1, both
    assert done.stderr.count("dstrain: error: block_size=65") == 1
    assert "[rank 1]" not in both
    assert "Traceback" not in both


# Python imports a module of this name before anything else, here in rank 1 only: so that the
# command breaks in the middle of training without a hook for tests in it.
BREAKING_SITE = """
import os, pathlib, time
if os.environ.get("RANK") == "1":
    from transformers import trainer_callback

    class Breaks(trainer_callback.DefaultFlowCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                pathlib.Path("broke").write_text(str(time.time()))
                raise RuntimeError("rank 1 broke on purpose")
            return super().on_step_end(args, state, control, **kwargs)

    trainer_callback.DefaultFlowCallback = Breaks
"""


def test_a_rank_that_breaks_in_the_command_ends_the_others(tmp_path, run):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BREAKING_SITE)
    words = flags("out", train_file=run.corpus, max_steps=20, zero_stage=2)
    done = launch(
        [*LAUNCH_NOTHING_ELSE, *words],
        timeout=TIMEOUT_SECONDS,
        cwd=tmp_path,
        env={
            "HF_HOME": str(run.cache),
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        },
    )
    the_others_end(done, tmp_path, time.time(), where="on_step_end")
    assert "[rank 1] failed:\nTraceback" in done.stderr
    # What rank 0 sees of it is a consequence, and must not bury the cause.
    assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m dstrain` with an environment that says nothing of how to run it."""
    home = folder / "home"  # nothing is taken from, or left in, the user's caches
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "dstrain", *words],
        env={"HOME": str(home), "PATH": os.defpath},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Ops come from the environment's own folder, already built.
    assert "building" not in done.stderr
    assert not (home / ".cache" / "torch_extensions").exists()
    return done


def test_one_process_streams_a_jsonl_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"body": text(seed, 10), "n": seed}) for seed in range(40)]
    path.write_text("\n".join(rows) + "\n")
    words = flags(
        "out", train_file=path, text_column="body", streaming="true", max_steps=3, use_cpu="true"
    )
    done = python(tmp_path, *TRAIN, *words)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_loss"] < results["eval_before_loss"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert state["num_input_tokens_seen"] == 3 * 8 * BLOCK_SIZE
    assert "completion of" in done.stdout
    # Packed blocks are for what is read again; a stream leaves nothing behind but its tokenizer.
    packed = list((tmp_path / "home").rglob("packed-*"))
    assert len({path.name for path in packed if path.is_dir()}) <= 1, packed


def test_a_second_start_goes_on_where_the_first_ended(tmp_path):
    """The same command with ``auto``, first without and then with a checkpoint to go on from."""
    path = tmp_path / "text.txt"
    path.write_text("".join(text(seed, 20) for seed in range(20)))
    histories = []
    for max_steps in (4, 6):
        words = flags(
            "out",
            train_file=path,
            max_steps=max_steps,
            save_steps=2,
            save_total_limit=2,
            resume_from_checkpoint="auto",
            lr_scheduler_type="constant",
            use_cpu="true",
        )
        python(tmp_path, *TRAIN, *words)
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        assert state["global_step"] == max_steps
        histories.append({e["step"]: e["loss"] for e in state["log_history"] if "loss" in e})
    assert histories[1] == histories[0] | {s: histories[1][s] for s in (5, 6)}
    kept = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]


def test_one_process_trains_a_saved_model_further_on_parquet(tmp_path, run):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": [text(seed, 20) for seed in range(100, 120)]}), path)
    words = flags(
        "out",
        model_config=None,
        vocab_size=None,
        model_name_or_path=run.folder,
        train_file=path,
        max_steps=3,
        use_cpu="true",
        zero_stage=1,
    )
    python(tmp_path, *TRAIN, *words)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    # The same kind of text, so it begins where the first run ended.
    assert results["eval_before_loss"] == pytest.approx(
        run.json("eval_results.json")["eval_loss"], abs=0.2
    )
    assert results["eval_loss"] < results["eval_before_loss"]
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == run.json(name)
