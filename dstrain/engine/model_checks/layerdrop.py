"""LayerDrop at stage 3: each rank would draw for itself which layers it skips.

A rank that skips a layer does not gather its weights, and the ranks that run it wait. Some models
of transformers (Wav2Vec2 and its kind) ask whether stage 3 is on, and then run a skipped layer
without using its result. Other models cannot train with LayerDrop on more than one rank.
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
    """Refuse a model that skips layers by chance without regard to stage 3.

    Reads the source of each module's ``forward``: such a model compares a number with a probability
    that is named like "layerdrop" and is not 0, and does not ask for stage 3. The time grows with
    the number of modules, and of classes.

    Args:
        module: the model, for several ranks.
        leaves: class names of modules that are gathered whole, with all they contain.

    Raises:
        ModelError: naming the values to set.
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
    """Return attributes by which a ``forward`` skips layers without asking for stage 3."""
    source = _source(kind, "forward")
    if _ASKS in source:
        return ()
    return tuple(dict.fromkeys(_USE.findall(source)))


def _source(kind: type, method: str) -> str:
    try:
        return inspect.getsource(getattr(kind, method))
    except (AttributeError, OSError, TypeError):  # built in, or typed into an interpreter
        return ""


def _value(part: object, name: str) -> float:
    for step in name.split("."):
        part = getattr(part, step, None)
    return float(part) if isinstance(part, (int, float)) else 0.0


def _key(kind: type, name: str) -> str:
    """Return the key of the model's config that an attribute was set from."""
    if name.startswith("config."):
        return name
    pattern = rf"self\.{name}\s*=.*?config(?:\.|,\s*[\"'])(\w+)"
    match = re.search(pattern, _source(kind, "__init__"))
    return f"config.{match[1]}" if match else name
