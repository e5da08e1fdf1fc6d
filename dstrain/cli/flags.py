"""Flags made of the fields of dataclasses; for a misspelt flag the nearest one is suggested."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from dstrain.arguments.fields import convert_values, default_of, kinds_of, treatment_of
from dstrain.core.errors import ConfigError, DstrainError, Problem, nearest, raise_problems

_NAMING = (
    *("_dir", "_file", "_path", "_name", "_checkpoint", "_template"),
    *("model_config", "deepspeed"),
)
MOST_CHOICES_CHARS = 50
"""Longest list of choices to print beside a flag's name; longer ones are in its help text."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise a ``ConfigError``, as for every other mistake of a user, instead of exiting."""
        raise ConfigError(Problem(message, "", f"see {self.prog} --help"))


def make_parser(
    prog: str, description: str, classes: Sequence[type[Any]]
) -> argparse.ArgumentParser:
    """Make a parser with a group of flags for each dataclass and each of its base classes."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for cls in classes:
        kinds = kinds_of(cls)
        for title, fields in _groups(cls):
            group = parser.add_argument_group(title)
            for field in fields:
                _add_flag(group, field, kinds[field.name])
    return parser


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    classes: Sequence[type[Any]],
    *,
    of_other_commands: Mapping[str, str] = MappingProxyType({}),
) -> tuple[argparse.Namespace, list[Any]]:
    """Parse flags into one instance of each dataclass, and a namespace of all other flags.

    Args:
        parser: a parser from ``make_parser``.
        argv: words of the command line.
        classes: the dataclasses that the parser was made of.
        of_other_commands: flag that only another command has -> remedy for the error.

    Raises:
        ConfigError: flags are unknown, values have the wrong type, or flags contradict each other;
            one error lists all problems.
    """
    known, unknown = parser.parse_known_args([_underscored(a) for a in argv])
    values = vars(known)
    problems = [
        _unknown_flag(flag, parser, of_other_commands) for flag in unknown if flag.startswith("-")
    ]
    stray = [word for word in unknown if not word.startswith("-")]
    if stray and not problems:  # else they may be the values of the unknown flags
        problems.append(
            Problem(
                f"unexpected argument {' '.join(stray)!r}",
                "every value belongs to a flag",
                f"write it after its flag, and quote text with spaces; see {parser.prog} --help",
            )
        )
    problems += [
        _names_nothing(name)
        for name, value in values.items()
        if _is_empty(name, value) and value != parser.get_default(name)
    ]
    instances: list[Any] = []
    for cls in classes:
        names = {f.name for f in dataclasses.fields(cls)}
        given = {k: values.pop(k) for k in list(values) if k in names}
        converted, wrong = convert_values(cls, given)
        problems += wrong
        try:
            instances.append(cls(**converted))
        except DstrainError as error:
            problems += error.problems
    raise_problems(
        problems, error=ConfigError, title="" if len(problems) == 1 else "the command line"
    )
    return known, instances


def _is_empty(name: str, value: Any) -> bool:
    """Tell whether the value of a flag for a name or path is empty, as by an unset shell variable.

    An empty path would be the current folder, whereas a flag that is left out has its default. An
    empty ``output_dir`` is refused by ``RunArguments``, which is also used without a command line.
    """
    is_text = isinstance(value, str) and name != "output_dir" and name.endswith(_NAMING)
    return is_text and not value.strip()


def _names_nothing(name: str) -> Problem:
    return Problem(
        f"--{name} is empty",
        "it names nothing",
        "give it a value, or leave it out; is a shell variable empty?",
    )


def _groups(cls: type[Any]) -> list[tuple[str, list[dataclasses.Field[Any]]]]:
    """Group the fields of a class by the base class that declares them, in order."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    groups = []
    for base in reversed(cls.__mro__):
        # A field that a subclass declares again stays in the group of its first declaration.
        own = [fields.pop(n) for n in inspect.get_annotations(base) if n in fields]
        if own:
            title = (base.__doc__ or base.__name__).strip().splitlines()[0].rstrip(".")
            groups.append((title, own))
    return groups


def _add_flag(group: Any, field: dataclasses.Field[Any], kinds: tuple[type, ...]) -> None:
    """Add the flag of a field to a group, with choices, treatment and default in its help."""
    options: dict[str, Any] = {"metavar": field.name.upper().split("_")[-1]}
    if bool in kinds:
        options |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
    elif list in kinds:
        options["nargs"] = "+"
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    if "choices" in field.metadata:
        choices = "|".join(map(str, field.metadata["choices"]))
        if len(choices) <= MOST_CHOICES_CHARS:
            options["metavar"] = choices
        else:
            text += f" One of {choices.replace('|', ', ')}."
    treatment = treatment_of(field)
    if treatment is not None and treatment.brief:
        text += f" ({treatment.brief})"
    default = default_of(field)
    if default is not None and default is not dataclasses.MISSING:
        shown = repr(default) if " " in str(default) else default
        text += f" (default: {shown})".replace("%", "%%")
    group.add_argument(f"--{field.name}", help=text, **options)


def _underscored(word: str) -> str:
    """Replace hyphens in a flag's name by underscores (``--learning-rate``), not in its value."""
    name, equals, value = word[2:].partition("=")
    if not word.startswith("--") or " " in name:
        return word
    return f"--{name.replace('-', '_')}{equals}{value}"


def _unknown_flag(
    flag: str, parser: argparse.ArgumentParser, of_other_commands: Mapping[str, str]
) -> Problem:
    name = flag.split("=")[0]
    known = {o for action in parser._actions for o in action.option_strings}
    close = nearest(name, known)
    guess = f"did you mean {close}?" if close else f"see {parser.prog} --help"
    return Problem(f"unknown flag {name}", "", of_other_commands.get(name, guess))
