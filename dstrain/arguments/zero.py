"""Arguments about DeepSpeed: the user's config, ZeRO stage, sub-groups and leaf modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import deepspeed_key, implemented
from dstrain.core.errors import Problem


@dataclass
class ZeroArguments:
    """ZeRO: partitioning over the ranks, and the DeepSpeed config."""

    deepspeed: dict[str, Any] | str | None = arg(
        None,
        "DeepSpeed config: a preset name (zero1, zero2, zero2_offload, zero3, ...), the path of a "
        'JSON file, a JSON string, a dict, or none. Keys that are missing or "auto" are filled '
        "from these arguments; a key with a value of its own wins over an argument left at its "
        "default, and conflicts with one that was changed.",
        treatment=implemented("none takes the arguments alone"),
    )
    zero_stage: str = arg(
        "auto",
        "Values that ZeRO partitions over the ranks: 0 none, 1 optimizer states, 2 also gradients, "
        "3 also parameters; auto takes the fastest that fits by the memory plan (`dstrain plan`), "
        "and 2 where the model's sizes or the memory are not known.",
        choices=("auto", "0", "1", "2", "3"),
        treatment=deepspeed_key("zero_optimization.stage", own=True),
    )
    sub_group_size: int | None = arg(
        None,
        "Elements of a rank's partition that stage 3 updates at a time. Lower it when the "
        "optimizer step runs out of memory (its fp32 copies are 4 to 8 bytes per element of one "
        "group), or under NVMe offload, where a group is what is read, updated and written; many "
        "small groups cost time. None is DeepSpeed's 1e9.",
        treatment=deepspeed_key("zero_optimization.sub_group_size", note="stage 3", own=True),
    )
    leaf_modules: list[str] | None = arg(
        None,
        "Names of module classes (with or without their package) that stage 3 gathers whole, with "
        "all they contain, instead of layer by layer. Needed where ranks run different submodules, "
        "as a mixture of experts does when its experts are modules of their own: one rank would "
        "wait for a gather that the other never asks for. Costs the memory of the whole block. "
        "None finds such blocks in the model and leaves everything else alone.",
        treatment=deepspeed_key(
            "zero_optimization.leaf_module.classes",
            note="stage 3; a name that matches no module is an error when training starts",
            own=True,
        ),
    )

    def _zero_problems(self) -> list[Problem]:
        problems = []
        if self.sub_group_size is not None and self.sub_group_size < 1:
            problems.append(
                Problem(f"sub_group_size={self.sub_group_size}", "at least one element")
            )
        if self.leaf_modules is not None and not all(
            isinstance(name, str) and name for name in self.leaf_modules
        ):
            problems.append(
                Problem(f"leaf_modules={self.leaf_modules!r}", "expected names of module classes")
            )
        return problems
