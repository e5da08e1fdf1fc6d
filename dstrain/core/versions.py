"""Installed versions, read without importing the packages; and that all ranks have the same."""

from __future__ import annotations

import functools
import hashlib
import platform
import socket
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from dstrain.core.errors import ConfigError, Problem
from dstrain.core.ranks import gather_objects, is_distributed

COMPARED = ("dstrain", "torch", "deepspeed", "transformers")
_HOSTS_SHOWN = 4


@functools.cache  # reading them takes longer than copying a hundred megabytes of state
def installed(names: tuple[str, ...]) -> Mapping[str, str]:
    """Versions of these packages; what is missing is left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def python_version() -> str:
    """The version of the interpreter."""
    return platform.python_version()


@functools.cache
def source_digest() -> str:
    """A few letters that tell dstrain's source from another: checkouts can share a version."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def require_same_versions() -> None:
    """See to it that all ranks run the same software; a collective of all ranks.

    One small object goes from each rank to each.

    Raises:
        ConfigError: on every rank alike, with what differs and who has what.
    """
    if not is_distributed():
        return
    own = {**installed(COMPARED), "Python": python_version()}
    own["dstrain"] = f"{own.get('dstrain', 'not installed')} (source {source_digest()})"
    said = gather_objects((socket.gethostname(), own))
    problems = different_versions(said)
    if problems:
        raise ConfigError(problems, title="the ranks run different software")


def different_versions(said: Iterable[tuple[str, Mapping[str, str]]]) -> list[Problem]:
    """A problem for each package that differs, with the ranks and hosts that have each version.

    Grows with ranks x packages, which are few.

    Args:
        said: of each rank in their order: its host, and version by package.
    """
    said = list(said)
    names = dict.fromkeys(name for _, versions in said for name in versions)
    problems = []
    for name in names:
        having: dict[str, list[int]] = {}
        for rank, (_, versions) in enumerate(said):
            having.setdefault(versions.get(name, "missing"), []).append(rank)
        if len(having) < 2:
            continue
        lines = []
        for version, ranks in having.items():
            hosts = list(dict.fromkeys(said[rank][0] for rank in ranks))
            more = f" and {len(hosts) - _HOSTS_SHOWN} more" if len(hosts) > _HOSTS_SHOWN else ""
            on = f"{', '.join(hosts[:_HOSTS_SHOWN])}{more}"
            lines.append(f"{version} on {_runs_of(ranks)} ({on})")
        problems.append(
            Problem(
                f"{name} is not the same on all ranks",
                "\n".join(lines),
                "give every machine the same versions, or one environment on a shared disk",
            )
        )
    return problems


def _runs_of(ranks: list[int]) -> str:
    """Ranks as people write them: "ranks 0-7, 12"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
