"""Declaration of arguments, and conversion of texts from files or shells to their types."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dstrain.arguments.treatment import Treatment
from dstrain.core.errors import Problem, nearest
from dstrain.core.secrets import without_secrets


class _Help(str):
    """Help text of a field, with its treatment as an attribute.

    The treatment cannot be a key of the metadata: ``HfArgumentParser`` passes every key to
    ``argparse.add_argument``, which accepts only its own.
    """

    treatment: Treatment


def arg(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    treatment: Treatment | None = None,
) -> Any:
    """Declare one argument.

    Args:
        default: the documented default.
        help: meaning of the argument, with its unit and special values.
        choices: legal values; None for any.
        treatment: treatment of values; only fields that a user adds have none.
    """
    if treatment is not None:
        help = _treated(help, treatment)
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    if isinstance(default, (dict, list)):
        frozen = default
        return dataclasses.field(default_factory=lambda: type(frozen)(frozen), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _treated(help: str, treatment: Treatment) -> _Help:
    text = _Help(help)
    text.treatment = treatment
    return text


def treatment_of(field: dataclasses.Field[Any]) -> Treatment | None:
    """Return the treatment in the declaration of a field; None for a field that a user added."""
    return getattr(field.metadata.get("help"), "treatment", None)


def shown(name: str, value: Any) -> str:
    """Return a value as text for messages, in which credentials are masked."""
    hidden = without_secrets(value, name)
    return hidden if hidden is not value and isinstance(hidden, str) else repr(hidden)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default value of a dataclass field, also from a ``default_factory``."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def coerce_fields(arguments: Any) -> dict[str, Problem]:
    """Convert the values of a dataclass, in place, to the declared types.

    JSON and YAML files, environment variables and tools for hyperparameters give texts such as
    ``"5e-5"`` and ``"true"``; a dict field accepts a JSON object as a text.

    Returns:
        field -> problem, for each field with a value that cannot be converted or is not legal.
    """
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
    converted, problems = convert_values(type(arguments), given)
    for name, value in converted.items():
        if value is not given[name]:
            setattr(arguments, name, value)
    unread = [name for name in given if name not in converted]
    return dict(zip(unread, problems, strict=True))


def convert_values(
    cls: type[Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the values of ``given`` converted to the declared types of ``cls``, and problems.

    Each given field is either among the values or has one problem; both are in order of fields.
    """
    problems: list[Problem] = []
    converted: dict[str, Any] = {}
    kinds_by_name = kinds_of(cls)
    for field in dataclasses.fields(cls):
        if field.name not in given:
            continue
        value, kinds = given[field.name], kinds_by_name[field.name]
        problem = None
        try:
            value = _convert(value, kinds)
        except ValueError:
            problem = Problem(_given(field.name, value), f"expected {_say(kinds)}")
        else:
            problem = _illegal(field, value, kinds)
        if problem is None:
            converted[field.name] = value
        else:
            problems.append(problem)
    return converted, problems


def kinds_of(cls: type[Any]) -> dict[str, tuple[type, ...]]:
    """Return field -> classes that its annotation allows.

    ``field.type`` is not used, because ``HfArgumentParser`` replaces it.
    """
    hints = typing.get_type_hints(cls)
    return {f.name: _kinds(hints[f.name]) for f in dataclasses.fields(cls)}


def _given(name: str, value: Any) -> str:
    """Return name and value as the user wrote them, and the type of a value that is no text."""
    kind = "" if isinstance(value, str) else f" ({type(value).__name__})"
    return f"{name}={shown(name, value)}{kind}"


def _illegal(field: dataclasses.Field[Any], value: Any, kinds: tuple[type, ...]) -> Problem | None:
    """Return the problem of a converted value that is not legal for its field, or None."""
    if value is None:
        if type(None) in kinds or object in kinds or field.default is None:
            return None
        return Problem(f"{field.name}=None", f"a value is needed ({_say(kinds)})", "leave it out")
    if isinstance(value, float) and not math.isfinite(value):
        # Comparisons with NaN are false, so no check of a range would find it.
        return Problem(f"{field.name}={value}", "a finite number is needed")
    treatment = treatment_of(field)
    if treatment is not None and isinstance(value, str) and value in treatment.excluded:
        return Problem(f"{field.name}={value!r}", treatment.excluded[value])
    allowed = field.metadata.get("choices")
    if allowed is None or value in allowed:
        return None
    close = nearest(str(value), {str(a) for a in allowed})
    return Problem(
        f"{field.name}={value!r}",
        f"expected one of {', '.join(map(str, allowed))}",
        f"did you mean {close!r}?" if close else "",
    )


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the classes in a type hint: ``dict | str | None`` -> (dict, str, NoneType)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(k for part in typing.get_args(hint) for k in _kinds(part))
    if origin is not None:
        return (origin,)
    return (hint,) if isinstance(hint, type) and hint is not Any else (object,)


def _say(kinds: tuple[type, ...]) -> str:
    names = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}
    names |= {"NoneType": "none", "dict": "an object (dict)", "list": "a list"}
    return " or ".join(names.get(k.__name__, k.__name__) for k in kinds)


def _convert(value: Any, kinds: tuple[type, ...]) -> Any:
    """Convert a value to one of the classes of its field; raise ``ValueError`` if that fails."""
    if isinstance(value, enum.Enum):  # transformers' own arguments use them
        value = value.value
    if value is None or object in kinds:
        return value
    if isinstance(value, bool):
        if bool in kinds:
            return value
        raise ValueError(value)
    if isinstance(value, str):
        return _convert_text(value, kinds)
    if isinstance(value, int) and int not in kinds and float in kinds:
        return float(value)
    if isinstance(value, float) and float not in kinds and int in kinds:
        if value.is_integer():
            return int(value)
        raise ValueError(value)
    if list in kinds and isinstance(value, (tuple, list)):
        if len(value) == 1 and isinstance(value[0], str) and value[0].startswith("["):
            return json.loads(value[0])  # a list that a shell passes as JSON
        return list(value) if isinstance(value, tuple) else value
    if not isinstance(value, kinds) and not hasattr(value, "__fspath__"):
        raise ValueError(value)
    return str(value) if hasattr(value, "__fspath__") else value


def _convert_text(text: str, kinds: tuple[type, ...]) -> Any:
    """Convert a text to one of the classes; raise ``ValueError`` if that fails."""
    low = text.strip().lower()
    if type(None) in kinds and low == "none" and str not in kinds:
        return None
    if bool in kinds and low in ("true", "false", "yes", "no", "1", "0"):
        return low in ("true", "yes", "1")
    if dict in kinds and text.lstrip().startswith("{"):
        if str in kinds:
            return text  # it is parsed where the dict is used, with errors about its keys
        parsed = json.loads(text)  # json.JSONDecodeError is a ValueError
        if not isinstance(parsed, dict):
            raise ValueError(text)
        return parsed
    if list in kinds:
        if text.startswith("["):
            return json.loads(text)
        return [part.strip() for part in text.split(",")]
    if str in kinds:
        return text
    if int in kinds:
        with contextlib.suppress(ValueError):
            return int(text)  # exact; a float would change a seed above 2**53
        number = float(text)  # "1e3" is a common way to write an integer
        if number.is_integer():
            return int(number)
        if float not in kinds:
            raise ValueError(text)
    if float in kinds:
        return float(text)
    raise ValueError(text)
