"""Choosing the checkpoint to resume from: the newest that verifies, or the one that was named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dstrain.checkpoint import folders
from dstrain.checkpoint.load import check_coverage, read_index
from dstrain.checkpoint.manifest import Manifest, check_files, extra_files, read_manifest
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, gather_objects

logger = get_logger(__name__)

AUTO = "auto"


def choose(wanted: str | bool, output_dir: Path, ranks: Ranks) -> tuple[Path, Manifest] | None:
    """The checkpoint to resume from, the same on all ranks, which share the work of verifying it.

    Args:
        wanted: a folder; True for the newest of the run that verifies; "auto" likewise, but None
            where the run has no checkpoint at all.
        output_dir: the run's folder.
        ranks: facts of this process.

    Returns:
        folder and manifest; None only for "auto".

    Raises:
        CheckpointError: the named one does not verify, or none does; with the reasons.
    """
    if wanted is not True and wanted != AUTO:
        folder = Path(str(wanted)).expanduser()
        manifest, problems = _verified(folder, ranks)
        if manifest is None:
            raise _unusable(folder, problems, output_dir)
        return folder, manifest
    names = [str(found.folder) for found in reversed(folders.committed(output_dir))]
    candidates = [Path(name) for name in gather_objects(names)[0]]
    skipped = []
    for folder in candidates:
        manifest, problems = _verified(folder, ranks)
        if manifest is not None:
            return folder, manifest
        skipped.append(f"{folder.name}: {'; '.join(problems)}")
        if ranks.is_main:
            logger.warning("%s is skipped: %s", folder, "; ".join(problems))
    if wanted == AUTO and not candidates:
        if ranks.is_main:
            logger.info("no checkpoint in %s: training starts afresh", output_dir)
        return None
    raise _none_to_resume(output_dir, skipped)


def wanted_checkpoint(given: str | bool | None) -> str | bool | None:
    """What ``resume_from_checkpoint`` says: a folder, True, "auto", or None for a fresh start."""
    word = given.lower() if isinstance(given, str) else given
    if word in (None, False, "false", "none", ""):
        return None
    return True if word in (True, "true") else AUTO if word == AUTO else given


def check_there(given: str | bool | None, output_dir: Path) -> None:
    """A quick look, before anything expensive: whether there is something to resume from.

    Raises:
        CheckpointError: there is not.
    """
    wanted = wanted_checkpoint(given)
    if wanted is None or wanted == AUTO:
        return
    if wanted is True:
        if not folders.committed(output_dir):
            raise _none_to_resume(output_dir, [])
        return
    folder = Path(str(wanted)).expanduser()
    try:
        read_manifest(folder)
    except CheckpointError as error:
        raise _unusable(folder, _lines(error), output_dir) from error


def verify(
    folder: Path,
    *,
    share: tuple[int, int] = (0, 1),
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> tuple[Manifest, list[str]]:
    """A checkpoint's manifest, and everything that is wrong with it.

    Args:
        folder: the checkpoint.
        share: (k, n): read every n-th file only, from the k-th on.
        on_file: called with the bytes of each file that has been read.

    Raises:
        CheckpointError: there is no manifest that this dstrain can read.
    """
    manifest = read_manifest(folder)
    problems = check_files(folder, manifest, share=share, on_file=on_file)
    if not problems and manifest.has_slices:
        problems = check_coverage(read_index(folder, manifest), manifest)
    return manifest, problems


def _verified(folder: Path, ranks: Ranks) -> tuple[Manifest | None, list[str]]:
    """The manifest where all ranks together found nothing wrong, and what they found."""
    manifest = None
    try:
        manifest, problems = verify(folder, share=(ranks.rank, ranks.world_size))
        if not manifest.resumable:
            problems.append("it holds the model alone (save_only_model=True)")
        elif ranks.is_main and (extra := extra_files(folder, manifest)):
            logger.warning("%s has files that are no part of it: %s", folder, ", ".join(extra))
    except CheckpointError as error:
        problems = _lines(error)
    said = [line for lines in gather_objects(problems) for line in lines]
    return (None if said else manifest), list(dict.fromkeys(said))


def _lines(error: CheckpointError) -> list[str]:
    return [f"{p.what}: {p.why}" if p.why else p.what for p in error.problems]


def _unusable(folder: Path, problems: list[str], output_dir: Path) -> CheckpointError:
    return CheckpointError(
        Problem(
            f"resume_from_checkpoint={str(folder)!r} cannot be used",
            "\n".join(problems),
            _suggestion(folder, output_dir),
        )
    )


def _none_to_resume(output_dir: Path, skipped: list[str]) -> CheckpointError:
    return CheckpointError(
        Problem(
            f"no checkpoint in {str(output_dir)!r} can be resumed",
            "\n".join(skipped) or "there is none",
            "name another folder, or start afresh in another output_dir"
            if skipped
            else "leave resume_from_checkpoint out to start afresh, or use 'auto'",
        )
    )


def _suggestion(folder: Path, output_dir: Path) -> str:
    for place in (folder, output_dir):
        if found := folders.committed(place):
            return f"the newest checkpoint in {str(place)!r} is {str(found[-1].folder)!r}"
    return f"there is no checkpoint in {str(output_dir)!r}"
