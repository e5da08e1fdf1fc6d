"""What a checkpoint costs: training stall, bandwidth, memory, disk; beside transformers' Trainer.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --stages 2,3 --rounds 3 --report

How it measures and how to read it: `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import (
    ROOT,
    RunFailed,
    clean_up_when_terminated,
    load,
    machine,
    run_ranks,
)

CONTENDERS = ("async", "sync", "transformers")
STALL_GOAL = 0.10
LOAD_ALLOWANCE_BYTES = 100 * 10**6
REPORTS = ROOT / "benchmarks" / "reports"


@dataclass(frozen=True)
class Settings:
    """One process group: a contender that trains and saves, or that resumes.

    Attributes:
        contender: "async" and "sync" are dstrain, or "transformers".
        task: "save" or "load".
        stage: ZeRO stage.
        world_size: ranks.
        precision: "bf16" or "fp32".
        saves: checkpoints that a run writes.
        steps_between: optimizer steps between two of them.
        block_size: tokens per rank and step.
        folder: output_dir of the run.
        result: the file that rank 0 writes.
    """

    contender: str
    task: str
    stage: int
    world_size: int
    precision: str
    saves: int
    steps_between: int
    block_size: int
    folder: str
    result: str


def main() -> int:
    """Measure every contender in turn, several times; 1 when a goal is missed."""
    options = _parse()
    clean_up_when_terminated()
    started = time.monotonic()
    records = []
    for stage in options.stages:
        rounds: list[dict[str, Any]] = []
        for number in range(options.rounds):
            # The order alternates, so that a slow minute of the machine hits them in turn.
            order = options.contenders if number % 2 == 0 else options.contenders[::-1]
            rounds.append({name: _measure(options, name, stage) for name in order})
            print(
                f"stage {stage}, round {number + 1} of {options.rounds}: load {load()}", flush=True
            )
        records.append(summary(rounds, stage, options.world_size) | _kind(options, rounds))
    page = _page(records)
    print(page)
    print(f"{time.monotonic() - started:.0f} s in all")
    if options.report:
        REPORTS.mkdir(exist_ok=True)
        (REPORTS / "checkpoint_cpu.md").write_text(page)
    return int(any(verdict == "fail" for r in records for verdict in r["verdicts"].values()))


def _measure(options: argparse.Namespace, contender: str, stage: int) -> dict[str, Any]:
    """Train with saves, then resume from the last of them in new processes."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        # The checkpoint of a synchronous save is that of an asynchronous one.
        for task in ("save",) if contender == "sync" else ("save", "load"):
            settings = Settings(
                contender=contender,
                task=task,
                stage=stage,
                world_size=options.world_size,
                precision=options.precision,
                saves=options.saves,
                steps_between=options.steps_between,
                block_size=options.block_size,
                folder=str(Path(folder) / "run"),
                result=str(Path(folder) / "result.json"),
            )
            script = str(Path(__file__).with_name("checkpoint_rank.py"))
            run_ranks(
                [script, json.dumps(asdict(settings))],
                world_size=options.world_size,
                threads=1,
                deadline_seconds=options.deadline,
            )
            found[task] = json.loads(Path(settings.result).read_text())
    return found


def summary(rounds: Sequence[dict[str, Any]], stage: int, world_size: int) -> dict[str, Any]:
    """Compute medians over rounds and saves, ratios within rounds, and which goals are met."""
    rows: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        saves = [r[name]["save"] for r in rounds]
        loads = [r[name]["load"] for r in rounds if "load" in r[name]]
        rows[name] = {
            "stall_seconds": _median(s for save in saves for s in save["stall_seconds"]),
            "cost_seconds": _median(s for save in saves for s in save["cost_seconds"]),
            "write_seconds": _median(s for save in saves for s in save["write_seconds"]),
            "disk_bytes": saves[0]["disk_bytes"],
            "plain_write": _median(save["plain_write_seconds"] for save in saves),
            "save_memory": _median(save["memory_bytes"] for save in saves),
        }
        if not loads:
            continue
        rows[name] |= {
            "load_seconds": _median(one["load_seconds"] for one in loads),
            "verify_seconds": _median(one["verify_seconds"] for one in loads),
            "plain_read": _median(one["plain_read_seconds"] for one in loads),
            "load_memory": max(one["anonymous_bytes"] for one in loads),
            "load_resident": max(one["resident_bytes"] for one in loads),
            "read_bytes": loads[0]["read_bytes"],
        }
    verdicts = {}
    record: dict[str, Any] = {"stage": stage, "world_size": world_size, "rows": rows}
    if {"async", "transformers"} <= set(rows):
        ratios = [
            _median(r["async"]["save"]["stall_seconds"])
            / _median(r["transformers"]["save"]["stall_seconds"])
            for r in rounds
        ]
        record["stall_ratio"] = statistics.median(ratios)
        record["stall_ratios"] = ratios
        verdicts["stall"] = "pass" if record["stall_ratio"] <= STALL_GOAL else "fail"
    if "async" in rows:
        one = rounds[0]["async"]["load"]
        limit = one["created_bytes"] + one["largest_bytes"] + LOAD_ALLOWANCE_BYTES
        record |= {k: one[k] for k in ("created_bytes", "partition_bytes", "largest_bytes")}
        record["load_limit"] = limit
        verdicts["load"] = "pass" if rows["async"]["load_resident"] <= limit else "fail"
    return record | {"verdicts": verdicts}


