"""Differences between two runs: keys of their configs with both reasons, arguments, facts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dstrain.config.explain import leaf
from dstrain.core.documents import Plain, Text, parsed, typed
from dstrain.core.errors import ConfigError, Problem
from dstrain.core.files import expanded, told_refused
from dstrain.core.secrets import hidden_in_text, without_secrets

RECORD_FILE = "resolved_config.json"
# Runs that differ in these alone are the same.
NAMES_OF_A_RUN = {"output_dir", "logging_dir", "run_name"}
TITLES = {
    "key": "DeepSpeed config",
    "argument": "arguments",
    "fact": "facts",
    "version": "versions",
}


@dataclass(frozen=True)
class _Reason:
    """Reason for the value of a key of a DeepSpeed config."""

    detail: Text


@dataclass(frozen=True)
class ConfigRecord:
    """Parts of ``resolved_config.json`` that are compared."""

    deepspeed: Plain | None = None
    provenance: Mapping[Text, _Reason] | None = None
    arguments: Plain | None = None
    set_arguments: list[Text] | None = None
    adopted_from_config: Plain | None = None
    facts: Plain | None = None
    versions: Mapping[Text, Text] | None = None


@dataclass(frozen=True)
class Side:
    """Value of a name in one of two runs.

    Attributes:
        present: whether the run has a value for the name.
        value: JSON data; None if the run has no value.
        why: the reason for the value, or for its absence.
    """

    present: bool
    value: Any = None
    why: str = ""

    def __str__(self) -> str:
        """Return value and reason in one line."""
        shown = json.dumps(self.value, default=str) if self.present else "-"
        return f"{shown:<14}  {self.why}".rstrip()


@dataclass(frozen=True)
class Difference:
    """A name with different values in the two runs.

    Attributes:
        kind: a key of ``TITLES``.
        name: a dotted path of the config, or the name of an argument, fact or package.
        this: value in the run that is explained.
        other: value in the run that it is compared with.
    """

    kind: str
    name: str
    this: Side
    other: Side


def differences(this: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return the differences between two records: of keys, arguments, facts and versions.

    Args:
        this: a record, as ``as_record`` returns it.
        other: a second record in the same form. Arguments, facts and versions that only one record
            has are no difference: a run knows more than a command before it.
    """
    # A record of another release, or of another program, may have credentials in it.
    this, other = without_secrets(this), without_secrets(other)
    found = []
    for kind, sides in (("key", _keys), ("argument", _arguments), ("fact", _facts)):
        ours, theirs = dict(sides(this)), dict(sides(other))
        for name in dict.fromkeys([*ours, *theirs]):
            pair = [ours.get(name, _absent(this)), theirs.get(name, _absent(other))]
            if kind != "key" and not all(side.present for side in pair):
                continue
            if (pair[0].present, pair[0].value) != (pair[1].present, pair[1].value):
                found.append(Difference(kind, name, pair[0], pair[1]))
    ours, theirs = this.get("versions") or {}, other.get("versions") or {}
    found += [
        Difference("version", name, Side(True, ours[name]), Side(True, theirs[name]))
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    return tuple(found)


def as_text(found: tuple[Difference, ...], *, other: str) -> str:
    """Return the differences as text to print: for each name a line per run.

    Args:
        found: the differences.
        other: name of the second run.
    """
    other = hidden_in_text(other)
    if not found:
        return f"nothing differs from {other}"
    counts = {kind: sum(d.kind == kind for d in found) for kind in TITLES}
    named = [f"{n} in {TITLES[kind]}" for kind, n in counts.items() if n]
    what = "1 difference" if len(found) == 1 else f"{len(found)} differences"
    lines = [f"{what} from {other}: {', '.join(named)}"]
    for kind, title in TITLES.items():
        lines += ["", f"{title}:"] if counts[kind] else []
        for d in found:
            if d.kind == kind:
                lines += [f"  {d.name}", f"    this   {d.this}", f"    other  {d.other}"]
    return "\n".join(lines)


def as_data(found: tuple[Difference, ...]) -> list[dict[str, Any]]:
    """Return the differences as JSON data."""
    return [asdict(d) for d in found]


@told_refused(ConfigError)
def read_record(given: str) -> dict[str, Any] | None:
    """Read the record of a run from its folder or file; None if ``given`` is no such path.

    Raises:
        ConfigError: the folder has no record, or the file cannot be read, or has the keys of a
            record with values of other types.
    """
    path = expanded(given)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # a text too long for a file name
        return None
    if is_folder:
        path = path / RECORD_FILE
        if not path.is_file():
            raise ConfigError(
                Problem(
                    f"--diff {given}",
                    f"the folder has no {RECORD_FILE}, which a run writes when training starts",
                    "give the output_dir of a run, such a file, a DeepSpeed config or quoted flags",
                )
            )
    elif not is_file:
        return None
    try:
        content = parsed(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"--diff {given}", f"cannot be read: {error}")) from error
    if not isinstance(content, dict) or not {"deepspeed", "provenance"} <= set(content):
        if is_folder:
            raise ConfigError(Problem(f"--diff {path}", "it is no record of a run of dstrain"))
        return None
    try:
        typed(content, ConfigRecord)
    except ValueError as error:
        raise ConfigError(
            Problem(f"--diff {path}", f"it is no record of a run of dstrain: {error}")
        ) from error
    if content["deepspeed"] is None or content["provenance"] is None:
        raise ConfigError(Problem(f"--diff {path}", "it holds no config of a run of dstrain"))
    return content


def _keys(record: Mapping[str, Any]) -> Iterator[tuple[str, Side]]:
    """Yield path and side of each key of the DeepSpeed config in a record."""
    for path, reason in record["provenance"].items():
        try:
            value = leaf(record["deepspeed"], path)
        except KeyError:
            continue
        yield path, Side(True, value, reason["detail"])


def _arguments(record: Mapping[str, Any]) -> Iterator[tuple[str, Side]]:
    """Yield name and side of each argument in a record, with the values that ran."""
    given = set(record.get("set_arguments") or ())
    adopted = record.get("adopted_from_config") or {}
    for name, value in (record.get("arguments") or {}).items():
        if name in NAMES_OF_A_RUN:
            continue
        if name in adopted:
            yield name, Side(True, adopted[name], "from the DeepSpeed config")
        else:
            yield name, Side(True, value, "set" if name in given else "default")


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, Side]]:
    """Yield dotted name and side of each known fact in a record."""
    for name, value in (record.get("facts") or {}).items():
        for inner, part in value.items() if isinstance(value, Mapping) else [("", value)]:
            if part is not None:
                yield f"{name}.{inner}" if inner else name, Side(True, part)


def _absent(record: Mapping[str, Any]) -> Side:
    known = (record.get("facts") or {}).get("model") is not None
    return Side(False, None, "not in it" + ("" if known else "; its model's sizes are not known"))
