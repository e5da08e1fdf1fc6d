"""Refusal of LayerDrop at stage 3 where each rank would skip other layers.

A rank that skips a layer does not take part in the gather of its weights, in which the ranks that
run it wait. Some models of transformers (such as Wav2Vec2) ask whether stage 3 is on, and then run
a skipped layer without using its result. Other models cannot train with LayerDrop on more than one
rank.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection

import torch

from dstrain.core.errors import ModelError, Problem, raise_problems
from dstrain.engine.model_checks.leaf_modules import full_name

_USE = re.compile(r"self\.((?:config\.)?\w*layer_?drop\w*)", re.IGNORECASE)
_ASKS = "is_deepspeed_zero3_enabled"


def check_layerdrop(module: torch.nn.Module, *, leaves: Collection[str]) -> None:
    """Check that a model for several ranks does not skip layers at random at stage 3.

    Searches the source of each module's ``forward`` for an attribute that is named like "layerdrop"
    and is above 0. Accepts models whose ``forward`` asks whether stage 3 is on. The time grows with
    the number of modules, and with the source of their classes.

    Args:
        module: the model.
        leaves: class names of modules that stage 3 gathers together with all of their submodules.

    Raises:
        ModelError: naming the values to set to 0.
    """
    uses: dict[type, tuple[str, ...]] = {}
    found: dict[tuple[str, str], float] = {}
    whole: set[int] = set()
    for part in module.modules():
        kind = type(part)
        if kind.__name__ in leaves or full_name(kind) in leaves:
            whole.update(map(id, part.modules()))
        if id(part) in whole:
            continue
        if kind not in uses:
            uses[kind] = _names_in(kind)
        for name in uses[kind]:
            value = _value(part, name)
            if value > 0:
                found[kind.__name__, _key(kind, name)] = value
    raise_problems(
        [
            Problem(
                f"{key}={value} of {kind} with ZeRO stage 3",
                "each rank would skip other layers, and wait in the gather of one for ranks that "
                "skip it",
                f"set {key}=0.0 in the model's config, or train at stage 2 (zero_stage=2)",
            )
            for (kind, key), value in sorted(found.items())
        ],
        error=ModelError,
    )


def _names_in(kind: type) -> tuple[str, ...]:
    """Return the names of attributes that control LayerDrop in a class's ``forward``.

    Returns:
        none for a ``forward`` that asks whether stage 3 is on.
    """
    source = _source(kind, "forward")
    if _ASKS in source:
        return ()
    return tuple(dict.fromkeys(_USE.findall(source)))


def _source(kind: type, method: str) -> str:
    """Return the source of a method; "" if it is not available."""
    try:
        return inspect.getsource(getattr(kind, method))
    except (AttributeError, OSError, TypeError):  # built in, or typed into an interpreter
        return ""


def _value(part: object, name: str) -> float:
    """Return the number that a dotted attribute has; 0.0 if there is none."""
    for step in name.split("."):
        part = getattr(part, step, None)
    return float(part) if isinstance(part, (int, float)) else 0.0


def _key(kind: type, name: str) -> str:
    """Return the key of the model's config from which ``__init__`` sets an attribute."""
    if name.startswith("config."):
        return name
    pattern = rf"self\.{name}\s*=.*?config(?:\.|,\s*[\"'])(\w+)"
    match = re.search(pattern, _source(kind, "__init__"))
    return f"config.{match[1]}" if match else name
