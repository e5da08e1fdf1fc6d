"""Errors for users, with what was passed, what was expected and a remedy, all problems at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dstrain.core.secrets import hidden_in_text


@dataclass(frozen=True)
class Problem:
    """A single mistake or failure to show to a user; credentials in its texts are masked.

    Attributes:
        what: what was passed, with its value and where it came from.
        why: what was expected, with the arithmetic where there is one.
        remedy: what to change.
    """

    what: str
    why: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        """Mask credentials: errors are printed, logged and sent to other ranks."""
        for name in ("what", "why", "remedy"):
            object.__setattr__(self, name, hidden_in_text(getattr(self, name)))

    def __str__(self) -> str:
        """Render as one to three lines, the first without indentation."""
        lines = [self.what]
        for name, text in (("why", self.why), ("fix", self.remedy)):
            if text:
                # Messages of libraries can have several lines; indent those after the first.
                indented = text.strip().replace("\n", "\n         ")
                lines.append(f"    {name}: {indented}")
        return "\n".join(lines)


class DstrainError(Exception):
    """Base class of errors that a user can cause and fix."""

    def __init__(self, problems: str | Problem | Sequence[Problem], *, title: str = "") -> None:
        """Keep the problems as data; the message lists all of them."""
        if isinstance(problems, str):
            problems = [Problem(problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        if len(self.problems) == 1 and not title:
            message = str(self.problems[0])
        else:
            heading = title or f"{len(self.problems)} problems"
            message = "\n".join([f"{heading}:", *(f"  - {_indent(p)}" for p in self.problems)])
        super().__init__(message)


class ConfigError(DstrainError, ValueError):
    """Error in arguments or a DeepSpeed config that cannot be used as given."""


class DataError(DstrainError, ValueError):
    """Error in training or evaluation data that is missing, empty or of the wrong shape."""


class ModelError(DstrainError, ValueError):
    """Error of a model that cannot be built, loaded, trained or saved as asked."""


class CheckpointError(DstrainError, RuntimeError):
    """Error of a checkpoint that cannot be written, verified or resumed."""


class TrainingError(DstrainError, RuntimeError):
    """Error of a run that failed while training, such as a loss that became NaN."""


def raise_problems(
    problems: Sequence[Problem], *, error: type[DstrainError] = ConfigError, title: str = ""
) -> None:
    """Raise ``error`` with every problem in one message; do nothing without problems."""
    if problems:
        raise error(problems, title=title)


@contextlib.contextmanager
def collected(errors: list[DstrainError]) -> Iterator[None]:
    """Catch a user error of the body and append it to ``errors``, so that later checks run too."""
    try:
        yield
    except DstrainError as error:
        errors.append(error)


def raise_errors(errors: Sequence[DstrainError]) -> None:
    """Raise a single error as it is, and several as one error that lists every problem."""
    if len(errors) == 1:
        raise errors[0]
    raise_problems([problem for error in errors for problem in error.problems])


def nearest(name: str, known: Sequence[str] | set[str]) -> str | None:
    """Return the known name closest in spelling to ``name``, or None when nothing is close."""
    import difflib

    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _indent(problem: Problem) -> str:
    return str(problem).replace("\n", "\n  ")
