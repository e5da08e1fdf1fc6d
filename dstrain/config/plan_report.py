"""A plan for people and as data."""

from __future__ import annotations

from typing import Any

from dstrain.config.activations import layer_bytes
from dstrain.config.memory import CUDA_OVERHEAD_BYTES, GIB
from dstrain.config.planner import Choice, Plan, Row, describe

KINDS = {
    "parameters": "params",
    "gradients": "grads",
    "master weights": "master",
    "optimizer": "optim",
    "buckets": "buckets",
    "activations": "activ",
    "logits": "logits",
    "step": "step",
}


def as_table(found: Plan, choice: Choice) -> str:
    """What a person reads."""
    sizes, work, batch, limits = found.sizes, found.work, found.batch, found.limits
    facts, block = sizes.facts, sizes.block
    lines = [
        f"{sizes.model_type}: {facts.num_parameters:,} parameters ({sizes.source}); embeddings "
        f"{sizes.elements('embedding'):,}, one layer {sizes.layer_elements:,}, largest "
        f"{facts.largest:,}, vocabulary {sizes.vocab_size:,}",
        f"{work.world_size} GPUs of {limits.gpu_bytes / GIB:.1f} GiB, {work.ranks_per_machine} per "
        f"machine with {_amount(limits.host_bytes)} host memory and {_amount(limits.nvme_bytes)} "
        "disk",
        f"micro-batch {batch.micro_batch} x {batch.seq_len} tokens, {work.precision}, "
        f"{work.optimizer}, {batch.attention} attention, accumulation {work.accumulation}, "
        f"activation checkpointing {'on' if batch.checkpointing else 'off'}",
        "",
        *_rows(found, choice),
        "",
        f"{_asked(choice)}: {choice.placement}" + ("" if choice.fits else " (does not fit)"),
        f"  because {choice.reason}",
        *(f"  {remedy}" for remedy in choice.remedies),
        "",
        "GiB per GPU, each kind at its own maximum; peak is the most at any one moment.",
        f"peak+: what must fit, with {CUDA_OVERHEAD_BYTES / GIB:.1f} GiB assumed for CUDA, NCCL "
        "and fragmentation. ckpt+: the same with activation checkpointing.",
        "host, disk: GiB per machine, page-locked buffers rounded up to powers of two, 3 GiB "
        "assumed per process.",
        "Assumed: all parameters train; every sequence has full length, without padding; the "
        "bucket sizes that dstrain derives.",
    ]
    if block is None:
        lines.append("Activations are not known for this architecture and count as nothing.")
    else:
        lines.append(f"One layer keeps {layer_bytes(block, batch) / GIB:.2f} GiB uncheckpointed.")
    return "\n".join(lines)


def _asked(choice: Choice) -> str:
    """The arguments that lead to the choice: without an "auto" of its own nothing is offloaded."""
    if choice.placement.optimizer == choice.placement.parameters == "none":
        return "zero_stage=auto"
    return "zero_stage=auto with offload_optimizer=auto and offload_param=auto"


def _rows(found: Plan, choice: Choice) -> list[str]:
    heads = ["", "", *KINDS.values(), "peak", "peak+", "ckpt+", "host", "disk", "fits"]
    table = [heads]
    ranks = found.work.ranks_per_machine
    for row in found.rows:
        f = row.footprint
        numbers = [*(f.kinds[kind] for kind in KINDS), f.peak, f.needed, row.checkpointed.needed]
        numbers += [ranks * sum(f.host.values()), ranks * sum(f.nvme.values())]
        mark = "*" if row.placement == choice.placement else ""
        table.append([mark, str(row.placement), *map(_gib, numbers), _verdict(row)])
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    return [
        " ".join(
            text.ljust(width) if i in (0, 1, len(heads) - 1) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _verdict(row: Row) -> str:
    return "yes" if row.fits else f"no: {describe(row.lacking)}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes else "-"


def _amount(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:,.0f} GiB"


def as_dict(plan: Plan, choice: Choice) -> dict[str, Any]:
    """The plan as JSON data."""
    return {
        "model": {
            "model_type": plan.sizes.model_type,
            "source": plan.sizes.source,
            **vars(plan.sizes.facts),
            "embedding_elements": plan.sizes.elements("embedding"),
            "layer_elements": plan.sizes.layer_elements,
            "vocab_size": plan.sizes.vocab_size,
        },
        "work": vars(plan.work),
        "batch": vars(plan.batch),
        "limits": vars(plan.limits),
        "rows": [
            {
                **row.footprint.to_dict(),
                "peak_with_checkpointing_bytes": row.checkpointed.peak,
                "fits": row.fits,
                "lacking_bytes": dict(row.lacking),
            }
            for row in plan.rows
        ],
        "choice": {
            **choice.placement.to_dict(),
            "fits": choice.fits,
            "reason": choice.reason,
            "remedies": list(choice.remedies),
        },
    }
