"""Check of a DeepSpeed config, before a run, against all keys of DeepSpeed 0.19.8.

DeepSpeed ignores unknown keys at the top level, and stops at the first wrong key inside a block,
after the model is built. ``check`` lists all problems; ``normalise`` converts numbers that are
written as strings, and renames keys in old spellings. The keys are data, in ``keys.py``.

Every key may be "auto": the resolver fills it, unless "auto" has a meaning for DeepSpeed
(``auto_is_a_value``).
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dstrain.config.schema.entry import NO_DEFAULT, NONE, Alias, Entry, Key, Refused, Section
from dstrain.config.schema.generated import DEEPSPEED_VERSION
from dstrain.config.schema.keys import CONFIG
from dstrain.config.schema.values import (
    MISFIT,
    NO,
    YES,
    either,
    expected,
    fit,
    is_allowed,
    kind_of,
    remedy_for,
    show,
)
from dstrain.core.errors import Problem, nearest

AUTO: Final = "auto"
COMMENTS: Final = ("_", "//", "#")  # JSON has no comments: keys with these beginnings serve as such
# No section is suggested for a key whose name is in more sections than this.
_MOST_HOMES: Final = 3
_MOST_LISTED: Final = 16  # keys that an error names


def check(config: Any) -> list[Problem]:
    """Return all problems of a config: unknown, misplaced and removed keys, wrong values."""
    return _read(config).problems


def normalise(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a copy with converted numbers and present names, and warnings of replaced names.

    Values that ``check`` refuses are copied unchanged, and comments ("_comment") are left out.
    Lists and mappings are copied; other objects, such as a process group, are shared.
    """
    reading = _read(config)
    return reading.config, reading.warnings


def known_paths() -> frozenset[str]:
    """Return the dotted paths of all keys, and of blocks in which the user chooses the keys.

    ``*`` stands for any name of the user, ``[]`` for the elements of a list.
    """
    return frozenset(
        _join(path, name)
        for path, name, entry in walk(CONFIG)
        if isinstance(entry, Key)
        or (isinstance(entry, Section) and not (_all_keys(entry) or entry.each))
    )


def default_of(path: str, *, kind: str | None = None) -> Any:
    """Return DeepSpeed's default for a missing key; ``NO_DEFAULT`` if there is no single one.

    ``kind`` is the "type" of the optimizer or scheduler that has the parameter; without it the
    default is returned if it is the same for all types.

    Raises:
        KeyError: the path is no key.
    """
    found = find_entries(path, kind)
    if not found:
        close = nearest(path, set(known_paths()))
        raise KeyError(f"{path}: no such key" + (f"; did you mean {close}?" if close else ""))
    defaults = [
        (None if entry.nullable else {}) if isinstance(entry, Section) else entry.default
        for entry in found
    ]
    return copy.deepcopy(defaults[0]) if all(d == defaults[0] for d in defaults) else NO_DEFAULT


def is_known(path: str, *, kind: str) -> bool:
    """Tell whether optimizers or schedulers of type ``kind`` have the parameter at this path."""
    return bool(find_entries(path, kind))


def read_text(text: str, key: Key) -> tuple[Any, str]:
    """Return the value of a text on a command line for a key, and what is wrong with it or ""."""
    word = text.strip().lower()
    value: Any = text.strip()
    if bool in key.types and word in (*YES, *NO):
        value = word in YES
    elif NONE in key.types and word == "none":
        value = None
    elif list in key.types and word[:1] in ("[", "("):
        value = [part.strip() for part in word[1:-1].split(",")]
    value = fit(value, key)
    if isinstance(value, list) and isinstance(key.items, Key):
        value = [fit(item, key.items) for item in value]
    misfit = value is MISFIT or (isinstance(value, list) and MISFIT in value)
    if misfit or not is_allowed(value, key):
        return None, f"expected {expected(key)}"
    return value, ""


def auto_is_a_value(path: str) -> bool:
    """Tell whether "auto" has a meaning for DeepSpeed at this path, and is not filled."""
    return any(isinstance(entry, Key) and entry.auto_is_value for entry in find_entries(path, None))


# --- looking keys up -----------------------------------------------------------------------------


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def walk(section: Section, path: str = "") -> Iterator[tuple[str, str, Entry]]:
    """Yield path of the section, name, and entry of all entries in a section and below it."""
    for name, entry in _all_keys(section).items():
        yield path, name, entry
        here = _join(path, name)
        if isinstance(entry, Section):
            yield from walk(entry, here)
        elif isinstance(entry, Key) and isinstance(entry.items, Section):
            yield from walk(entry.items, f"{here}[]")
    if section.each:
        yield from walk(section.each, _join(path, "*"))


