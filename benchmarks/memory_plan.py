"""Memory that `dstrain plan` computes against what ranks really use.

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --models 27m --stages 1,2,3,3oo --world_sizes 2
    python benchmarks/memory_plan.py --suite --report

On a CPU it measures the process: anonymous pages between steps (the states), and the peak of the
resident ones, over what a warmed-up process has before the model is built. On a GPU it measures
`torch.cuda.memory_allocated` and `max_memory_allocated`. `3o` offloads the optimizer, `3oo`
parameters as well. `--suite` is a fixed list of sizes, stages, offloads, formats, and buckets
smaller than the model. Goals: states within 5%, peaks within 15%.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import ROOT, RunFailed, has_gpu, machine, run_ranks, table

REPORTS = ROOT / "benchmarks" / "reports"
STATES_GOAL, PEAK_GOAL = 0.05, 0.15
MIB = 2**20
Case = tuple[str, int, str, dict[str, Any]]

MODELS: dict[str, dict[str, int]] = {
    "10m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12288},
    "27m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8192},
    "55m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6,
            "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 8192},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
# model, ranks, stage, and what differs from the options. A bucket of 5 or 7 million elements is
# filled several times in one backward pass; one of 2 million is smaller than the embedding.
SUITE: tuple[Case, ...] = (
    *(("10m", 1, stage, {}) for stage in ("0", "1", "2", "3")),
    *(("27m", 2, stage, {"bucket": 5_000_000}) for stage in ("1", "2", "3")),
    *(("27m", 2, stage, {}) for stage in ("0", "2o", "3o", "3oo")),
    *(("55m", 2, stage, {"bucket": 7_000_000}) for stage in ("2", "3")),
    *(("55m", 1, stage, {}) for stage in ("1o", "3oo")),
    *(("27m", 2, stage, {"bucket": 2_000_000, "precision": "bf16"}) for stage in ("1", "2", "3")),
    *(("27m", 2, stage, {"accumulation": 2, "checkpointing": True}) for stage in ("2", "3")),
)
# glibc keeps freed blocks below a threshold that grows with what was freed; fixed and small it
# gives them back, so that resident memory follows allocations.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "1",
}


def main() -> int:
    """Measure what was asked for and print planned beside measured."""
    options = _options()
    os.environ.update(MALLOC)
    device = "cuda" if has_gpu() and options.device != "cpu" else "cpu"
    rows = []
    for case in SUITE if options.suite else _cases(options):
        settings = _settings(options, case, device)
        planned = plan_of(settings)
        try:
            measured = measure(settings, options.deadline)
        except RunFailed as failure:
            print(f"{case}: {failure}", file=sys.stderr, flush=True)
            measured = None
        rows.append({"case": case, "planned": planned, "measured": measured})
        print(_line(rows[-1]), flush=True)
    print()
    print(_table(rows, options))
    if options.report:
        REPORTS.mkdir(exist_ok=True)
        facts = {"machine": machine(), "device": device, "options": vars(options), "rows": rows}
        (REPORTS / "memory_plan.json").write_text(json.dumps(facts, indent=2) + "\n")
        (REPORTS / "memory_plan.md").write_text(_table(rows, options) + "\n")
    return 0


def plan_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Compute what the memory model predicts for a run."""
    sys.path.insert(0, str(ROOT))
    from dstrain.config.memory.activations import Batch
    from dstrain.config.memory.bucket_rule import derived_buckets
    from dstrain.config.memory.closed_forms import closed_form
    from dstrain.config.memory.footprint import footprint
    from dstrain.config.memory.placement import Buckets, Placement, Work

    sizes = closed_form({"model_type": "llama", **settings["model"]})
    assert sizes is not None
    work = Work(
        settings["world_size"],
        precision=settings["precision"],
        accumulation=settings["accumulation"],
        device=settings["device"],
    )
    batch = Batch(
        settings["micro_batch"], settings["seq_len"], work.width, settings["attention"],
        settings["checkpointing"],
    )  # fmt: skip
    placement = Placement(settings["stage"], settings["optimizer"], settings["parameters"])
    sizes_of_buckets = derived_buckets(sizes.facts, placement.stage)
    buckets = Buckets.of_config(flat(bucket_keys(settings)), sizes_of_buckets)
    found = footprint(sizes, work, batch, placement, buckets)
    host = sum(found.host.values()) if settings["device"] == "cpu" else 0
    return {
        "states": found.states + host,
        "peak": found.peak + host,
        "moments": {k: v + host for k, v in found.moments.items()},
        "kinds": dict(found.kinds),
        "host": dict(found.host),
    }


