"""Memory plan of the ZeRO stages and offloads, and the choice of the fastest that fits.

``plan`` computes the bytes of each placement; ``fastest_choice`` returns the first placement of
``ORDER`` that fits. ``ORDER`` goes from the least communication to the most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dstrain.config.memory.activations import Batch
from dstrain.config.memory.bucket_rule import derived_buckets
from dstrain.config.memory.footprint import GIB, Footprint, footprint
from dstrain.config.memory.placement import Buckets, Placement, Work
from dstrain.config.memory.sizes import ModelFacts, ModelSizes

ORDER: tuple[tuple[Placement, str], ...] = (
    (
        Placement(1),
        "the least communication: gradients are reduced and weights gathered once per step",
    ),
    (
        Placement(2),
        "as many bytes as stage 1, but gradients are reduced in every micro-batch",
    ),
    (
        Placement(3),
        "parameters are gathered in forward and again in backward: 1.5 times the bytes of stage 2",
    ),
    (
        Placement(1, "cpu"),
        "the optimizer runs on host cores: gradients and weights cross PCIe in every step",
    ),
    (
        Placement(2, "cpu"),
        "the optimizer runs on host cores, and gradients are reduced in every micro-batch",
    ),
    (
        Placement(3, "cpu"),
        "the optimizer runs on host cores, and parameters are gathered in forward and backward",
    ),
    (
        Placement(3, "cpu", "cpu"),
        "parameters come over PCIe too, in forward and again in backward",
    ),
    (
        Placement(3, "nvme", "cpu"),
        "optimizer states are read from disk and written back in every step",
    ),
    (
        Placement(3, "nvme", "nvme"),
        "optimizer states and parameters are read from disk",
    ),
)
SHOWN = (Placement(0), *(placement for placement, _ in ORDER))
MOST_RANKS = 65536


@dataclass(frozen=True)
class Limits:
    """Memory and disk of accelerators and machines; None if a size is not known.

    Attributes:
        gpu_bytes: memory of one accelerator; for a rank that trains on the CPU, its share of the
            host memory.
        host_bytes: host memory of one machine.
        nvme_bytes: local disk of one machine.
    """

    gpu_bytes: int
    host_bytes: int | None = None
    nvme_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """Row of a plan: one placement, with and without activation checkpointing.

    Attributes:
        footprint: bytes per rank with the checkpointing that was asked for.
        plain: bytes per rank without activation checkpointing.
        checkpointed: bytes per rank with activation checkpointing.
        lacking: resource -> bytes that are missing; None if the size of the resource is not known.
        fits_checkpointed: whether the placement fits with activation checkpointing.
    """

    footprint: Footprint
    plain: Footprint
    checkpointed: Footprint
    lacking: Mapping[str, int | None]
    fits_checkpointed: bool

    @property
    def placement(self) -> Placement:
        """Return stage and offloads."""
        return self.footprint.placement

    @property
    def fits(self) -> bool:
        """Tell whether no resource lacks bytes."""
        return not self.lacking


@dataclass(frozen=True)
class Plan:
    """Plan for a model, a workload and machines, with a row for each placement."""

    sizes: ModelSizes
    work: Work
    batch: Batch
    limits: Limits
    rows: tuple[Row, ...]

    def row(self, placement: Placement) -> Row:
        """Return the row of one placement."""
        return next(row for row in self.rows if row.placement == placement)


@dataclass(frozen=True)
class Choice:
    """Choice of a placement for ``zero_stage="auto"``.

    Attributes:
        placement: the fastest placement that fits; if none does, that which lacks the fewest bytes.
        fits: whether the placement fits.
        reason: reason for the placement, and against each faster one.
        remedies: changes with which a placement would fit, if none does.
    """

    placement: Placement
    fits: bool
    reason: str
    remedies: tuple[str, ...] = ()


BucketsOf = Callable[[ModelFacts, int], Buckets]  # (model, ZeRO stage) -> bucket sizes


def plan(
    sizes: ModelSizes,
    work: Work,
    batch: Batch,
    limits: Limits,
    *,
    buckets: BucketsOf = derived_buckets,
    placements: Sequence[Placement] = SHOWN,
) -> Plan:
    """Return the bytes of each placement, and the bytes that it lacks.

    Args:
        sizes: sizes of the model.
        work: ranks, precision, optimizer.
        batch: one micro-batch.
        limits: memory and disk.
        buckets: function that returns the bucket sizes of a stage; by default the resolver's.
        placements: the placements.
    """
    stages = {placement.stage for placement in placements}
    by_stage = {s: buckets(sizes.facts, s) for s in stages}
    rows = []
    for placement in placements:
        plain, checkpointed = (
            footprint(
                sizes,
                work,
                replace(batch, checkpointing=checkpointing),
                placement,
                by_stage[placement.stage],
            )
            for checkpointing in (False, True)
        )
        asked = checkpointed if batch.checkpointing else plain
        lacking = _lacking(asked, work, limits)
        fits_checkpointed = not _lacking(checkpointed, work, limits)
        rows.append(Row(asked, plain, checkpointed, lacking, fits_checkpointed))
    return Plan(sizes, work, batch, limits, tuple(rows))


def fastest_choice(plan: Plan, *, advise: bool = True) -> Choice:
    """Return the fastest placement that fits, with the reason.

    Args:
        plan: rows of the placements. Stage 0 is chosen only if it is the only one: stage 1 needs
            less memory and no more communication.
        advise: find remedies if nothing fits.
    """
    passed: list[str] = []
    rows = {row.placement: row for row in plan.rows}
    order = sorted((p for p in rows if p.stage or len(rows) == 1), key=speed_rank)
    for placement in order:
        row = rows[placement]
        if row.fits:
            why = dict(ORDER).get(placement)
            reason = "; ".join([*passed, f"{placement} fits{f': {why}' if why else ''}"])
            return Choice(placement, True, reason)
        passed.append(f"{placement} lacks {describe(row.lacking)}")
    refused = [rows[placement] for placement in order]
    known = [row for row in refused if None not in row.lacking.values()] or refused
    least = min(known, key=lambda row: sum(v or 0 for v in row.lacking.values()))
    reason = f"nothing fits; {least.placement} lacks least: {describe(least.lacking)}"
    return Choice(least.placement, False, reason, tuple(_remedies(plan)) if advise else ())


def first_checkpointed(plan: Plan) -> Placement | None:
    """Return the fastest placement that fits with activation checkpointing; None if none does."""
    fitting = [row.placement for row in plan.rows if row.fits_checkpointed and row.placement.stage]
    return min(fitting, key=speed_rank, default=None)


def speed_rank(placement: Placement) -> tuple[int, int, int]:
    """Return a sort key that sorts placements as in ``ORDER``, from the fastest to the slowest."""
    places = ("none", "cpu", "nvme")
    return (
        places.index(placement.optimizer),
        places.index(placement.parameters),
        placement.stage,
    )


def describe(lacking: Mapping[str, int | None]) -> str:
    """Return the missing bytes of each resource in words."""
    return " and ".join(
        f"{name} (size not known)" if missing is None else f"{missing / GIB:,.1f} GiB of {name}"
        for name, missing in lacking.items()
    )


def _lacking(found: Footprint, work: Work, limits: Limits) -> dict[str, int | None]:
    """Return the bytes that an accelerator lacks, and those that a machine lacks for its ranks."""
    ranks = min(work.ranks_per_machine, work.world_size)
    host, disk = sum(found.host.values()), ranks * sum(found.nvme.values())
    lacking: dict[str, int | None] = {}
    if work.device == "cpu":  # offload would use the same memory
        if found.needed + host > limits.gpu_bytes:
            lacking["host memory per rank"] = found.needed + host - limits.gpu_bytes
    else:
        if found.needed > limits.gpu_bytes:
            lacking["GPU memory"] = found.needed - limits.gpu_bytes
        if limits.host_bytes is None:
            if found.placement.optimizer != "none" or found.placement.parameters != "none":
                lacking["host memory"] = None
        elif ranks * host > limits.host_bytes:
            lacking["host memory"] = ranks * host - limits.host_bytes
    if disk and limits.nvme_bytes is None:
        lacking["disk"] = None
    elif disk > (limits.nvme_bytes or 0):
        lacking["disk"] = disk - (limits.nvme_bytes or 0)
    return lacking


def _remedies(plan: Plan) -> list[str]:
    """Return the first change of flags with which a placement fits, or else more GPUs, in words."""
    flags: list[tuple[str, Batch]] = []
    if not plan.batch.checkpointing:
        flags.append(("--gradient_checkpointing", replace(plan.batch, checkpointing=True)))
    if plan.batch.micro_batch > 1:
        flags.append(("--micro_batch 1", replace(plan.batch, micro_batch=1)))
    if len(flags) == 2:
        both = replace(plan.batch, checkpointing=True, micro_batch=1)
        flags.append((" and ".join(flag for flag, _ in flags), both))
    found = []
    for flag, batch in flags:
        if placement := _first_that_fits(plan, plan.work, batch):
            found.append(f"with {flag} {placement} fits")
            break
    ranks = 2 * plan.work.world_size
    how, batch = flags[-1] if flags else ("", plan.batch)
    while not found and ranks <= MOST_RANKS:
        if placement := _first_that_fits(plan, replace(plan.work, world_size=ranks), batch):
            words = " and ".join(filter(None, [f"{ranks} GPUs", how]))
            found.append(f"with {words} {placement} fits")
        ranks *= 2
    if not found:
        found.append("what helps: a shorter --seq_len, or GPUs with more memory")
    if plan.limits.host_bytes is None:
        found.append("offload is left out of the choice: give --host_memory")
    return found


def _first_that_fits(old: Plan, work: Work, batch: Batch) -> Placement | None:
    again = plan(old.sizes, work, batch, old.limits)
    return next((placement for placement, _ in ORDER if again.row(placement).fits), None)
