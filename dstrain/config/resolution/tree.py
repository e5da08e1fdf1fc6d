"""A nested config by dotted paths, such as ``zero_optimization.stage``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of everything that is no section, and of empty sections."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def get(config: Mapping[str, Any], path: str) -> Any:
    """Return the value or section at a path; None where there is none."""
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def has(paths: Iterable[str], section: str) -> bool:
    """Tell whether one of the dotted paths is the section, or is inside of it."""
    return any(path == section or path.startswith(f"{section}.") for path in paths)


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Write a value, making the sections above it."""
    *parents, last = path.split(".")
    node = config
    for part in parents:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    node[last] = value


def drop(config: dict[str, Any], path: str) -> None:
    """Remove a key, and the sections that it leaves empty."""
    parent, _, last = path.rpartition(".")
    section = get(config, parent) if parent else config
    del section[last]
    if parent and not section:
        drop(config, parent)
