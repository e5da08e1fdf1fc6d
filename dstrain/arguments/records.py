"""Arguments as plain values for trackers, files and messages, without credentials."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

from dstrain.arguments.choice import Choice
from dstrain.arguments.fields import shown
from dstrain.core.secrets import is_mask, without_masks, without_secrets

_LIKE_ENUMS = (enum.Enum, Choice)


class Records:
    """Methods of a dataclass of arguments that return its values without credentials."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep ``@dataclass`` from giving a subclass a ``__repr__`` that shows credentials."""
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Records.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Return all fields, one per line, sorted by name; credentials are masked."""
        fields = sorted(f.name for f in dataclasses.fields(self))  # type: ignore[arg-type]
        lines = [f"{name}={shown(name, getattr(self, name))},\n" for name in fields]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values; a credential, at any depth, becomes ``<ITS_NAME>``."""
        return {
            f.name: without_secrets(_plain(getattr(self, f.name)), f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.init
        }

    def to_json_string(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """Return ``to_dict`` and batch sizes, with other values than bools and numbers as text."""
        values = self.to_dict()
        for name in ("train_batch_size", "eval_batch_size"):
            values[name] = getattr(self, name)
        return {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()
        }

    def _forget_masks(self) -> None:
        """Remove masks of credentials that ``to_dict`` wrote, at any depth."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if is_mask(field.name, value):
                setattr(self, field.name, None)
            elif isinstance(value, dict) and (kept := without_masks(value)) != value:
                setattr(self, field.name, kept)


def _plain(value: Any) -> Any:
    """Return a value of a field as JSON data, as far as its type is known."""
    if isinstance(value, _LIKE_ENUMS):
        return value.value
    if isinstance(value, (list, tuple)) and any(isinstance(v, _LIKE_ENUMS) for v in value):
        return [v.value if isinstance(v, _LIKE_ENUMS) else v for v in value]
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    return value
