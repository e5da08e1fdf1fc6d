"""Rules of communication: overlap, formats, and groups of ranks."""

from __future__ import annotations

from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View, where_set

_ZERO = "zero_optimization"
_OVERLAP = f"{_ZERO}.overlap_comm"
_CONTIGUOUS = f"{_ZERO}.contiguous_gradients"
_HPZ = f"{_ZERO}.zero_hpz_partition_size"
# Ranks of a machine if they are not known, as in `dstrain explain` before a launch.
USUAL_RANKS_PER_MACHINE = 8


def _overlap(view: View) -> Derived | None:
    # deepspeed/runtime/zero/config.py: overlap_comm_valid
    return Derived(view.stage == 3, "DeepSpeed's default: on at stage 3, off below")


def _contiguous(view: View) -> Derived | None:
    return Derived(True, "DeepSpeed's default") if view.stage else None


def _hpz(view: View) -> Derived | None:
    """Return the ranks of a secondary partition: by default those of a machine."""
    if view.hpz_partition_size is None and not view.asks(_HPZ):
        return None
    if view.hpz_partition_size:
        return Derived(view.hpz_partition_size)
    ranks, local = view.facts.world_size, view.facts.ranks_per_machine
    known = f"{local} ranks" if local else f"{USUAL_RANKS_PER_MACHINE} ranks (assumed)"
    local = local or USUAL_RANKS_PER_MACHINE
    if ranks <= local:
        return Derived(1, f"off: {ranks} rank(s) on one machine gather inside it anyway")
    if ranks % local:
        return Derived(1, f"off: {ranks} ranks are not a whole number of machines of {known}")
    return Derived(local, f"a machine has {known}")


RULES: tuple[Binding | Derivation, ...] = (
    where_set(
        _OVERLAP,
        "overlap_comm",
        otherwise=_overlap,
        rule='overlap_comm; "auto" is on at stage 3 and off below',
    ),
    where_set(
        _CONTIGUOUS,
        "contiguous_gradients",
        otherwise=_contiguous,
        rule='contiguous_gradients; "auto" is on',
    ),
    where_set(f"{_ZERO}.round_robin_gradients", "round_robin_gradients", unset=False),
    where_set(
        "communication_data_type",
        "communication_dtype",
        otherwise=lambda view: Derived(view.precision, "the format of training"),
        adopt=lambda value: (str(value).lower(),),
        rule='communication_dtype; "auto" is the format of training',
    ),
    Binding(
        _HPZ,
        ("hpz_partition_size",),
        _hpz,
        rule='hpz_partition_size; 0 or "auto" is the ranks of a machine, 1 (off) on one machine',
        optional=True,
    ),
    where_set(f"{_ZERO}.zero_quantized_weights", "quantized_weights", unset=False),
    where_set(
        f"{_ZERO}.zero_quantized_nontrainable_weights",
        "quantized_nontrainable_weights",
        unset=False,
    ),
    where_set(f"{_ZERO}.zero_quantized_gradients", "quantized_gradients", unset=False),
)
