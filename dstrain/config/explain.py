"""A resolved config for people: one line per key with its value and its reason."""

from __future__ import annotations

import json
from typing import Any

from dstrain.config.resolve import ResolvedConfig


def as_table(resolved: ResolvedConfig) -> str:
    """Aligned lines ``key  value  reason``, then warnings."""
    rows = [
        (key, _show(value), str(resolved.provenance[key])) for key, value in resolved.values.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    widths[1] = min(widths[1], 24)
    lines = [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {why}" for key, value, why in rows]
    lines += [f"warning: {text}" for text in resolved.warnings]
    return "\n".join(lines)


def as_dict(resolved: ResolvedConfig) -> dict[str, Any]:
    """The same as data: the nested config, the reason per key, adopted arguments, warnings."""
    return {
        "deepspeed": resolved.to_deepspeed(),
        "provenance": {
            k: {"source": p.source, "detail": p.detail} for k, p in resolved.provenance.items()
        },
        "adopted_from_config": dict(resolved.adopted),
        "warnings": list(resolved.warnings),
    }


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
