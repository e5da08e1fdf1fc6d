"""Choice for ``zero_stage="auto"`` and offloads of "auto": the fastest placement that fits.

The choice depends only on arguments and facts. ``dstrain plan`` prints the same memory plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dstrain.config import optimizers
from dstrain.config.facts import Facts, Machine
from dstrain.config.memory.activations import Batch
from dstrain.config.memory.bucket_rule import derived_buckets
from dstrain.config.memory.footprint import GIB
from dstrain.config.memory.placement import FP32, WIDTHS, Buckets, Placement, Work
from dstrain.config.memory.planner import (
    ORDER,
    Limits,
    fastest_choice,
    first_checkpointed,
    plan,
)
from dstrain.config.memory.sizes import ModelFacts

# Share of memory for activations if tokens of a sample or the form of layers are not known.
ACTIVATION_SHARE = 0.3
AUTO = "auto"
ARGUMENTS = ("zero_stage", "offload_optimizer", "offload_param")
# Flags that need stage 3.
OF_STAGE_3 = (
    "super_offload",
    "quantized_weights",
    "quantized_nontrainable_weights",
    "quantized_gradients",
)


@dataclass(frozen=True)
class Automatic:
    """Choice for the arguments that are left at "auto".

    Attributes:
        values: argument -> value, for arguments at "auto" only.
        how: reason for the choice, with numbers.
        warning: warning that nothing fits; empty if the choice does.
    """

    values: Mapping[str, str]
    how: str = ""
    warning: str = ""

    @property
    def reasons(self) -> dict[str, str]:
        """Return argument -> reason: in full for the first, else a reference to the first."""
        first = next(iter(self.values), "")
        return {
            name: self.how if name == first else f"{name}='auto': decided together with {first}"
            for name in self.values
        }


def choose_placement(
    arguments: Mapping[str, Any], facts: Facts, explicit: Mapping[str, Any]
) -> Automatic:
    """Choose values for the arguments that are left at "auto"; the user's values stay.

    Args:
        arguments: values of arguments, after adoption.
        facts: sizes of the model and the machine; without them stage 2 is chosen.
        explicit: leaves of the user's config, without "auto".
    """
    asked = {name: str(arguments[name]) for name in ARGUMENTS}
    left = [name for name, value in asked.items() if value == AUTO]
    if not left:
        return Automatic({})
    row = _optimizer(arguments, facts, explicit)
    needs = _needs_of_stage_3(arguments, facts) if "zero_stage" in left else ""
    possible = _with_masters_as_asked(_open_to(asked, facts), explicit)
    open_to = _runnable(possible, row, facts, or_0="zero_stage" in left and not needs)
    bound = open_to
    if needs:
        bound = _runnable([p for p in possible if p.stage == 3], row, facts, or_0=False)
    if facts.sizes is None or facts.machine is None:
        return _unplanned(left, bound, needs, facts)
    found = _planned(arguments, left, open_to, facts, facts.machine, explicit)
    if needs and found.values.get("zero_stage", "3") != "3":
        found = _planned(arguments, left, bound, facts, facts.machine, explicit)
        found = replace(found, how=f"{found.how}; {needs}")
    return found


def _open_to(asked: Mapping[str, str], facts: Facts) -> list[Placement]:
    """Return the placements that agree with the arguments that the user has set.

    In DeepSpeed offload of the optimizer needs stage 1 or more, and offload of parameters or to
    disk needs stage 3. Ranks that train on the CPU have no other memory to offload to.
    """
    machine = facts.machine
    disk = machine is not None and machine.nvme_bytes
    places = ["none", *(["cpu"] if facts.device != "cpu" else []), *(["nvme"] if disk else [])]

    def options(name: str) -> list[str]:
        return places if asked[name] == AUTO else [asked[name]]

    stages = (1, 2, 3) if asked["zero_stage"] == AUTO else (int(asked["zero_stage"]),)
    found = [
        Placement(stage, optimizer, parameters)
        for optimizer in options("offload_optimizer")
        for parameters in options("offload_param")
        for stage in stages
        if _is_possible(stage, optimizer, parameters)
    ]
    if asked["offload_optimizer"] == asked["offload_param"] == AUTO:
        # Offload the optimizer first: it is used once per step, parameters in each micro-batch.
        found = [p for p in found if p in dict(ORDER)] or found
    # An impossible offload is refused later, with all conflicts.
    return found or [Placement(stages[-1])]


def _is_possible(stage: int, optimizer: str, parameters: str) -> bool:
    least = 3 if "nvme" in (optimizer, parameters) or parameters != "none" else 0
    return stage >= max(least, 1 if optimizer != "none" else 0)


def _needs_of_stage_3(arguments: Mapping[str, Any], facts: Facts) -> str:
    """Return in words why only stage 3 is possible; "" if other stages are possible too."""
    if facts.partitioned:
        return "the model is partitioned already"
    named = [f"{name}=True" for name in OF_STAGE_3 if arguments.get(name)]
    if (hpz := arguments.get("hpz_partition_size")) not in (None, 1):
        named.append(f"hpz_partition_size={hpz}")
    if arguments["offload_param"] not in ("none", AUTO):
        named.append(f"offload_param={arguments['offload_param']!r}")
    if arguments["offload_optimizer"] == "nvme":
        named.append("offload_optimizer='nvme'")
    return f"{' and '.join(named)} needs stage 3" if named else ""


def _unplanned(left: list[str], open_to: list[Placement], needs: str, facts: Facts) -> Automatic:
    """Choose a placement without facts: stage 2 if that is possible, and no offload."""
    resident = [p for p in open_to if all(getattr(p, n) == "none" for n in _offloads(left))]
    choice = next((p for p in resident if p.stage == 2), (resident or open_to)[-1])
    unknown = ["the model's sizes"] if facts.sizes is None else []
    unknown += ["the memory of the machine"] if facts.machine is None else []
    verb = "is" if unknown == ["the memory of the machine"] else "are"
    why = needs or f"{' and '.join(unknown)} {verb} not known here"
    return _as_values(left, choice, f"{_name(left)} takes {_in_words(left, choice)}: {why}")


def _planned(
    arguments: Mapping[str, Any],
    left: list[str],
    open_to: list[Placement],
    facts: Facts,
    machine: Machine,
    explicit: Mapping[str, Any],
) -> Automatic:
    """Choose the fastest placement that fits by the memory plan."""
    sizes = facts.sizes
    assert sizes is not None
    row = _optimizer(arguments, facts, explicit)
    kind = "adamw" if row is None or row.refused else row.name
    precision = next((name for name in ("bf16", "fp16") if arguments[name]), "fp32")
    guessed = facts.sequence_length is None or sizes.block is None
    usable = int(machine.device_bytes * (1 - ACTIVATION_SHARE if guessed else 1))

    def buckets(model: ModelFacts, stage: int) -> Buckets:
        return Buckets.of_config(explicit, derived_buckets(model, stage))

    work = Work(
        world_size=facts.world_size,
        ranks_per_machine=machine.ranks,
        precision=precision,
        accumulation=int(arguments["gradient_accumulation_steps"]),
        optimizer=kind,
        adam_temporary=optimizers.is_torch_adam(kind),
        device=facts.device,
        master_width=WIDTHS[precision] if _has_narrow_masters(explicit) else FP32,
        narrow_states=bool(explicit.get("bf16.bf16_optimizer_states")),
    )
    batch = Batch(
        int(arguments["per_device_train_batch_size"]),
        0 if guessed else int(facts.sequence_length or 0),
        WIDTHS[precision],
        checkpointing=bool(arguments["gradient_checkpointing"]),
    )
    limits = Limits(usable, machine.host_bytes, machine.nvme_bytes)
    found = plan(sizes, work, batch, limits, buckets=buckets, placements=open_to)
    choice = fastest_choice(found, advise=False)
    needed = found.row(choice.placement).footprint.needed
    how = (
        f"{_name(left)}: {choice.reason}; it needs {needed / GIB:.2f} of "
        f"{machine.device_bytes / GIB:.2f} GiB per rank"
    )
    if guessed:
        what = "tokens per sample" if facts.sequence_length is None else "form of the layers"
        how += f", {ACTIVATION_SHARE:.0%} of it kept for activations (unknown: {what})"
    elif sizes.text_only:
        how += ", without the activations of parts other than the text model, which are not known"
    warning = ""
    if not choice.fits:
        remedy = "`dstrain plan` shows what would help"
        if (saved := first_checkpointed(found)) and not batch.checkpointing:
            remedy = f"with gradient_checkpointing {saved} fits"
        warning = f"by the memory plan this run does not fit: {choice.reason}; {remedy}"
    return _as_values(left, choice.placement, how, warning)


def _has_narrow_masters(explicit: Mapping[str, Any]) -> bool:
    """Tell whether the user's config keeps master weights in the 16-bit format of training."""
    return any(explicit.get(f"{name}.{name}_master_weights_and_grads") for name in ("bf16", "fp16"))


