"""Steps per second of dstrain's Trainer against a hand-written DeepSpeed loop.

    python benchmarks/step.py
    python benchmarks/step.py --stages 1,2,3 --world_sizes 1,2 --contenders dstrain,control --report

How it measures and how to read it: `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import math
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
    has_gpu,
    load,
    machine,
    run_ranks,
    table,
    wait_until_quiet,
)

GOAL = 0.98
MODELS = ("tiny", "small", "base", "large")
CONTENDERS = ("dstrain", "transformers", "control")
REPORTS = ROOT / "benchmarks" / "reports"
LOSS_TOLERANCE = 2e-3  # relative; the sums of gradient norms run in different orders


@dataclass(frozen=True)
class Settings:
    """One run: a contender's blocks of steps between blocks of the hand-written loop.

    Attributes:
        contender: who is compared with the hand-written loop.
        baseline: which hand-written loop: "plain" or "weighted".
        stage: ZeRO stage.
        world_size: ranks.
        model: size of the model.
        block_size: tokens per sample.
        micro_batch: samples per rank in a forward pass.
        accumulation: micro-batches per optimizer step.
        steps_per_block: optimizer steps between two changes of loop.
        logging_steps: optimizer steps between two logs, for both loops.
        blocks: measured blocks of each loop, the discarded first ones not counted.
        precision: "fp32", "bf16", or "auto": bf16 where there is a GPU.
        device: "cpu", or "auto": a GPU where there is one.
        hand_first: whether the hand-written loop's engine is built before the contender's. The
            order matters: of two equal loops the first built has been up to 2% slower.
        profile: "" or the file for the profile of rank 0's trainer blocks.
        result: the file that rank 0 writes.
    """

    contender: str
    baseline: str
    stage: int
    world_size: int
    model: str
    block_size: int
    micro_batch: int
    accumulation: int
    steps_per_block: int
    logging_steps: int
    blocks: int
    precision: str
    device: str
    hand_first: bool
    profile: str
    result: str

    @property
    def num_steps(self) -> int:
        """Count the optimizer steps of each of the two loops."""
        return self.steps_per_block * (self.blocks + 1)


def main() -> int:
    """Run every combination, print a line for each, report; 1 when a goal is missed."""
    options = _parse()
    clean_up_when_terminated()
    rows, records = [_TITLES], []
    started = time.monotonic()
    for world_size in options.world_sizes:
        for stage in options.stages:
            for contender in options.contenders:
                record = _measure(options, contender, stage, world_size)
                records.append(record)
                if options.report:
                    _report(record)
                rows.append(_row(record))
                print("  ".join(rows[-1]), flush=True)
    print(f"\n{_heading(options, records)}\n{table(rows)}")
    print(_NOTES)
    print(f"{time.monotonic() - started:.0f} s in all")
    return int(any(r["verdict"] in ("fail", "error") for r in records))


def _measure(
    options: argparse.Namespace, contender: str, stage: int, world_size: int
) -> dict[str, Any]:
    """Measure two runs, one for each order of building, in own processes, as one record."""
    runs: list[dict[str, Any]] = []
    for hand_first in (False, True):
        run = _run(options, contender, stage, world_size, hand_first=hand_first)
        runs.append(run)
        if "pairs" not in run:
            return run
    pairs = [pair for run in runs for pair in run["pairs"]]
    return {
        **runs[0],
        "blocks": len(pairs),
        "pairs": pairs,
        "load_after": runs[-1]["load_after"],
        "loss_difference": max(run["loss_difference"] for run in runs),
        **summary(pairs, contender),
    }


def _run(
    options: argparse.Namespace, contender: str, stage: int, world_size: int, *, hand_first: bool
) -> dict[str, Any]:
    """Run once; return a record of the report."""
    order = "hand-first" if hand_first else "hand-second"
    profile = f"{options.profile}.{contender}-{stage}-{world_size}-{order}"
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            contender=contender,
            baseline=options.baseline,
            stage=stage,
            world_size=world_size,
            model=options.model,
            block_size=options.block_size,
            micro_batch=options.micro_batch,
            accumulation=options.accumulation,
            steps_per_block=options.steps_per_block,
            logging_steps=options.logging_steps,
            blocks=options.blocks // 2,
            precision=options.precision,
            device=options.device,
            hand_first=hand_first,
            profile=options.profile and profile,
            result=str(Path(folder) / "result.json"),
        )
        left_out = ("result", "hand_first")
        record: dict[str, Any] = {k: v for k, v in asdict(settings).items() if k not in left_out}
        wait_until_quiet(options.quiet, patience_seconds=options.patience)
        record["load_before"] = load()
        script = str(Path(__file__).with_name("step_rank.py"))
        try:
            run_ranks(
                [script, json.dumps(asdict(settings))],
                world_size=world_size,
                threads=options.threads,
                deadline_seconds=options.deadline,
                keep_memory=True,
            )
            record |= json.loads(Path(settings.result).read_text())
        except RunFailed as error:
            return record | {"verdict": "error", "error": str(error)}
        record["load_after"] = load()
    return record


def summary(pairs: Sequence[dict[str, float]], contender: str) -> dict[str, Any]:
    """Compute medians and quartiles of the ratio of steps per second within each pair of blocks."""
    ratios = [p["hand_seconds"] / p["trainer_seconds"] for p in pairs]
    best = min(p["hand_seconds"] for p in pairs) / min(p["trainer_seconds"] for p in pairs)
    cpu_ratios = [p["trainer_cpu_seconds"] / p["hand_cpu_seconds"] for p in pairs]
    ratio = statistics.median(ratios)
    interval = median_interval(ratios)
    if contender != "dstrain":
        verdict = ""
    elif ratio >= GOAL:
        verdict = "pass"
    else:
        verdict = "fail" if interval[1] < GOAL else "unclear"
    return {
        "ratio": ratio,
        "ratio_interval": interval,
        "ratio_quartiles": quartiles(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "best_ratio": best,
        "cpu_ratio": statistics.median(cpu_ratios),
        "verdict": verdict,
    }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Compute the first and third quartile; the value itself when there is only one."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute where the true median lies with 95% confidence, whatever the distribution.

    The number of values below it is binomial, so the interval runs between the order statistics
    1.96 standard deviations, sqrt(n) / 2 each, to both sides of the middle one.
    """
    ordered, count = sorted(values), len(values)
    reach = 0.98 * count**0.5
    low = max(0, math.floor(count / 2 - reach))
    high = min(count - 1, math.ceil(count / 2 + reach) - 1)
    return ordered[low], ordered[high]


