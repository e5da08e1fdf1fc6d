"""A resolved config as text and as JSON data: every key with its value and its reason."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.config.resolution.resolved import ResolvedConfig
from dstrain.core.secrets import hidden_in_text, without_secrets
from dstrain.core.versions import installed, python_version

REASON_WIDTH = 88
PACKAGES = ("dstrain", "deepspeed", "torch", "transformers")


def as_table(resolved: ResolvedConfig) -> str:
    """Return aligned lines ``key  value  reason``, then warnings; long reasons take several lines.

    Credentials are masked.
    """
    rows = [
        (key, _show(without_secrets(value, key)), hidden_in_text(str(resolved.provenance[key])))
        for key, value in resolved.values.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    widths[1] = min(widths[1], 24)
    lines = []
    for key, value, why in rows:
        first, *others = textwrap.wrap(why, REASON_WIDTH, break_long_words=False) or [""]
        lines.append(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {first}")
        lines += [" " * (sum(widths) + 4) + other for other in others]
    lines += [f"warning: {hidden_in_text(text)}" for text in resolved.warnings]
    return "\n".join(lines)


def as_dict(resolved: ResolvedConfig) -> dict[str, Any]:
    """Return the config as data: the nested config, reason per key, adopted arguments, warnings."""
    data = {
        "deepspeed": resolved.to_deepspeed(),
        "provenance": {
            k: {"source": p.source, "detail": p.detail} for k, p in resolved.provenance.items()
        },
        "adopted_from_config": dict(resolved.adopted),
        "warnings": list(resolved.warnings),
    }
    return dict(without_secrets(data))


def as_record(resolved: ResolvedConfig, arguments: TrainingArguments) -> dict[str, Any]:
    """Return the content of a run's ``resolved_config.json``, as plain JSON data.

    It contains the data of ``as_dict``, the facts of the resolution, all arguments, the names of
    arguments that were set, and the versions of packages.
    """
    facts = resolved.facts
    model = None if facts.model is None else asdict(facts.model)
    if facts.sizes is not None:
        model = {**(model or {}), "model_type": facts.sizes.model_type}
    record = {
        **as_dict(resolved),
        "facts": {
            "world_size": facts.world_size,
            "device": facts.device,
            "num_training_steps": facts.num_training_steps,
            "sequence_length": facts.sequence_length,
            "model": model,
            "machine": None if facts.machine is None else asdict(facts.machine),
            "own_optimizer": facts.user_optimizer,
            "own_scheduler": facts.user_scheduler,
        },
        "arguments": arguments.to_dict(),
        "set_arguments": sorted(arguments.changed_fields()),
        "versions": versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return dict(without_secrets(plain))


def versions() -> dict[str, str]:
    """Return the versions of Python and of installed ``PACKAGES``, which are not imported."""
    return {"python": python_version(), **installed(PACKAGES)}


def leaf(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path.

    Raises:
        KeyError: the path is not in the config.
    """
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping):
            raise KeyError(path)
        node = node[part]
    return node


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
