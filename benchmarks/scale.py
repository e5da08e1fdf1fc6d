"""Measure what a checkpoint of very many ranks or parameters costs one rank.

    python benchmarks/scale.py
    python benchmarks/scale.py --ranks 512 --parameters 1000 --stages 3

One process makes the files that so many ranks would write (of tiny parameters, so that the figures
are of the bookkeeping alone), and then does what one of them does, step by step, with the code that
real ranks run. Then two real ranks train models of 12 and of 84 parameters, and the objects that
they exchange are counted in each part of the run. How to read it: `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import ROOT, load, machine, run_ranks

sys.path.insert(0, str(ROOT))

import torch

from dstrain.checkpoint import content, folders
from dstrain.checkpoint.load import reads_by_file
from dstrain.checkpoint.manifest import Manifest, check_files, read_manifest, write_manifest
from dstrain.checkpoint.slice_agreement import Agreement
from dstrain.checkpoint.slice_index import (
    check_coverage,
    check_whole,
    header_faults,
    read_index,
    table_from_headers,
)
from dstrain.checkpoint.slice_table import RankSlices, even_run
from dstrain.checkpoint.table_file import write_table
from dstrain.core.files import FileRecord
from dstrain.models import Stored, write_tensor_file

REPORTS = ROOT / "benchmarks" / "reports"
GOAL_SECONDS, GOAL_BYTES = 10.0, 200 * 2**20
ADAM = ("exp_avg", "exp_avg_sq", "master")
# (ranks, parameters): a large cluster, and a model of very many parameters.
CASES = ((4096, 400), (4, 100_000))


@dataclass
class Case:
    """A checkpoint of simulated ranks.

    Attributes:
        world_size: ranks that write it.
        num_parameters: of the model.
        stage: ZeRO stage, which says how parameters are divided.
        shapes: of the parameters; each has two elements for each rank.
        seconds: step -> seconds.
        counts: figure -> number.
    """

    world_size: int
    num_parameters: int
    stage: int
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Name the parameters."""
        size = 2 * self.world_size if self.world_size > 100 else 16
        self.shapes = {
            f"model.layers.{i // 100}.mlp.experts.{i % 100}.down_proj.weight": (size,)
            for i in range(self.num_parameters)
        }

    def slices(self, rank: int, world_size: int = 0) -> RankSlices:
        """Return the slices of a rank, of this or of another number of ranks."""
        world_size = world_size or self.world_size
        spans = {}
        size = next(iter(self.shapes.values()))[0]
        share = -(-size * self.num_parameters // world_size)
        first = 0 if self.stage == 3 else rank * share // size
        last = self.num_parameters if self.stage == 3 else -(-(rank + 1) * share // size)
        for number, name in enumerate(list(self.shapes)[first:last], start=first):
            if self.stage == 3:
                start, numel = even_run(size, world_size, rank)
            else:
                start = min(max(rank * share - number * size, 0), size)
                numel = min(max((rank + 1) * share - number * size, 0), size) - start
            if numel:
                spans[name] = start, numel
        return RankSlices(spans, dict.fromkeys(spans, ADAM), {n: {"step": 9.0} for n in spans})

    def timed(self, name: str) -> Timer:
        """Return a timer that notes its seconds as ``name``."""
        return Timer(self.seconds, name)


class Timer:
    """A context manager that notes the seconds of its block."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        """Note them under a name."""
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        """Start."""
        gc.collect()
        self._start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._seconds[self._name] = time.monotonic() - self._start


@dataclass(frozen=True)
class Shard:
    """Describe the run of a parameter that a resuming rank needs."""

    name: str
    start: int
    stop: int
    value_key: str = "master"

    def tensor_keys(self) -> list[str]:
        """Return the keys of its tensors."""
        return list(ADAM)


def main() -> int:
    """Measure every case; 1 when a goal is missed."""
    options = _parse()
    cases = []
    for world_size, num_parameters in options.cases:
        for stage in options.stages:
            case = Case(world_size, num_parameters, stage)
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                measure(case, Path(folder))
            cases.append(case)
            print(_lines(case), flush=True)
    exchanged = exchanges()
    print(exchanged, flush=True)
    missed = [m for case in cases for m in _missed(case)]
    for line in missed:
        print(f"goal missed: {line}")
    if options.report:
        REPORTS.mkdir(exist_ok=True)
        text = f"{machine()}; load {load()}\n\n" + "\n".join([*map(_lines, cases), exchanged])
        (REPORTS / "scale.md").write_text(text + "\n")
    return 1 if missed else 0


def measure(case: Case, output_dir: Path) -> None:
    """Write a checkpoint as all ranks would, then resume from it as one of them does."""
    rank = case.world_size // 2
    mine = case.slices(rank)
    staging = folders.new_staging(output_dir, 1)
    files = _write_files(case, staging)

    # --- the commit: what one rank does, and what the main rank does besides
    main = Agreement(case.slices(0), case.shapes, 0, case.world_size)
    with case.timed("commit, a rank: compare its slices and report"):
        other = Agreement(mine, case.shapes, rank, case.world_size)
        follow = other.follow(main.reference()).bool().tolist()
        report = other.report(main.reference(), follow)
    case.counts["bytes that a rank reports"] = len(report)
    reports = []
    for number in range(case.world_size):
        theirs = Agreement(case.slices(number), case.shapes, number, case.world_size)
        reports.append(theirs.report(main.reference(), follow))
    manifest = Manifest(
        step=1, world_size=case.world_size, stage=case.stage, precision="bf16", resumable=True,
        has_weights=False, created="", parameters=case.shapes, optimized=tuple(case.shapes),
    )  # fmt: skip
    with case.timed("commit, main rank: merge, check and write the table"):
        table = main.merged(main.reference(), reports, follow)
        check_whole(table, manifest, may_have_copies=False)
        files[content.TABLE] = write_table(staging / content.TABLE, table, case.shapes)
    with case.timed("commit, main rank: write the manifest"):
        manifest = Manifest(**{**vars(manifest), "files": files})
        write_manifest(staging, manifest)
        folder = folders.commit(staging, output_dir, 1)
    case.counts["bytes of the table"] = (folder / content.TABLE).stat().st_size

    # --- the resume
    share = rank, case.world_size
    with case.timed("resume, a rank: read the manifest"):
        manifest = read_manifest(folder)
    with case.timed("resume, a rank: verify its share of the files"):
        assert check_files(folder, manifest, share=share) == []
    before = _memory()
    with case.timed("resume, a rank: read the table"):
        index = read_index(folder, manifest)
    case.counts["bytes of memory that the table takes"] = _memory() - before
    with case.timed("resume, a rank: check the table and its share of headers"):
        assert check_coverage(index, manifest) == []
        assert header_faults(folder, manifest, index, share) == []
    for world_size in (case.world_size, max(1, case.world_size // 8)):
        where = min(rank, world_size - 1)
        spans = case.slices(where, world_size).spans.items()
        shards: list[Any] = [Shard(n, start, start + numel) for n, (start, numel) in spans]
        with case.timed(f"resume on {world_size} ranks, a rank: find what to read"):
            reads = reads_by_file(shards, index)
        case.counts[f"files that a rank opens on {world_size} ranks"] = len(reads)
    if case.world_size * case.num_parameters <= 600_000:
        with case.timed("for comparison: index all headers, as before there was a table"):
            table_from_headers(folder, manifest)
    with case.timed("rotation, main rank: remove the checkpoint"):
        shutil.rmtree(folder)


def exchanges() -> str:
    """Return a table of the objects that two real ranks exchange in each part of a run."""
    results = []
    for layers in (1, 9):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"layers": layers, "stage": 3, "result": f"{folder}/result"}
            script = str(ROOT / "benchmarks" / "scale_rank.py")
            arguments = [script, json.dumps(settings)]
            run_ranks(arguments, world_size=2, threads=1, deadline_seconds=300)
            results.append(json.loads(Path(settings["result"]).read_text()))
    sizes = [result["parameters"] for result in results]
    lines = [
        "### Objects that ranks exchange, ZeRO stage 3",
        "",
        "| part of the run | gathers | bytes from a rank | at 4,096 ranks | broadcasts | bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for part in results[0]["counts"]:
        small, large = (result["counts"][part] for result in results)
        sent = f"{small[1]:,}" if small[1] == large[1] else f"{small[1]:,} to {large[1]:,}"
        told = f"{small[3]:,}" if small[3] == large[3] else f"{small[3]:,} to {large[3]:,}"
        total = f"{large[1] * 4096 / 1e6:.1f} MB"
        lines.append(f"| {part} | {large[0]} | {sent} | {total} | {large[2]} | {told} |")
    lines += ["", f"Where two figures stand, the model has {sizes[0]} and {sizes[1]} parameters."]
    return "\n".join([*lines, "Steps that are not listed exchange none.", ""])


def _write_files(case: Case, staging: Path) -> dict[str, FileRecord]:
    """Write the files of all ranks; note the seconds that one takes."""
    files = {}
    start = time.monotonic()
    for rank in range(case.world_size):
        mine = case.slices(rank)
        tensors = [
            Stored.of(f"{key}/{name}", torch.zeros(span[1]))
            for name, span in mine.spans.items()
            for key in ADAM
        ]
        name = content.slice_file(rank)
        about = content.metadata_of(mine.spans, mine.scalars)
        files[name] = write_tensor_file(staging / name, tensors, about)
    case.seconds["commit, a rank: write its slices"] = (time.monotonic() - start) / case.world_size
    return files


def _memory() -> int:
    """Return the bytes that this process has in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _lines(case: Case) -> str:
    title = f"{case.world_size} ranks, {case.num_parameters} parameters, ZeRO stage {case.stage}"
    rows = [f"| {name} | {value:.3f} s |" for name, value in case.seconds.items()]
    rows += [f"| {name} | {value:,.0f} |" for name, value in case.counts.items()]
    return "\n".join([f"### {title}", "", "| step | figure |", "|---|---:|", *rows, ""])


def _missed(case: Case) -> Iterator[str]:
    for name, seconds in case.seconds.items():
        if seconds > GOAL_SECONDS and not name.startswith("for comparison"):
            yield f"{case.world_size} ranks, stage {case.stage}: {name}: {seconds:.1f} s"
    if case.counts["bytes of memory that the table takes"] > GOAL_BYTES:
        yield f"{case.world_size} ranks, stage {case.stage}: memory of the table"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, help="number of ranks; with --parameters")
    parser.add_argument("--parameters", type=int, help="number of parameters; with --ranks")
    parser.add_argument("--stages", default="2,3", help="ZeRO stages (default %(default)s)")
    parser.add_argument("--folder", help="where to make the files (default: the temporary folder)")
    parser.add_argument("--report", action="store_true", help="write reports/scale.md")
    options = parser.parse_args()
    options.stages = [int(stage) for stage in options.stages.split(",")]
    options.cases = CASES
    if options.ranks and options.parameters:
        options.cases = ((options.ranks, options.parameters),)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
