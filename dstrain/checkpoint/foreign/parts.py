"""Content of another program's checkpoint, converted to the structures of a dstrain checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine import MASTER, WEIGHT, changing_values
from dstrain.models import Stored


@dataclass
class Partition:
    """Content of a slice file to be written.

    Attributes:
        tensors: 1-D tensors named "<key>/<parameter>", read when they are written.
        spans: parameter -> (start, numel) of its elements in this file.
        scalars: parameter -> single numbers of its optimizer state.
    """

    tensors: list[Stored] = field(default_factory=list)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        start: int,
        values: torch.Tensor,
        state: Mapping[str, Any],
        *,
        group: Mapping[str, Any],
        offset: int,
        moments: Collection[str] = (),
    ) -> None:
        """Add a run of consecutive elements of a trained parameter.

        Args:
            name: the parameter.
            start: first element of the run in the whole flattened parameter.
            values: master weights of the run, 1-D.
            state: optimizer state of the flat tensor that contains the run.
            group: the parameter group, which has the step count where the state has none.
            offset: first element of the run in that flat tensor.
            moments: keys whose tensors of shape () are moments of a parameter of shape (), not
                single numbers.

        Raises:
            CheckpointError: state cannot be split by parameter.
        """
        numel = values.numel()
        self.spans[name] = (start, numel)
        self.tensors.append(_as_fp32(f"{MASTER}/{name}", values))
        numbers: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                flat = value.reshape(-1)
                if flat.numel() < offset + numel:
                    raise CheckpointError(
                        Problem(
                            f"optimizer state {key!r} of {name} has {flat.numel()} elements",
                            f"{offset + numel} or more were expected: it does not have the shape "
                            "of the parameter",
                            "export the weights and start from them",
                        )
                    )
                self.tensors.append(
                    Stored.of(f"{key}/{name}", flat.narrow(0, offset, numel).detach())
                )
            elif isinstance(value, torch.Tensor):
                if value.numel() == numel == 1 and (value.dim() or key in moments):
                    self.tensors.append(Stored.of(f"{key}/{name}", value.reshape(-1).detach()))
                else:
                    numbers[key] = value.item()
            elif isinstance(value, (bool, int, float)):
                numbers[key] = value
        if state and "step" not in numbers and isinstance(group.get("step"), (int, float)):
            numbers["step"] = group["step"]
        if state:
            self.scalars[name] = numbers

    def add_frozen(self, name: str, start: int, values: torch.Tensor) -> None:
        """Add a run of consecutive elements of a parameter that the optimizer does not update."""
        self.spans[name] = (start, values.numel())
        flat = values.detach().reshape(-1)
        self.tensors.append(Stored.of(f"{WEIGHT}/{name}", flat))


def _as_fp32(name: str, values: torch.Tensor) -> Stored:
    return Stored(name, (values.numel(),), torch.float32, lambda: values.detach().float())


@dataclass(frozen=True)
class ForeignRun:
    """Run read from another program's checkpoint.

    Attributes:
        kind: the program that wrote it, in words.
        step: optimizer steps done.
        stage: ZeRO stage.
        precision: "fp32", "bf16" or "fp16".
        parameters: name -> shape, in the order of the module.
        optimized: names of the trained parameters.
        partitions: content of each slice file to write.
        buffers: persistent buffers.
        engine: the engine's state except tensors, as ``EngineProgress.read`` returns it.
        global_batch_size: samples per step; None where it is not known.
        config: DeepSpeed's config; None without one.
        remarks: sentences about assumptions, for the user.
    """

    kind: str
    step: int
    stage: int
    precision: str
    parameters: dict[str, tuple[int, ...]]
    optimized: tuple[str, ...]
    partitions: list[Partition]
    buffers: list[Stored]
    engine: dict[str, Any]
    global_batch_size: int | None = None
    config: Mapping[str, Any] | None = None
    remarks: tuple[str, ...] = ()


def engine_record(
    *,
    step: int,
    samples: int,
    skipped: int,
    accumulation: int,
    groups: Sequence[Mapping[str, Any]],
    schedule: Any,
    loss_scale: dict[str, Any] | None,
) -> dict[str, Any]:
    """Make the record that ``EngineProgress.read`` would have returned in the imported run."""
    return {
        "counters": {
            "global_steps": step,
            "global_samples": samples,
            "skipped_steps": skipped,
            "micro_steps": step * accumulation,
        },
        "loss_scale": loss_scale,
        "optimizer": "",
        "groups": [changing_values(group) for group in groups],
        "schedule": schedule,
    }


def moments_of(states: Iterable[tuple[tuple[int, ...], Mapping[str, Any]]]) -> frozenset[str]:
    """Return the keys of an optimizer's state that have a value for each element of a parameter.

    These are inferred from parameters with dimensions, where single numbers have a different shape;
    without such parameters, all keys but the step count are returned.

    Args:
        states: (shape, state) of each parameter that has a state of its own.
    """
    states = list(states)
    telling = [state for shape, state in states if shape]
    if telling:
        return frozenset(k for state in telling for k, v in state.items() if _has_dimensions(v))
    return frozenset(key for _, state in states for key in state) - {"step"}


def _has_dimensions(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def match_groups(
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    decayed: Sequence[str] | None,
) -> list[list[str]]:
    """Match the numbered parameters of a plain optimizer's groups with names.

    Groups are filled in the order of the module, as nearly all programs do: all parameters in one
    group, or those with weight decay in the first and the others in the second.

    Args:
        groups: the optimizer's ``param_groups``.
        shapes: parameter name -> shape, in the order of the module.
        decayed: parameters that transformers' rule gives weight decay; None where unknown.

    Returns:
        The names of the parameters in each group.

    Raises:
        CheckpointError: no known grouping gives groups of these sizes.
    """
    counts = [len(group["params"]) for group in groups]
    if len(counts) == 1 and counts[0] == len(shapes):
        return [list(shapes)]
    rules = [
        [n for n, shape in shapes.items() if len(shape) > 1],
        # transformers' rule by names, which gives parameters without dimensions weight decay too.
        [n for n in shapes if not n.endswith("bias") and "norm" not in n.lower()],
    ]
    if decayed is not None:
        rules.insert(0, [n for n in shapes if n in set(decayed)])
    for rule in rules:
        chosen = set(rule)
        parts = [rule, [n for n in shapes if n not in chosen]]
        if [len(part) for part in parts if part] == counts:
            return [part for part in parts if part]
    raise CheckpointError(
        Problem(
            f"the optimizer has groups of {counts} parameters, the model {len(shapes)}",
            "a plain optimizer file numbers its parameters, and the numbers cannot be matched with "
            "names: neither one group of all, nor one with weight decay and one without, fits",
            "import a checkpoint of ZeRO stage 1 to 3, which has names; or start from the weights",
        )
    )