def _median(values: Any) -> float:
    return float(statistics.median(list(values)))


_TITLES = [
    *("stage", "contender", "stall s", "cost s", "written after s", "MB on disk", "save MB/s"),
    *("plain write MB/s", "save memory MB", "load s", "verify s", "load MB/s", "plain read MB/s"),
    *("load memory MB", "load RSS MB"),
]


def _rows(record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, row in record["rows"].items():
        who = name if name == "transformers" else f"dstrain {name}"
        rows.append(
            [
                *(str(record["stage"]), who, f"{row['stall_seconds']:.3f}"),
                *(f"{row['cost_seconds']:.3f}", f"{row['write_seconds']:.2f}"),
                *(_mb(row["disk_bytes"]), _mb(row["disk_bytes"] / row["write_seconds"])),
                *(_mb(row["disk_bytes"] / row["plain_write"]), _mb(row["save_memory"])),
                *(_load_cells(row) if "load_seconds" in row else ["-"] * 6),
            ]
        )
    return rows


def _load_cells(row: dict[str, float]) -> list[str]:
    return [
        *(f"{row['load_seconds']:.3f}", f"{row['verify_seconds']:.3f}"),
        _mb(row["read_bytes"] / row["load_seconds"]),
        _mb(row["read_bytes"] / row["plain_read"]),
        *(_mb(row["load_memory"]), _mb(row["load_resident"])),
    ]


def _mb(number: float) -> str:
    return f"{number / 1e6:.0f}"


def _page(records: Sequence[dict[str, Any]]) -> str:
    """Write the report for people."""
    rows = [_TITLES, *(row for record in records for row in _rows(record))]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(_TITLES))
    goals = []
    for record in records:
        stage = f"- stage {record['stage']}:"
        if "stall_ratio" in record:
            ratios = ", ".join(f"{r:.3f}" for r in record["stall_ratios"])
            goals.append(
                f"{stage} stall of an asynchronous save / of transformers' save: "
                f"{record['stall_ratio']:.3f} (rounds: {ratios}; goal <= {STALL_GOAL}): "
                f"{record['verdicts']['stall']}"
            )
        if "load_limit" in record:
            sizes = [record[k] for k in ("created_bytes", "largest_bytes", "load_limit")]
            made, largest, limit = (f"{size / 1e6:.0f} MB" for size in sizes)
            goals.append(
                f"{stage} load peak above the engine before it <= {limit} (what loading creates of "
                f"the partition, {made}, + largest tensor, {largest}, + 100 MB): "
                f"{record['verdicts']['load']}"
            )
    return "\n".join(
        [
            "# What a checkpoint costs",
            "",
            "Written by `python benchmarks/checkpoint.py --report`; `benchmarks/README.md` says",
            "how to read it.",
            "",
            *dict.fromkeys(record["kind"] for record in records),
            "",
            *lines,
            "",
            *goals,
            "",
        ]
    )


def _kind(options: argparse.Namespace, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    facts = next(iter(rounds[0].values()))["save"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    host = machine()
    text = (
        f"- {facts['num_parameters'] / 1e6:.1f} million parameters, {options.precision}, "
        f"{options.world_size} ranks on {host['cores']} cores ({host['processor']}), "
        f"{options.rounds} alternating rounds of {options.saves} saves, "
        f"{options.steps_between} steps of {facts['step_seconds']:.2f} s between two; {versions}; "
        f"commit {host['commit']}, {host['time']}"
    )
    return {"kind": text}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What a checkpoint costs, beside transformers' Trainer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, default: Any, text: str, **more: Any) -> None:
        spellings = sorted({f"--{name}", f"--{name}".replace("_", "-")})
        more = {"type": type(default), "default": default, "help": text} | more
        parser.add_argument(*spellings, dest=name, **more)

    add("stages", [2, 3], "ZeRO stages", type=_integers)
    add("world_size", 2, "ranks")
    add("contenders", list(CONTENDERS), f"some of {','.join(CONTENDERS)}", type=_contenders)
    add("rounds", 3, "runs of each contender")
    add("saves", 4, "checkpoints of a run")
    add("steps_between", 8, "optimizer steps between two checkpoints")
    add("block_size", 32, "tokens per rank and step")
    add("precision", "bf16", "number format", choices=("bf16", "fp32"))
    add("disk", tempfile.gettempdir(), "where checkpoints go")
    add("deadline", 300.0, "seconds after which a run is ended")
    parser.add_argument("--report", action="store_true", help=f"write {REPORTS}/checkpoint_cpu.md")
    return parser.parse_args()


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _contenders(text: str) -> list[str]:
    names = [part for part in text.split(",") if part]
    if unknown := [n for n in names if n not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not in {', '.join(CONTENDERS)}")
    return names


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RunFailed as error:
        sys.exit(str(error))