def _all_keys(section: Section) -> Mapping[str, Entry]:
    """Return the keys of a section for all values of "type"."""
    if not section.by_type:
        return section.keys
    merged: dict[str, Entry] = {}
    for other in section.by_type.values():
        merged = {**other.keys, **merged}
    return {**merged, **section.keys}


def find_entries(path: str, kind: str | None) -> list[Key | Section]:
    """Return the entries at a path: several if they depend on a "type" and ``kind`` is None."""
    sections, found = [CONFIG], []
    for part in path.split("."):
        children = [_child(section, part) for section in sections]
        found = [entry for entry in children if isinstance(entry, (Key, Section))]
        blocks = [entry for entry in found if isinstance(entry, Section)]
        sections = []
        for block in blocks:
            if kind is None:
                sections += [block, *block.by_type.values()]
            else:
                sections.append(block.by_type.get(kind.lower(), block))
    return found


def _child(section: Section, part: str) -> Entry | None:
    entry = section.keys.get(part.removesuffix("[]"), section.each)
    return entry.items if part.endswith("[]") and isinstance(entry, Key) else entry


@functools.cache
def _homes() -> dict[str, tuple[str, ...]]:
    """Return the name of each key and block -> sections that have it; "" is the top level."""
    homes: dict[str, tuple[str, ...]] = {}
    for path, name, entry in walk(CONFIG):
        if not isinstance(entry, Refused):
            homes[name] = (*homes.get(name, ()), path)
    return homes


# --- reading a config ----------------------------------------------------------------------------


@dataclass
class _Reading:
    """Result of one pass over a config."""

    config: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    renamed: list[tuple[str, Alias, Any]] = field(default_factory=list)


def _read(config: Any) -> _Reading:
    """Read a whole config: its converted copy, problems, warnings, and renamed keys."""
    reading = _Reading()
    if not isinstance(config, Mapping):
        what = f"the DeepSpeed config is {kind_of(config)}: {show(config)}"
        reading.problems.append(Problem(what, "DeepSpeed expects an object of keys and values"))
        return reading
    reading.config = _read_section(config, CONFIG, "", reading)
    for path, alias, value in reading.renamed:
        _rename(path, alias, value, reading)
    return reading


