"""Parsing and validation of untrusted JSON documents into typed values.

All JSON of checkpoints is read here: bytes become plain values of limited depth, and these become a
typed value whose every field has been checked (type, range, form). All faults of a file are raised
as one ``CheckpointError`` that names the file and the fields. Nothing is executed, converted or
guessed: neither "3" nor true counts as a number.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError

from dstrain.core.errors import CheckpointError, Problem

T = TypeVar("T")

# JSON that dstrain writes is a dozen levels deep; states of users' objects may be deeper.
MOST_LEVELS = 200
_NESTED = (dict, list, tuple)
_MOST_FAULTS = 5
_LONGEST = 60


def _indexable_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(n for n in shape if n) >= 2**63:
        raise ValueError("it has more elements than there can be")
    return shape


def _bounded(number: float) -> float:
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
        raise ValueError("it is out of range")
    return number


def _nonnegative(number: float) -> float:
    if not (0 <= number < 2**63 if isinstance(number, int) else 0.0 <= number < math.inf):
        raise ValueError("it is out of range")
    return number


def _relative_path(name: str) -> str:
    path = PurePosixPath(name)
    whole = str(path) == name and name != "."
    if not whole or path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise ValueError("it names a file outside of its folder, or none")
    os.fsencode(name)  # UnicodeEncodeError is a ValueError
    return name


Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Integer = Annotated[int, Strict(), Ge(-(2**63)), Lt(2**63)]
Count = Annotated[int, Strict(), Ge(0), Lt(2**63)]
AtLeastOne = Annotated[int, Strict(), Gt(0), Lt(2**63)]
Real = Annotated[float, Strict()]
"""A number as a float; NaN and infinities are allowed."""
Number = Annotated[
    Annotated[bool, Strict()] | Annotated[int, Strict()] | Annotated[float, Strict()],
    AfterValidator(_bounded),
]
"""A bool, an integer or a float, kept in the type in which it was written."""
Total = Annotated[
    Annotated[int, Strict()] | Annotated[float, Strict()], AfterValidator(_nonnegative)
]
"""A running total: an integer or a float, finite and not negative."""
Shape = Annotated[tuple[Count, ...], AfterValidator(_indexable_shape)]
FileName = Annotated[str, Strict(), AfterValidator(_relative_path)]
"""A relative path that stays inside its folder: no "..", no absolute path."""
Plain = Mapping[Text, Any]
"""A JSON object with any content, such as the state of a user's callback."""


def parsed(data: bytes) -> Any:
    """Parse a JSON text and return its value.

    Raises:
        ValueError: the text is not JSON, or is nested too deep.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Check that a value is not nested deeper than ``MOST_LEVELS``, which all readers accept.

    Raises:
        ValueError: the value is nested deeper.
    """
    level = [value] if isinstance(value, _NESTED) else []
    for _ in range(MOST_LEVELS):
        if not level:
            return
        level = [
            part
            for outer in level
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, _NESTED)
        ]
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"it is nested deeper than {MOST_LEVELS} levels"


def typed(value: Any, kind: type[T]) -> T:
    """Check plain values against ``kind``, a dataclass or an annotated type, and return a ``kind``.

    Raises:
        ValueError: fields do not match ``kind``; the message names them.
    """
    try:
        known: Any = kind
        checked: T = _adapter(known).validate_python(value)
    except ValidationError as error:
        raise ValueError(_faults(error)) from None
    return checked


def loaded(path: Path, most: int = -1) -> bytes:
    """Return the content of a regular file; refuse pipes and devices without waiting for them.

    Args:
        path: the file.
        most: number of bytes to read from its beginning; -1 for all.

    Raises:
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no file")
        return file.read(most)


def read_document(path: Path, kind: type[T]) -> T:
    """Read a JSON file as a value of ``kind``.

    Raises:
        CheckpointError: the file is missing or damaged; the message names the file and the fields.
    """
    try:
        return typed(parsed(loaded(path)), kind)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file of a checkpoint that cannot be read, with the reason."""
    why = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return CheckpointError(Problem(f"{path} cannot be read", why, "use another checkpoint"))


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _faults(error: ValidationError) -> str:
    """Return a sentence with the first few invalid fields and their faults, and how many follow."""
    found = error.errors(include_url=False, include_context=False)
    lines = []
    for fault in found[:_MOST_FAULTS]:
        place = ".".join(_short(str(part)) for part in fault["loc"])
        said = fault["msg"].removeprefix("Value error, ")
        said = said[:1].lower() + said[1:]
        shown = "" if fault["type"] == "missing" else f", it is {_short(_shown(fault['input']))}"
        lines.append(f"{place}: {said}{shown}" if place else said + shown)
    if len(found) > _MOST_FAULTS:
        lines.append(f"and {len(found) - _MOST_FAULTS} more")
    return "; ".join(lines)


def _shown(value: Any) -> str:
    """Render a value for a message: containers by their length, huge numbers by their bits."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


def _short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