def bucket_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed config of a run with its own bucket sizes; empty without any."""
    if not settings["bucket"]:
        return {}
    names = {3: ("reduce_bucket_size", "stage3_prefetch_bucket_size")}
    usual = ("reduce_bucket_size", "allgather_bucket_size")
    sizes = dict.fromkeys(names.get(settings["stage"], usual), settings["bucket"])
    return {"zero_optimization": sizes}


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return leaf values by dotted path."""
    return {f"{section}.{k}": v for section, keys in config.items() for k, v in keys.items()}


def measure(settings: dict[str, Any], deadline_seconds: float) -> dict[str, int]:
    """Measure what the ranks of a run used; return the largest."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        script = str(Path(__file__).with_name("memory_plan_rank.py"))
        words = [script, json.dumps({**settings, "result": str(result)})]
        run_ranks(
            words,
            world_size=settings["world_size"],
            threads=1,
            deadline_seconds=deadline_seconds,
        )
        found: dict[str, int] = json.loads(result.read_text())
        return found


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        (model, world_size, stage, {})
        for model in options.models.split(",")
        for world_size in map(int, options.world_sizes.split(","))
        for stage in options.stages.split(",")
    ]


def _settings(options: argparse.Namespace, case: Case, device: str) -> dict[str, Any]:
    model, world_size, stage, own = case
    names = ("precision", "micro_batch", "seq_len", "accumulation", "checkpointing", "attention")
    settings = {
        "model": MODELS[model],
        "stage": int(stage[0]),
        "optimizer": "cpu" if "o" in stage else "none",
        "parameters": "cpu" if "oo" in stage else "none",
        "world_size": world_size,
        "device": device,
        "bucket": options.bucket,
        **{name: getattr(options, name) for name in names},
        **own,
    }
    return {**settings, "config": bucket_keys(settings)}


def _cells(row: dict[str, Any]) -> list[str]:
    planned, measured = row["planned"], row["measured"]
    model, world_size, stage, own = row["case"]
    cells = [model, str(world_size), stage, _in_words(own)]
    moment = max(planned["moments"], key=planned["moments"].get)
    for name, goal in (("states", STATES_GOAL), ("peak", PEAK_GOAL)):
        if measured is None:
            cells += [f"{planned[name] / MIB:.0f}", "failed", "", ""]
            continue
        error = planned[name] / measured[name] - 1
        met = "yes" if abs(error) <= goal else "NO"
        cells += [f"{planned[name] / MIB:.0f}", f"{measured[name] / MIB:.0f}", f"{error:+.1%}", met]
    parts = ("built", "forward", "backward", "step")
    seen = "/".join(f"{measured[part] / MIB:.0f}" for part in parts) if measured else ""
    return [*cells, moment, seen]


def _in_words(own: dict[str, Any]) -> str:
    words = {
        "bucket": lambda v: f"bucket {v / 1e6:g}M",
        "accumulation": lambda v: f"accumulation {v}",
        "checkpointing": lambda v: "checkpointed" if v else "",
        "precision": str,
    }
    return ", ".join(words[name](value) for name, value in own.items())


HEADS = [
    *("model", "ranks", "stage", "with", "states planned", "measured", "error", "<=5%"),
    *("peak planned", "measured", "error", "<=15%", "peak planned at"),
    "measured build/forward/backward/step",
]


def _line(row: dict[str, Any]) -> str:
    return "  ".join(_cells(row))


def _table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    text = table([HEADS, *map(_cells, rows)])
    checkpointing = ", checkpointed" if options.checkpointing else ""
    return (
        f"MiB per rank; {options.precision}, {options.micro_batch} x {options.seq_len} tokens, "
        f"{options.attention}, accumulation {options.accumulation}{checkpointing}\n\n{text}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="10m,27m", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--stages", default="0,1,2,3,1o,2o,3o,3oo")
    parser.add_argument("--world_sizes", default="1,2")
    parser.add_argument("--suite", action="store_true", help="the fixed list instead of these")
    parser.add_argument("--bucket", type=int, default=0, help="elements; 0 is what is derived")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu"])
    parser.add_argument("--deadline", type=float, default=240, help="seconds per run")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