def _read_section(
    given: Mapping[Any, Any], section: Section, path: str, reading: _Reading
) -> dict[str, Any]:
    """Return the converted values of a section; add its problems to ``reading``."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        if not (section.open or section.each) and str(name).startswith(COMMENTS):
            continue
        here = _join(path, name)
        entry = section.keys.get(name, section.each)
        if entry is None and not section.open:
            reading.problems.append(_unknown(name, value, section, path))
        if entry is None:
            out[name] = _copy(value)
        elif isinstance(entry, Refused):
            out[name] = _copy(value)
            problem = Problem(f"{here} = {show(value)}", entry.reason, entry.instead)
            reading.problems.append(problem)
        elif isinstance(entry, Alias):
            entry_of = entry.key or find_entries(entry.to, None)[0]
            reading.renamed.append((here, entry, _read_entry(value, entry_of, here, reading)))
            out[name] = None  # reserves the place of the key until _rename moves it
        elif isinstance(entry, Section) and entry.by_type:
            out[name] = _read_params(value, entry, given.get("type"), here, reading)
        else:
            out[name] = _read_entry(value, entry, here, reading)
    return out


def _read_params(value: Any, section: Section, kind: Any, path: str, reading: _Reading) -> Any:
    """Read the parameters of an optimizer or scheduler of type ``kind``."""
    if kind is None or kind == AUTO:
        # The type is not chosen yet: parameters of any type are accepted.
        listed: Section | None = Section(_all_keys(section))
    else:
        listed = section.by_type.get(str(kind).lower())
    if listed is not None:
        listed = Section(listed.keys, nullable=section.nullable)
        return _read_entry(value, listed, path, reading)
    read = _read_entry(value, section, path, reading)
    if isinstance(read, dict):
        # A type of torch: numbers in strings are converted, and nothing is checked.
        for name, key in _all_keys(section).items():
            if isinstance(read.get(name), str) and isinstance(key, Key):
                number = fit(read[name], key)
                read[name] = read[name] if number is MISFIT else number
    return read


def _read_entry(
    value: Any, entry: Key | Section, path: str, reading: _Reading, *, listed: bool = False
) -> Any:
    """Read a key or block; ``listed`` is for elements of a list, where "auto" is not filled."""
    if isinstance(entry, Key):
        is_auto = isinstance(value, str) and value == AUTO and not listed
        return value if is_auto else _read_value(value, entry, path, reading)
    if isinstance(value, Mapping):
        return _read_section(value, entry, path, reading)
    if isinstance(value, bool) and value in entry.written_out:
        new = dict(entry.written_out[value])
        reading.warnings.append(f"{path} = {value} is an old spelling: read as {new}")
        return new
    if not (isinstance(value, entry.also) or (value is None and entry.nullable)):
        names = ", ".join(_suggestable(entry)[:6])
        why = f"that is {kind_of(value)}; DeepSpeed expects an object of keys and values"
        remedy = f"write an object with keys such as {names}" if names else "write an object"
        reading.problems.append(Problem(f"{path} = {show(value)}", why, remedy))
    return _copy(value)


def _read_value(value: Any, key: Key, path: str, reading: _Reading) -> Any:
    """Return the converted value of a key; add its problem to ``reading``."""
    fitted = fit(value, key)
    what = f"{path} = {show(value)}"
    removed = key.refused.get(str(value).lower())
    if removed is not None:
        reading.problems.append(Problem(what, removed.reason, removed.instead))
    elif fitted is MISFIT:
        why = f"that is {kind_of(value)}; DeepSpeed expects {expected(key)}"
        reading.problems.append(Problem(what, why, remedy_for(value, key)))
    elif not is_allowed(fitted, key):
        why = f"DeepSpeed expects {expected(key)}"
        reading.problems.append(Problem(what, why, remedy_for(value, key)))
    elif isinstance(fitted, (list, tuple)) and key.items is not None:
        items = key.items
        read = [
            _read_entry(item, items, f"{path}[{i}]", reading, listed=True)
            for i, item in enumerate(fitted)
        ]
        return tuple(read) if isinstance(fitted, tuple) else read
    return _copy(value if fitted is MISFIT else fitted)


def _rename(path: str, alias: Alias, value: Any, reading: _Reading) -> None:
    """Move the value of a key in another spelling to the key in its present spelling."""
    *parents, old = path.split(".")
    holder: Any = reading.config
    for part in parents:
        holder = holder[part]
    *parents, new = alias.to.split(".")
    target: Any = reading.config
    for part in parents:
        target = target.setdefault(part, {}) if isinstance(target, dict) else None
    pairs = (alias.written_out or {}).items()
    matches = [stands_for for word, stands_for in pairs if word == value]
    if not isinstance(target, dict) or new in target or (alias.written_out and not matches):
        holder[old] = value
        if isinstance(target, dict) and new in target:
            why = f"{alias.to} is given too, and both mean the same setting"
            problem = Problem(f"{path} = {show(value)}", why, f"keep {alias.to} only")
            reading.problems.append(problem)
        return
    del holder[old]
    how = "an old spelling" if alias.why == "old" else "DeepSpeed's internal name"
    if matches and matches[0] is None:
        reading.warnings.append(f"{path} = {value} is {how}: left out, which means the same")
        return
    target[new] = _copy(matches[0] if matches else value)
    reading.warnings.append(f"{path} is {how}: read as {alias.to} = {show(target[new])}")


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copy(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(item) for item in value)
    return value


# --- keys that are not there ---------------------------------------------------------------------


def _unknown(name: object, value: Any, section: Section, path: str) -> Problem:
    """Return the problem of a key that a section does not have."""
    where = f"in {path}" if path else "at the top level"
    known = _suggestable(section)
    why = f"DeepSpeed {DEEPSPEED_VERSION} has no such key {where}"
    if len(known) <= _MOST_LISTED:
        why += f", which has {', '.join(known)}"
    what = f"{_join(path, name)} = {show(value)}"
    return Problem(what, why, _suggestion(str(name), known, path))


def _suggestion(name: str, known: list[str], path: str) -> str:
    """Return a remedy: the section that has the name, or the nearest name here or elsewhere."""
    elsewhere = [home for home in _homes().get(name, ()) if home != path]
    if elsewhere and len(elsewhere) <= _MOST_HOMES:
        return f"it belongs in {either([home or 'the top level' for home in elsewhere])}"
    near = nearest(name, known)
    if near:
        return f"did you mean {_join(path, near)}?"
    others = {other: homes for other, homes in _homes().items() if path not in homes}
    # Among the hundreds of names in other sections only a very similar one is suggested.
    for near in difflib.get_close_matches(name, others, n=1, cutoff=0.8):
        if len(others[near]) <= _MOST_HOMES:
            return f"did you mean {either([_join(home, near) for home in others[near]])}?"
    return "remove it"


def _suggestable(section: Section) -> list[str]:
    return [n for n, e in _all_keys(section).items() if isinstance(e, (Key, Section))]
