"""Access to a nested config by dotted paths, such as ``zero_optimization.stage``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of all keys that are not sections, and of empty sections."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def get(config: Mapping[str, Any], path: str) -> Any:
    """Return the value or section at a path, or None."""
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def has(paths: Iterable[str], section: str) -> bool:
    """Tell whether one of the paths is the section or is inside of it."""
    return any(path == section or path.startswith(f"{section}.") for path in paths)


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Write a value at a path, with the sections above it."""
    *parents, last = path.split(".")
    node = config
    for part in parents:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    node[last] = value


def drop(config: dict[str, Any], path: str) -> None:
    """Remove a key, and sections that are empty without it."""
    parent, _, last = path.rpartition(".")
    section = get(config, parent) if parent else config
    del section[last]
    if parent and not section:
        drop(config, parent)
