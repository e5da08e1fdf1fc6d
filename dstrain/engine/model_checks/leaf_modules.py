"""Modules that stage 3 must gather whole, because not every rank runs all of their parts.

ZeRO-3 gathers a module's parameters in its forward hook, which is a collective. A block of experts
that are modules of their own runs only the experts that its tokens chose: ranks would ask for
different gathers and wait for each other for ever. DeepSpeed gathers a *leaf* whole, and reduces
all of its gradients together.
"""

from __future__ import annotations

import re

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import ModelError, Problem

CLASSES_KEY = "zero_optimization.leaf_module.classes"
_EXPERTS = re.compile(r"(^|_)experts?($|_)", re.IGNORECASE)


def expert_blocks(module: torch.nn.Module) -> tuple[str, ...]:
    """Return full names of the classes that hold two or more experts as modules of their own.

    Searches the module tree for a list or dict of modules that is named like "experts". Experts
    that are slices of one parameter, as in most models of transformers 5, are gathered together
    anyway.
    """
    found = {
        full_name(type(block))
        for block in module.modules()
        for name, child in block.named_children()
        if _EXPERTS.search(name) and _is_a_choice(child)
    }
    return tuple(sorted(found))


def full_name(cls: type) -> str:
    """Return package and name of a class, as DeepSpeed compares them."""
    return f"{cls.__module__}.{cls.__qualname__}"


def leaf_remark(module: torch.nn.Module, resolved: ResolvedConfig) -> str | None:
    """Name blocks of experts that are gathered whole although the user did not ask for it."""
    if resolved.stage != 3 or resolved.user_leaf_modules is not None:
        return None
    chosen = set(resolved.leaf_classes) & set(expert_blocks(module))
    if not chosen:
        return None
    return (
        f"{', '.join(sorted(name.rpartition('.')[2] for name in chosen))}: gathered whole at stage "
        "3, because ranks run different experts (leaf_modules names other blocks)"
    )


def check_leaf_modules(module: torch.nn.Module, resolved: ResolvedConfig) -> None:
    """Refuse names of leaf classes that no module has; DeepSpeed would only log a warning.

    Raises:
        ModelError: naming them, and the classes that the model has.
    """
    wanted = resolved.values.get(CLASSES_KEY)
    if (
        resolved.stage != 3
        or wanted is None
        or resolved.provenance[CLASSES_KEY].source
        not in (
            "argument",
            "config",
        )
    ):
        return
    classes = {type(m) for m in module.modules()}
    known = {c.__name__ for c in classes} | {full_name(c) for c in classes}
    lost = [name for name in ([wanted] if isinstance(wanted, str) else wanted) if name not in known]
    if not lost:
        return
    blocks = sorted(c.__name__ for c in classes if not c.__module__.startswith("torch."))
    raise ModelError(
        Problem(
            f"leaf_modules={lost}",
            f"{type(module).__name__} has no module of that class; it has {', '.join(blocks)}",
            "name one of these, or leave leaf_modules out to have such blocks found",
        )
    )


def _is_a_choice(child: torch.nn.Module) -> bool:
    holds_many = isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)) and len(child) > 1
    return holds_many and any(True for _ in child.parameters())