def _with_masters_as_asked(
    possible: list[Placement], explicit: Mapping[str, Any]
) -> list[Placement]:
    """Return the placements at which DeepSpeed runs with the user's format of master weights.

    Those in 16 bits are not swapped to disk, and with states in fp32 they are on the host
    (``format_constraints.py``). All are returned if none is left, and refused later.
    """
    if not _has_narrow_masters(explicit):
        return possible
    places = ("none", "cpu") if explicit.get("bf16.bf16_optimizer_states") else ("cpu",)
    return [p for p in possible if p.optimizer in places] or possible


def _optimizer(
    arguments: Mapping[str, Any], facts: Facts, explicit: Mapping[str, Any]
) -> optimizers.Optimizer | None:
    """Return the optimizer that will run; None if it is not in the table."""
    if facts.user_optimizer:
        return None
    kind = explicit.get("optimizer.type")
    return optimizers.find(str(arguments["optim"]), None if kind is None else str(kind))


def _runnable(
    open_to: list[Placement],
    row: optimizers.Optimizer | None,
    facts: Facts,
    *,
    or_0: bool,
) -> list[Placement]:
    """Return the placements at which the optimizer can run.

    If it can run at none, all are returned: the optimizer is refused later, with all conflicts.

    Args:
        open_to: possible placements.
        row: the optimizer; None if it is not in the table.
        facts: facts, of which the device is used.
        or_0: return stage 0 if the optimizer can run there and at none of the placements.
    """
    if row is None:
        return open_to

    def runs(at: Placement) -> bool:
        setting = optimizers.Setting(at.stage, at.optimizer, facts.device)
        return optimizers.build_of(row, setting) is not None

    found = [placement for placement in open_to if runs(placement)]
    if not found and or_0 and runs(Placement(0)):
        return [Placement(0)]
    return found or open_to


def _as_values(left: list[str], choice: Placement, how: str, warning: str = "") -> Automatic:
    every = choice.to_dict()
    return Automatic({name: every[name] for name in left}, how, warning)


def _offloads(left: list[str]) -> list[str]:
    names = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
    return [names[name] for name in left if name in names]


def _in_words(left: list[str], choice: Placement) -> str:
    return str(choice) if "zero_stage" in left else "no offload"


def _name(left: list[str]) -> str:
    return " and ".join(f"{name}={AUTO!r}" for name in left)
