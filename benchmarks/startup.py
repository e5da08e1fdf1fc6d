"""How long dstrain takes to start: importing it, its commands, the first step of a training.

    python benchmarks/startup.py [--repeats 5] [--report]

Every figure is the median over processes of their own, from before they start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import (
    ROOT,
    clean_up_when_terminated,
    die_with_parent,
    end,
    environment,
    load,
    machine,
    table,
)

REPORT = ROOT / "benchmarks" / "reports" / "startup.json"
TEXT_BYTES = 60_000
# The settings of `hand_written.py` as a script; the vocabulary is that of the trained tokenizer.
TRAIN_FLAGS = [
    *("--model_config", "llama:hidden_size=64,intermediate_size=176,num_hidden_layers=4,"),
    *("--block_size", "128", "--vocab_size", "512", "--validation_percentage", "0"),
    *("--per_device_train_batch_size", "4", "--max_steps", "4", "--logging_steps", "1"),
    *("--learning_rate", "1e-3", "--report_to", "none", "--completion_prompt", ""),
]
TRAIN_FLAGS[1] += "num_attention_heads=4,num_key_value_heads=4,tie_word_embeddings=true"


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: what the table calls it.
        command: what follows the interpreter.
        goal_seconds: None for figures that are only there to compare with.
        until: the first output that ends the measurement; "" waits for the process to end.
    """

    name: str
    command: list[str]
    goal_seconds: float | None = None
    until: str = ""


@dataclass(frozen=True)
class Timing:
    """Seconds of one process until the measurement ended, and its processor time until it did."""

    wall: float
    cpu: float


def main() -> int:
    """Time every case, print the table; 1 when a goal is missed."""
    options = _parse()
    clean_up_when_terminated()
    load_before = load()
    with tempfile.TemporaryDirectory() as folder:
        cases = _cases(Path(folder))
        results: dict[str, list[Timing]] = {case.name: [] for case in cases}
        # The first round fills caches (bytecode, tokenizer, packed text) and is shown apart.
        for _ in range(options.repeats + 1):
            for case in cases:
                results[case.name].append(_time(case, folder, deadline=options.deadline))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    records = [_record(case, results[case.name]) for case in cases]
    print(table([_TITLES, *(_row(record) for record in records)]))
    print(f"median of {options.repeats} processes, in seconds; load {load_before}..{load()}")
    if options.report:
        REPORT.parent.mkdir(exist_ok=True)
        loads = {"load_before": load_before, "load_after": load()}
        report = {"machine": machine(), **loads, "cases": records}
        REPORT.write_text(json.dumps(report, indent=1) + "\n")
        print(f"report: {REPORT}")
    return int(any(record["passed"] is False for record in records))


def _cases(folder: Path) -> list[Case]:
    text = folder / "text.txt"
    text.write_bytes(_text())
    train = ["-m", "dstrain", "train", "causal-lm", "--train_file", str(text)]
    train += ["--output_dir", str(folder / "out"), *TRAIN_FLAGS]
    hand = str(Path(__file__).with_name("hand_written.py"))
    return [
        Case("python (nothing)", ["-c", "pass"]),
        Case("import dstrain", ["-c", "import dstrain"], 0.15),
        Case("dstrain --help", ["-m", "dstrain", "--help"], 0.4),
        Case("dstrain explain", ["-m", "dstrain", "explain"], 1.0),
        Case("import torch, deepspeed, transformers", ["-c", _IMPORTS]),
        Case("first step, hand-written", [hand, str(text)], until="step 1 "),
        Case("first step, dstrain train", train, until="step 1 "),
    ]


_IMPORTS = "import torch, deepspeed; from transformers import LlamaForCausalLM"


def _time(case: Case, folder: str, *, deadline: float) -> Timing:
    """Run one process to the end of its measurement, then end it.

    Raises:
        RuntimeError: it failed, or did not get there in time.
    """
    extra = _environment(folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *case.command],
            env=environment(extra),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
            text=True,
        )
        try:
            reached = False
            while not reached and time.perf_counter() - started < deadline:
                running = process.poll() is None
                if case.until:
                    seen = os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")
                    reached = case.until in seen
                elif not running:
                    reached = process.returncode == 0
                if not running:
                    break
                time.sleep(0.01 if case.until else 0.001)
            wall = time.perf_counter() - started
        finally:
            end(process)
        if not reached:
            log.seek(0)
            raise RuntimeError(f"{case.name}: status {process.returncode}\n{log.read()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(wall, cpu)


def _record(case: Case, timings: Sequence[Timing]) -> dict[str, Any]:
    first, rest = timings[0], timings[1:]
    median = statistics.median(t.wall for t in rest)
    goal = case.goal_seconds
    return {
        "name": case.name,
        "seconds": median,
        "range_seconds": [min(t.wall for t in rest), max(t.wall for t in rest)],
        "cpu_seconds": statistics.median(t.cpu for t in rest),
        "first_seconds": first.wall,
        "goal_seconds": goal,
        "passed": None if goal is None else median < goal,
    }


_TITLES = ["what", "median", "range", "cpu time", "first run", "goal", "verdict"]


def _row(record: Mapping[str, Any]) -> list[str]:
    low, high = record["range_seconds"]
    goal, passed = record["goal_seconds"], record["passed"]
    return [
        record["name"],
        f"{record['seconds']:.3f}",
        f"{low:.3f}..{high:.3f}",
        f"{record['cpu_seconds']:.3f}",
        f"{record['first_seconds']:.3f}",
        "-" if goal is None else f"< {goal}",
        "-" if passed is None else "pass" if passed else "fail",
    ]


def _environment(folder: str) -> dict[str, str]:
    """Make the environment of one rank with caches of this benchmark's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return one_rank | place | {"HF_HOME": str(Path(folder) / "hf"), "OMP_NUM_THREADS": "1"}


def _text() -> bytes:
    """Return Python source that every machine has."""
    return b"\n\n".join(
        Path(f"{os.path.dirname(os.__file__)}/{name}.py").read_bytes()
        for name in ("argparse", "dataclasses")
    )[:TEXT_BYTES]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How long dstrain takes to start.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5, help="processes per figure")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds for one process")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT}")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats is at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
