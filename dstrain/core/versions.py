"""Versions of installed packages, read without imports, and a check that all ranks' are equal."""

from __future__ import annotations

import functools
import hashlib
import platform
import socket
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from dstrain.core.errors import ConfigError, Problem
from dstrain.core.ranks import gather_objects, is_distributed, named_ranks

COMPARED = ("dstrain", "torch", "deepspeed", "transformers")
_HOSTS_SHOWN = 4


@functools.cache  # reading them takes longer than copying a hundred megabytes of state
def installed(names: tuple[str, ...]) -> Mapping[str, str]:
    """Return the installed version of each of these packages; leave out what is missing."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def python_version() -> str:
    """Return the version of the interpreter."""
    return platform.python_version()


@functools.cache
def source_digest() -> str:
    """Return 8 hexadecimal digits of a hash of dstrain's source.

    It distinguishes checkouts that have the same version number.
    """
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def require_same_versions() -> None:
    """Check that all ranks run the same software; a collective of all ranks.

    Gathers one small object of each rank on every rank.

    Raises:
        ConfigError: versions differ; raised on every rank, with the ranks of each version.
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
    """Return a problem for each package that differs, with the ranks and hosts of each version.

    Takes time in proportion to ranks x packages, of which there are few.

    Args:
        said: for each rank in order, its host and its version of each package.
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
            lines.append(f"{version} on {named_ranks(ranks)} ({on})")
        problems.append(
            Problem(
                f"{name} is not the same on all ranks",
                "\n".join(lines),
                "give every machine the same versions, or one environment on a shared disk",
            )
        )
    return problems
