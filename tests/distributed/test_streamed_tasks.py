"""Streams of pairs and of conversations: a run that goes on is the one that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dstrain.core.ranks import barrier
from tests.cli.corpus import TINY_MODEL
from tests.cli.test_launch_tasks import TINY_T5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a cache of its own, shared by all ranks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(task: str, folder: Path, rows: Path, **given: Any) -> dict[str, Any]:
    """Run a job as the command does; return its record."""
    values: dict[str, Any] = {
        "output_dir": folder, "train_file": rows, "streaming": True, "vocab_size": 300,
        "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
        "validation_percentage": 15, "disable_tqdm": True, "zero_stage": "2",
    }  # fmt: skip
    from dstrain.cli.flags import make_parser, parse
    from dstrain.cli.train import find_task

    found = find_task(task)
    classes = found.argument_classes()
    words = [w for n, v in (values | given).items() for w in (f"--{n}", str(v))]
    _, instances = parse(make_parser(task, "", classes), words, classes)
    found.run(*instances)
    barrier()
    record: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return record


def losses(record: dict[str, Any]) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in record["log_history"] if "loss" in e]


@pytest.mark.ranks(2, timeout=240)
def test_streamed_jobs_train_and_go_on(tmp_path: Path, rank: int, cache: None) -> None:
    """Pairs; conversations, packed or not; what is held out is what the stream begins with."""
    pairs, chat = tmp_path / "pairs.jsonl", tmp_path / "chat.jsonl"
    if rank == 0:
        lines = [{"source": f"value {i} of {i % 7}", "target": f"index {i}"} for i in range(60)]
        pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = [{"prompt": line["source"], "completion": line["target"]} for line in lines]
        chat.write_text("".join(json.dumps(line) + "\n" for line in lines))
    barrier()
    t5 = {"model_config": TINY_T5, "max_source_length": 16, "max_target_length": 6}
    llama = {
        "model_config": TINY_MODEL, "data_format": "chat", "block_size": 48, "completion_tokens": 4
    }  # fmt: skip
    for name, task, rows, given in (
        ("pairs", "seq2seq", pairs, t5),
        ("chat", "causal-lm", chat, llama),
        ("packed", "causal-lm", chat, llama | {"packing": True}),
    ):
        whole = run(task, tmp_path / name, rows, **given)
        evaluations = [e["eval_loss"] for e in whole["log_history"] if "eval_loss" in e]
        assert len(evaluations) == 1
        start = tmp_path / name / "checkpoint-2"
        again = run(
            task, tmp_path / f"{name}-again", rows, resume_from_checkpoint=start, **given
        )  # fmt: skip
        assert losses(again) == losses(whole)
        assert [e["eval_loss"] for e in again["log_history"] if "eval_loss" in e] == evaluations
