"""A model config as a user writes it, read without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dstrain.core.errors import ModelError, Problem


def read_spec(spec: str) -> tuple[dict[str, Any], bool]:
    """A model config as written: ``type:key=value,...``, a config.json, or a folder with one.

    Returns:
        its values with ``model_type``, and whether it was the short form.

    Raises:
        ModelError: the file cannot be read, or names no model type.
    """
    path = Path(spec).expanduser()
    if not (spec.endswith(".json") or _exists(path)):
        kind, _, rest = spec.partition(":")
        pairs = [pair.partition("=") for pair in filter(None, map(str.strip, rest.split(",")))]
        return {"model_type": kind} | {k.strip(): _value(v.strip()) for k, _, v in pairs}, True
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(Problem(f"model_config={spec!r} cannot be read", str(error))) from error
    if not isinstance(content, dict) or not content.get("model_type"):
        raise ModelError(Problem(f"model_config={spec!r}", "it has no model_type"))
    return content, False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a short form longer than a file name may be
        return False


def _value(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
