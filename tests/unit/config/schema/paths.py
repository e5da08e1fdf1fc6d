"""Sections and configs by dotted paths, for the tests of the schema."""

from __future__ import annotations

from typing import Any

from dstrain.config.schema.check import walk
from dstrain.config.schema.entry import Section
from dstrain.config.schema.keys import CONFIG


def nest(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        name = "name" if part == "*" else part.removesuffix("[]")
        value = {name: [value] if part.endswith("[]") else value}
    return value


def all_names() -> set[str]:
    return {name for _, name, _ in walk(CONFIG)}


def merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def section_at(path: str) -> Section:
    section = CONFIG
    for part in path.split("."):
        found = section.keys[part]
        assert isinstance(found, Section), path
        section = found
    return section


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    if isinstance(ours, list) and isinstance(theirs, (list, tuple)):
        return ours == list(theirs)
    return ours == theirs
