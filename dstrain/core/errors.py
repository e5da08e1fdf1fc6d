"""Errors for users: what was passed, what was expected, the remedy, and all mismatches at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        what: what was passed, with its value and where it came from.
        why: what was expected, with the arithmetic where there is one.
        remedy: what to change.
    """

    what: str
    why: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """Render as one to three lines, the first without indentation."""
        lines = [self.what]
        if self.why:
            lines.append(f"    why: {self.why}")
        if self.remedy:
            lines.append(f"    fix: {self.remedy}")
        return "\n".join(lines)


class DstrainError(Exception):
    """Base of every error that a user can cause and mend."""

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
    """Arguments or a DeepSpeed config that cannot be used as given."""


class DataError(DstrainError, ValueError):
    """Training or evaluation data that is missing, empty or of the wrong shape."""


class ModelError(DstrainError, ValueError):
    """A model that cannot be built, loaded, trained or saved as asked."""


class CheckpointError(DstrainError, RuntimeError):
    """A checkpoint that cannot be written, verified or resumed."""


class TrainingError(DstrainError, RuntimeError):
    """A run that went wrong while training, such as a loss that became NaN."""


def raise_problems(
    problems: Sequence[Problem], *, error: type[DstrainError] = ConfigError, title: str = ""
) -> None:
    """Raise ``error`` with every problem in one message; do nothing when there is none."""
    if problems:
        raise error(problems, title=title)


def nearest(name: str, known: Sequence[str] | set[str]) -> str | None:
    """The known name closest in spelling to ``name``, or None when nothing is close."""
    import difflib

    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _indent(problem: Problem) -> str:
    return str(problem).replace("\n", "\n  ")
