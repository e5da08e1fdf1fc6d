"""A memory plan as text and as JSON data."""

from __future__ import annotations

from typing import Any

from dstrain.config.memory.activations import layer_bytes
from dstrain.config.memory.footprint import CUDA_OVERHEAD_BYTES, GIB, Footprint
from dstrain.config.memory.planner import Choice, Plan, Row, describe

KINDS = {
    "parameters": "params",
    "gradients": "grads",
    "master weights": "master",
    "optimizer": "optim",
    "buckets": "buckets",
    "logits": "logits",
    "step": "step",
}


def as_table(found: Plan, choice: Choice) -> str:
    """Return the plan as text to print."""
    sizes, work, batch, limits = found.sizes, found.work, found.batch, found.limits
    facts, block = sizes.facts, sizes.block
    lines = [
        f"{sizes.model_type}: {facts.num_parameters:,} parameters ({sizes.source}); embeddings "
        f"{sizes.elements('embedding'):,}, one layer {sizes.layer_elements:,}, largest "
        f"{facts.largest:,}, vocabulary {sizes.vocab_size:,}",
        f"{work.world_size} {'GPU' if work.world_size == 1 else 'GPUs'} of "
        f"{limits.gpu_bytes / 1e9:.4g} GB ({limits.gpu_bytes / GIB:.1f} GiB), "
        f"{work.ranks_per_machine} per machine with {_amount(limits.host_bytes)} host memory and "
        f"{_amount(limits.nvme_bytes)} disk",
        f"micro-batch {batch.micro_batch} x {batch.seq_len} tokens, {work.precision}, "
        f"{work.optimizer}, {batch.attention} attention, accumulation {work.accumulation}, "
        f"activation checkpointing {'on' if batch.checkpointing else 'off'}",
        "",
        *_rows(found, choice),
        "",
        f"{_asked(choice)}: {choice.placement}" + ("" if choice.fits else " (does not fit)"),
        *_because(choice),
        *(f"  {remedy}" for remedy in choice.remedies),
        "",
        "GiB per GPU, each kind at its own maximum; peak is the most at any one moment, with the "
        "activations that",
        f"layers keep; need is what must fit, with {CUDA_OVERHEAD_BYTES / GIB:.1f} GiB assumed for "
        "CUDA, NCCL and fragmentation.",
        "buckets: of communication, and parameters gathered at once; step: what the optimizer "
        "takes for the moment.",
        "host, disk: GiB per machine, page-locked buffers rounded up to powers of two, 3 GiB "
        "assumed per process.",
        "Assumed: all parameters train; every sequence has full length, without padding; the "
        "bucket sizes that",
        "dstrain derives.",
    ]
    if block is None:
        lines.append("Activations are not known for this architecture and count as nothing.")
    elif sizes.text_only:
        lines.append(
            "Activations are those of the text model alone: what images or sound need is not known "
            "and comes on top."
        )
    else:
        lines.append(f"One layer keeps {layer_bytes(block, batch) / GIB:.2f} GiB uncheckpointed.")
    return "\n".join(lines)


def _asked(choice: Choice) -> str:
    """Return the arguments that lead to the choice; they name offload if it has any."""
    if choice.placement.optimizer == choice.placement.parameters == "none":
        return "zero_stage=auto"
    return "zero_stage=auto with offload_optimizer=auto and offload_param=auto"


def _because(choice: Choice) -> list[str]:
    """Return the lines of the reason, one for each placement in it."""
    first, *others = choice.reason.split("; ")
    return [f"  because {first}", *(f"          {other}" for other in others)]


def _rows(found: Plan, choice: Choice) -> list[str]:
    """Return the lines of the table, with columns for both settings of checkpointing."""
    heads = ["", "", *KINDS.values(), *2 * ["|", "activ", "peak", "need"]]
    table = [[*heads, "|", "host", "disk", "fits"]]
    ranks = found.work.ranks_per_machine
    for row in found.rows:
        kinds = row.footprint.kinds
        line = ["*" if row.placement == choice.placement else "", str(row.placement)]
        line += [_gib(kinds[kind]) for kind in KINDS]
        for f in (row.plain, row.checkpointed):
            line += ["|", *map(_gib, (f.kinds["activations"], f.peak, f.needed))]
        machine = (
            ranks * sum(place.values()) for place in (row.footprint.host, row.footprint.nvme)
        )
        table.append([*line, "|", *map(_gib, machine), _verdict(row)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        " ".join(
            text.ljust(width) if i in (0, 1, len(widths) - 1) else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return [_titles(lines[0]), *lines]


def _titles(heads: str) -> str:
    """Return the line above the column heads, with names of the groups between bars."""
    line = ""
    bars = [i for i, sign in enumerate(heads) if sign == "|"]
    names = ("not checkpointed", "checkpointed", "per machine")
    for bar, name in zip(bars, names, strict=True):
        line = f"{line:<{bar}}| {name}"
    return line


def _verdict(row: Row) -> str:
    if row.fits:
        return "yes"
    also = " (checkpointed: yes)" if row.fits_checkpointed else ""
    return f"no, lacks {describe(row.lacking)}{also}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes else "-"


def _amount(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:,.0f} GiB"


def as_dict(plan: Plan, choice: Choice) -> dict[str, Any]:
    """Return the plan as JSON data."""
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
                "without_checkpointing": _activations(row.plain),
                "with_checkpointing": _activations(row.checkpointed),
                "fits": row.fits,
                "lacking_bytes": dict(row.lacking),
                "fits_with_checkpointing": row.fits_checkpointed,
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


def _activations(footprint: Footprint) -> dict[str, int]:
    """Return the bytes that depend on activation checkpointing."""
    return {
        "activation_bytes": footprint.kinds["activations"],
        "peak_bytes": footprint.peak,
        "needed_bytes": footprint.needed,
    }
