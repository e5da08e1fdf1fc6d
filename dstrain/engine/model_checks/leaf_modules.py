"""Checks of leaf modules: blocks that stage 3 gathers with all of their submodules at once.

ZeRO stage 3 gathers a module's parameters before its forward pass, which is a collective. A
mixture-of-experts block whose experts are separate modules runs only the experts that its tokens
are routed to. Ranks would enter different gathers and wait for each other for ever. DeepSpeed
gathers a *leaf module* as a whole, and reduces all of its gradients together.
"""

from __future__ import annotations

import re

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import ModelError, Problem

_CLASSES_KEY = "zero_optimization.leaf_module.classes"
_EXPERTS = re.compile(r"(^|_)experts?($|_)", re.IGNORECASE)


def expert_blocks(module: torch.nn.Module) -> tuple[str, ...]:
    """Return full class names of the blocks that have two or more experts as separate modules.

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
    """Return module and name of a class, in the form that DeepSpeed compares."""
    return f"{cls.__module__}.{cls.__qualname__}"


def leaf_remark(module: torch.nn.Module, resolved: ResolvedConfig) -> str | None:
    """Return a remark about expert blocks that dstrain has made leaf modules.

    Returns:
        None if there are none, or if the user has named leaf modules.
    """
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
    """Check that the model has modules of the leaf classes that the user has named.

    DeepSpeed would only log a warning.

    Raises:
        ModelError: naming the classes without a module, and those that the model has.
    """
    if resolved.stage != 3 or resolved.values.get(_CLASSES_KEY) is None:
        return
    if resolved.provenance[_CLASSES_KEY].source not in ("argument", "config"):
        return
    classes = {type(m) for m in module.modules()}
    known = {c.__name__ for c in classes} | {full_name(c) for c in classes}
    lost = [name for name in resolved.leaf_classes if name not in known]
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
    """Tell whether a module is a list or dict of two or more modules with parameters."""
    holds_many = isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)) and len(child) > 1
    return holds_many and any(True for _ in child.parameters())
