"""Measure memory, open files and threads over 2,000 steps with evaluations and saves.

    python benchmarks/long_run.py --report
    python benchmarks/long_run.py --stages 2,3 --steps 500 --every 50

Every few steps each rank notes its resident memory, open file descriptors and threads, outside of
evaluations and saves. After the first tenth of the run none of them may grow. How to read it:
`benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ROOT, clean_up_when_terminated, load, machine, run_ranks

REPORTS = ROOT / "benchmarks" / "reports"
FIGURES = {"resident_mb": "resident memory, MB", "files": "open files", "threads": "threads"}
# Memory may stray by what allocators keep; files and threads may not grow at all.
GOALS = {"resident_mb": 8.0, "files": 0.0, "threads": 0.0}


@dataclass(frozen=True)
class Growth:
    """A figure of one rank early and late in a run.

    Attributes:
        stage: ZeRO stage.
        rank: the rank.
        figure: name of the figure.
        early: median of the steps from a tenth to two fifths of the run.
        late: median of the last three tenths.
    """

    stage: int
    rank: int
    figure: str
    early: float
    late: float

    @property
    def is_flat(self) -> bool:
        """Tell whether the figure has not grown."""
        return self.late - self.early <= GOALS[self.figure]


def main() -> int:
    """Run, print what grew, and draw the curves; 1 when a goal is missed."""
    options = _parse()
    clean_up_when_terminated()
    curves: dict[tuple[int, int], list[dict[str, float]]] = {}
    for stage in options.stages:
        for rank, curve in enumerate(_run(options, stage)):
            curves[stage, rank] = curve
    found = [
        _growth(stage, rank, figure, curve)
        for (stage, rank), curve in curves.items()
        for figure in FIGURES
    ]
    lines = ["| stage | rank | figure | early | late | |", "|---|---|---|---:|---:|---|"]
    for g in found:
        verdict = "flat" if g.is_flat else "GROWS"
        lines.append(
            f"| {g.stage} | {g.rank} | {FIGURES[g.figure]} | {g.early:.1f} | {g.late:.1f} "
            f"| {verdict} |"
        )
    text = "\n".join([f"{machine()}; load {load()}; {options.steps} steps", "", *lines, ""])
    print(text)
    if options.report:
        REPORTS.mkdir(exist_ok=True)
        (REPORTS / "long_run.md").write_text(text)
        _draw(curves, REPORTS / "long_run.png")
    return 0 if all(g.is_flat for g in found) else 1


def _run(options: argparse.Namespace, stage: int) -> list[list[dict[str, float]]]:
    """Train at a stage; return the curve of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "stage": stage, "steps": options.steps, "every": options.every, "folder": folder,
        }  # fmt: skip
        script = str(ROOT / "benchmarks" / "long_run_rank.py")
        run_ranks(
            [script, json.dumps(settings)],
            world_size=options.ranks,
            threads=1,
            deadline_seconds=options.deadline,
        )
        return [
            json.loads((Path(folder) / f"curve-{rank}.json").read_text())
            for rank in range(options.ranks)
        ]


def _growth(stage: int, rank: int, figure: str, curve: list[dict[str, float]]) -> Growth:
    last = curve[-1]["step"]
    early = [p[figure] for p in curve if 0.1 * last <= p["step"] < 0.4 * last]
    late = [p[figure] for p in curve if p["step"] >= 0.7 * last]
    return Growth(stage, rank, figure, statistics.median(early), statistics.median(late))


def _draw(curves: dict[tuple[int, int], list[dict[str, float]]], path: Path) -> None:
    """Draw the figures over the steps, one row for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(FIGURES), 1, figsize=(8, 8), sharex=True)
    for axis, (name, title) in zip(axes, FIGURES.items(), strict=True):
        for (stage, rank), curve in curves.items():
            steps = [point["step"] for point in curve]
            values = [point[name] for point in curve]
            axis.plot(steps, values, label=f"stage {stage}, rank {rank}", linewidth=1)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small", ncols=2)
    axes[-1].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _parse() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", default="2,3", help="ZeRO stages (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="steps (default %(default)s)")
    parser.add_argument(
        "--every", type=int, default=100,
        help="steps between two evaluations and two saves (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--deadline", type=float, default=1500.0, help="seconds for each stage")
    parser.add_argument("--report", action="store_true", help="write reports/long_run.{md,png}")
    options = parser.parse_args()
    options.stages = [int(stage) for stage in options.stages.split(",")]
    return options


if __name__ == "__main__":
    sys.exit(main())
