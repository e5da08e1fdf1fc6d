"""Forms of an entry in the schema: a key, a section, another spelling, a removed key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, Literal


class _NoDefault(Enum):
    NO_DEFAULT = "no default"

    def __repr__(self) -> str:
        return self.name


NO_DEFAULT: Final = _NoDefault.NO_DEFAULT
NONE: Final = type(None)


@dataclass(frozen=True)
class Refused:
    """A key or value that DeepSpeed has removed: the reason, and what to use instead."""

    reason: str
    instead: str


@dataclass(frozen=True)
class Key:
    """A key with a value.

    Attributes:
        types: accepted types; ``object`` stands for a Python object that JSON cannot hold.
        default: value that DeepSpeed uses if the key is missing.
        choices: the only accepted values, if any.
        any_case: further choices, in any letter case.
        minimum: smallest accepted number; ``above`` excludes the limit itself.
        maximum: largest accepted number; ``below`` excludes the limit itself.
        items: key or section that each element of a list is.
        auto_is_value: "auto" has a meaning for DeepSpeed and is not filled.
        infinite: infinity is accepted, for "never".
        refused: choices that DeepSpeed removed, in lower case.
    """

    types: tuple[type, ...]
    default: Any = NO_DEFAULT
    choices: tuple[str | int, ...] = ()
    any_case: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    items: Key | Section | None = None
    auto_is_value: bool = False
    infinite: bool = False
    refused: Mapping[str, Refused] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A block of keys.

    Attributes:
        keys: the known keys.
        open: further keys are accepted and not checked.
        each: block that is the value of every key, with names of the user as keys.
        by_type: value of the key "type" beside the block, in lower case -> keys of the block.
            ``keys`` and ``open`` hold for types that are not listed.
        nullable: null means that the block is missing.
        also: other accepted types of the value.
        written_out: old boolean value of the block -> block that it means.
    """

    keys: Mapping[str, Key | Section | Alias | Refused] = field(default_factory=dict)
    open: bool = False
    each: Section | None = None
    by_type: Mapping[str, Section] = field(default_factory=dict)
    nullable: bool = False
    also: tuple[type, ...] = ()
    written_out: Mapping[bool, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Alias:
    """Another spelling of a key.

    Attributes:
        to: dotted path of the key in its present spelling.
        why: "old" for a deprecated spelling, "internal" for DeepSpeed's attribute name.
        key: accepted values, if they differ from those of the key at ``to``.
        written_out: value -> value in the present spelling; None leaves the key out.
    """

    to: str
    why: Literal["old", "internal"] = "old"
    key: Key | None = None
    written_out: Mapping[Any, Any] | None = None


Entry = Key | Section | Alias | Refused


def amended(
    section: Section, changes: Mapping[str, Entry | Mapping[str, Any]], **attributes: Any
) -> Section:
    """Return a section with changed and added entries, and with changed attributes.

    Args:
        section: the section.
        changes: dotted path inside the section -> new entry, or changed attributes of the entry.
        **attributes: changed attributes of the section.

    Raises:
        KeyError: attributes are given for an entry that does not exist.
    """
    keys = dict(section.keys)
    for path, change in changes.items():
        name, _, inner = path.partition(".")
        if inner:
            block = keys[name]
            assert isinstance(block, Section), path
            keys[name] = amended(block, {inner: change})
        elif isinstance(change, Mapping):
            keys[name] = replace(keys[name], **change)
        else:
            keys[name] = change
    return replace(section, keys=keys, **attributes)


def key(kind: type, default: Any, **more: Any) -> Key:
    """Return a key of one type that may be null when null is its default."""
    return Key((kind, NONE) if default is None else (kind,), default, **more)


def flag(default: Any = False) -> Key:
    """Return a key that is true or false; null is accepted where it is the default."""
    return key(bool, default)


def whole(default: Any = NO_DEFAULT, minimum: float | None = None, **more: Any) -> Key:
    """Return a key with a whole number; null is accepted where it is the default."""
    return key(int, default, minimum=minimum, **more)


def number(default: Any = NO_DEFAULT, minimum: float | None = None, **more: Any) -> Key:
    """Return a key with a number; null is accepted where it is the default."""
    return key(float, default, minimum=minimum, **more)


def text(default: Any = NO_DEFAULT, *choices: str, **more: Any) -> Key:
    """Return a key with a text; null is accepted where it is the default."""
    return key(str, default, choices=choices, **more)


def listing(default: Any, items: Key | Section | None = None, **more: Any) -> Key:
    """Return a key with a list; null is accepted where it is the default."""
    return key(list, default, items=items, **more)


TEXT: Final = text()
LISTED_TEXTS: Final[Mapping[str, Any]] = {"items": TEXT}