_TITLES = [
    *("ranks", "stage", "contender", "hand ms", "its ms", "ratio", "95% interval"),
    *("quartiles", "best", "cpu time", "same loss", "load", "verdict"),
]
_NOTES = f"""
hand ms, its ms: median time of an optimizer step. ratio: its steps per second over those of the
hand-written loop, the median over pairs of neighbouring blocks, with the 95% interval of that
median and the quartiles of the pairs; the goal for dstrain is {GOAL} or more ("unclear": less, but
the interval reaches it). best: the ratio of the fastest block of each. cpu time: its processor
time over the hand-written loop's. "control" is the hand-written loop against itself."""


def _row(record: dict[str, Any]) -> list[str]:
    first = [str(record["world_size"]), str(record["stage"]), record["contender"]]
    if "missing" in record:
        return [*first, *["-"] * 9, record["missing"]]
    if "error" in record:
        print(record["error"], file=sys.stderr)
        return [*first, *["-"] * 9, "error"]
    hand, its = (
        _milliseconds(record, side) if "pairs" in record else record[f"{side}_ms"]
        for side in ("hand", "trainer")
    )
    low, high = record["ratio_interval"]
    first_quartile, third_quartile = record["ratio_quartiles"]
    return [
        *first,
        f"{hand:.1f}",
        f"{its:.1f}",
        f"{record['ratio']:.3f}",
        f"{low:.3f}..{high:.3f}",
        f"{first_quartile:.2f}..{third_quartile:.2f}",
        f"{record['best_ratio']:.3f}",
        f"{record['cpu_ratio']:.3f}",
        "yes" if record["loss_difference"] <= LOSS_TOLERANCE else "NO",
        f"{record['load_before']}..{record['load_after']}",
        record["verdict"] or "-",
    ]


def _heading(options: argparse.Namespace, records: Sequence[dict[str, Any]]) -> str:
    seen: dict[str, Any] = next((r for r in records if "num_parameters" in r), {})
    parameters = seen.get("num_parameters", 0) / 1e6
    return (
        f"{options.model} model ({parameters:.1f} million parameters, {seen.get('format', '?')}), "
        f"{options.micro_batch} x {options.block_size} tokens per rank and micro-batch, "
        f"{options.accumulation} micro-batch(es) per step; {options.blocks} pairs of blocks of "
        f"{options.steps_per_block} steps; {options.baseline} hand-written loop; "
        f"{seen.get('device_name', 'no run succeeded')}"
    )


