"""Memory and time of an evaluation with a metric on all predictions, beside transformers' Trainer.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --samples 256,512 --contenders dstrain,transformers --report

How it measures and how to read it: `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import ROOT, RunFailed, clean_up_when_terminated, load, machine, run_ranks, table

GOALS_MB = (300, 100)  # more at the peak, of rank 0 and of the others
CONTENDERS = ("loss", "dstrain-collect", "dstrain", "dstrain-batches", "transformers")
REPORT = ROOT / "benchmarks" / "reports" / "evaluation.md"


@dataclass(frozen=True)
class Settings:
    """One evaluation in processes of its own.

    Attributes:
        contender: "loss" (dstrain without a metric), "dstrain-collect" (with one that reads no
            prediction), "dstrain", "dstrain-batches" (with batch_eval_metrics) or "transformers".
        samples: of the evaluation set.
        length: tokens per sample.
        classes: size of the vocabulary, so of a token's logits.
        batch: samples per rank in a forward pass.
        stage: ZeRO stage.
        world_size: ranks.
        result: the file that rank 0 writes.
    """

    contender: str
    samples: int
    length: int
    classes: int
    batch: int
    stage: int
    world_size: int
    result: str


def main() -> int:
    """Run every combination, print a line for each, report; 1 when a goal is missed."""
    options = _parse()
    clean_up_when_terminated()
    records = []
    for samples in options.samples:
        for contender in options.contenders:
            if contender == "transformers" and samples > options.transformers_up_to:
                continue
            records.append(_measure(options, contender, samples))
            print("  ".join(_row(records[-1])), flush=True)
    text = table([_TITLES, *map(_row, records)])
    print(f"\n{text}")
    if options.report:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(_page(options, records, text))
    return int(any(record["verdict"] in ("fail", "error") for record in records))


def _measure(options: argparse.Namespace, contender: str, samples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            contender=contender,
            samples=samples,
            length=options.length,
            classes=options.classes,
            batch=options.batch,
            stage=options.stage,
            world_size=options.world_size,
            result=str(Path(folder) / "result.json"),
        )
        record: dict[str, Any] = asdict(settings) | {"load": load()}
        try:
            run_ranks(
                [str(Path(__file__).with_name("evaluation_rank.py")), json.dumps(asdict(settings))],
                world_size=options.world_size,
                threads=options.threads,
                deadline_seconds=options.deadline,
            )
        except RunFailed as error:
            print(error, file=sys.stderr)
            return record | {"verdict": "error"}
        record |= json.loads(Path(settings.result).read_text())
    if "missing" in record:
        return record | {"verdict": record["missing"]}
    if contender in ("transformers", "loss"):
        return record | {"verdict": "-"}
    main, *others = record["resident_mb"]
    good = main <= GOALS_MB[0] and max(others, default=0.0) <= GOALS_MB[1]
    return record | {"verdict": "pass" if good else "fail"}


_TITLES = [
    *("samples", "contender", "logits MB", "rank 0 MB", "anonymous", "mapped", "others MB"),
    *("seconds", "metric", "verdict"),
]


def _row(record: dict[str, Any]) -> list[str]:
    first = [str(record["samples"]), record["contender"]]
    logits = record["samples"] * record["length"] * record["classes"] * 4 / 1e6
    first.append(f"{logits:.0f}")
    if "resident_mb" not in record:
        return [*first, *["-"] * 6, record["verdict"]]
    main, *others = record["resident_mb"]
    metric = record["metric"]
    return [
        *first,
        f"{main:.0f}",
        f"{record['anonymous_mb'][0]:.0f}",
        f"{record['mapped_mb'][0]:.0f}",
        f"{max(others, default=0.0):.0f}",
        f"{record['seconds']:.1f}",
        "-" if metric is None else f"{metric:.6f}",
        record["verdict"],
    ]


def _page(options: argparse.Namespace, records: list[dict[str, Any]], text: str) -> str:
    facts = machine()
    versions = next((r["versions"] for r in records if "versions" in r), {})
    return f"""# Memory and time of an evaluation with a metric

Written by `python benchmarks/evaluation.py --report`; `benchmarks/README.md` says how to read it.

- {options.world_size} CPU ranks with {options.threads} thread(s) each, ZeRO stage {options.stage},
  {options.batch} x {options.length} tokens per rank and forward pass, fp32,
  {options.classes} classes
- {facts["processor"]}, {facts["cores"]} cores, commit {facts["commit"]}, {facts["time"]}
- {", ".join(f"{name} {version}" for name, version in versions.items())}

MB more at the peak than before the evaluation. `loss` is what the forward passes take. What
dstrain adds on rank 0 is anonymous while it collects (up to `eval_memory_mb`, and one batch of
another rank), and mapped while the metric reads the files (none where it reads nothing:
`dstrain-collect`). Neither grows with the samples.

```
{text}
```
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Memory and time of an evaluation with a metric.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    def names(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        if unknown := [n for n in found if n not in CONTENDERS]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: not in {', '.join(CONTENDERS)}"
            )
        return found

    def add(name: str, default: Any, text: str, **more: Any) -> None:
        spellings = sorted({f"--{name}", f"--{name}".replace("_", "-")})
        more = {"type": type(default), "default": default, "help": text} | more
        parser.add_argument(*spellings, dest=name, **more)

    add("samples", [128, 512], "sizes of the evaluation set", type=integers)
    add("contenders", list(CONTENDERS[:4]), f"some of {','.join(CONTENDERS)}", type=names)
    add("transformers_up_to", 256, "samples; its Trainer takes the logits twice on every rank")
    add("length", 128, "tokens per sample")
    add("classes", 8192, "size of the vocabulary")
    add("batch", 8, "samples per rank in a forward pass")
    add("stage", 3, "ZeRO stage; transformers evaluates before training at stage 3 only")
    add("world_size", 2, "ranks")
    add("threads", 1, "threads per rank for computing on the CPU")
    add("deadline", 300.0, "seconds after which a run is ended")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