def _report(record: dict[str, Any]) -> None:
    """Put a run into the report of its kind of device, in the place of an earlier one like it."""
    if "device_type" not in record:
        return
    path = REPORTS / f"step_{record['device_type']}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [run for run in runs if any(run[key] != record[key] for key in _SAME_RUN)]
    medians = {f"{side}_ms": _milliseconds(record, side) for side in ("hand", "trainer")}
    kept = {k: v for k, v in record.items() if k not in ("pairs", *_LOSSES)} | medians | machine()
    runs = sorted([*runs, kept], key=lambda run: [str(run[k]) for k in _SAME_RUN])
    REPORTS.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(run) for run in runs)
    path.write_text(f'{{"goal": {GOAL}, "runs": [\n{lines}\n]}}\n')
    path.with_suffix(".md").write_text(_page(runs))


def _page(runs: Sequence[dict[str, Any]]) -> str:
    """Write the report for people: how it was measured, and a row per run."""
    rows = [_TITLES, *map(_row, runs)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(_TITLES))
    kinds = sorted({_kind(run) for run in runs})
    return "\n".join(
        [
            "# Steps per second against a hand-written DeepSpeed loop",
            "",
            "Written by `python benchmarks/step.py --report`; `benchmarks/README.md` says how to",
            "read it. Every row comes from two runs in which the two loops alternate.",
            "",
            *(f"- {kind}" for kind in kinds),
            "",
            *lines,
            "",
        ]
    )


def _kind(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"{run['model']} model, {run['num_parameters'] / 1e6:.1f} million parameters, "
        f"{run['format']}, {run['micro_batch']} x {run['block_size']} tokens per rank, "
        f"{run['blocks']} pairs of blocks of {run['steps_per_block']} steps, {run['baseline']} "
        f"hand-written loop, {run['device_name']}, {run['threads']} thread(s) per rank, {versions}"
    )


def _milliseconds(record: dict[str, Any], side: str) -> float:
    """Format the median time of an optimizer step of one of the two loops."""
    spans = [p[f"{side}_seconds"] for p in record["pairs"]]
    return 1000 * statistics.median(spans) / float(record["steps_per_block"])


_LOSSES = ("hand_losses", "trainer_losses")


_SAME_RUN = (
    *("model", "block_size", "micro_batch", "accumulation", "format", "baseline"),
    *("world_size", "stage", "contender"),
)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Steps per second of dstrain against a hand-written DeepSpeed loop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, default: Any, text: str, **more: Any) -> None:
        spellings = sorted({f"--{name}", f"--{name}".replace("_", "-")})
        more = {"type": type(default), "default": default, "help": text} | more
        parser.add_argument(*spellings, dest=name, **more)

    add("stages", [1, 2, 3], "ZeRO stages, such as 0,1,2,3", type=_integers)
    add("world_sizes", [1, 2], "numbers of ranks", type=_integers)
    add("contenders", ["dstrain"], f"some of {','.join(CONTENDERS)}", type=_contenders)
    add("baseline", "plain", "the hand-written loop", choices=("plain", "weighted"))
    add("steps_per_block", 0, "optimizer steps between two changes of loop; 0: 2, on GPUs 20")
    add("logging_steps", 20, "optimizer steps between two logs, for both loops")
    add("blocks", 0, "measured blocks of each loop, in two runs; 0: 80, on GPUs 20")
    add("model", "small", "size of the model", choices=MODELS)
    add("block_size", 128, "tokens per sample")
    add("micro_batch", 1, "samples per rank in a forward pass")
    add("accumulation", 1, "micro-batches per optimizer step")
    add("precision", "auto", "number format", choices=("auto", "fp32", "bf16"))
    add("device", "auto", "where to run", choices=("auto", "cpu"))
    add("threads", 1, "threads per rank for computing on the CPU")
    add("deadline", 300.0, "seconds after which a run is ended")
    add("quiet", 0.0, "before each run wait until at most this many other processes are running")
    add("patience", 0.0, "seconds to wait for that at most")
    add("profile", "", "write cProfile files of the trainer's blocks with this beginning")
    parser.add_argument(
        "--report", action="store_true", help=f"update {REPORTS}/step_<device>.json"
    )
    options = parser.parse_args()
    # Other jobs disturb neighbours in time alike, so on a CPU many short blocks are best. On a GPU
    # a block must be long for the wait at its end not to count.
    gpu = options.device != "cpu" and has_gpu()
    options.steps_per_block = options.steps_per_block or (20 if gpu else 2)
    options.blocks = options.blocks or (20 if gpu else 80)
    return options


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _contenders(text: str) -> list[str]:
    names = [part for part in text.split(",") if part]
    if unknown := [n for n in names if n not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not in {', '.join(CONTENDERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
