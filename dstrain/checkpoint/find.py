"""Choosing and verifying the checkpoint to resume from: a named folder, or the newest valid one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

from dstrain.checkpoint import content, folders
from dstrain.checkpoint.manifest import Manifest, check_files, extra_files, read_manifest
from dstrain.checkpoint.run_files import read_run
from dstrain.checkpoint.slice_index import check_coverage, header_faults, read_index
from dstrain.checkpoint.trainer_state import STATE as TRAINER_STATE
from dstrain.checkpoint.trainer_state import read_trainer_state
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.files import expanded, told_refused
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, gather_objects

logger = get_logger(__name__)

AUTO = "auto"


Inspect = Callable[[Path, Manifest], object]
"""Function that reads the parts of a checkpoint a run needs; raises ``CheckpointError``."""


def choose_checkpoint(
    wanted: str | bool,
    output_dir: Path,
    ranks: Ranks,
    *,
    on_each_node: bool = False,
    inspect: Inspect = lambda folder, manifest: None,
) -> tuple[Path, Manifest] | None:
    """Choose the checkpoint to resume from, the same on all ranks, which verify it together.

    Args:
        wanted: a folder; True for the run's newest checkpoint that verifies; "auto" for the same,
            or for a fresh start where the run has no checkpoint at all.
        output_dir: the run's folder.
        ranks: facts of this process.
        on_each_node: whether each machine has the folder on a disk of its own; a checkpoint counts
            only where every machine has its part of it.
        inspect: reads further parts that the run needs; called on every rank once the files have
            been verified.

    Returns:
        Folder and manifest; None only for "auto".

    Raises:
        CheckpointError: the named checkpoint does not verify, or no checkpoint of the run does; the
            message has the reasons.
    """
    if wanted is not True and wanted != AUTO:
        folder = expanded(str(wanted))
        manifest, problems = _verified(folder, ranks, on_each_node=on_each_node, inspect=inspect)
        if manifest is None:
            raise _unusable(folder, problems, output_dir)
        return folder, manifest
    candidates, others = _candidates(output_dir, on_each_node=on_each_node)
    skipped = []
    for folder in candidates:
        manifest, problems = _verified(folder, ranks, on_each_node=on_each_node, inspect=inspect)
        if manifest is not None:
            return folder, manifest
        skipped.append(f"{folder.name}: {'; '.join(problems)}")
        if ranks.is_main:
            logger.warning("%s is skipped: %s", folder, "; ".join(problems))
    if wanted == AUTO and not others:
        if ranks.is_main:
            logger.info("no checkpoint in %s: training starts afresh", output_dir)
        return None
    raise _none_to_resume(output_dir, skipped)


def _candidates(output_dir: Path, *, on_each_node: bool) -> tuple[list[Path], bool]:
    """List the checkpoints of a run on any of its machines, newest first; the same on all ranks.

    Returns:
        All folders with a checkpoint's name, also without a manifest, so that the caller can log
        why it skips them; and whether any of them has a manifest.
    """
    with all_or_none(), told_refused(CheckpointError):
        manifests = {found.folder for found in folders.committed(output_dir)}
        mine = [(f.step, str(f.folder), f.folder in manifests) for f in folders.named(output_dir)]
    said = gather_objects(mine)
    said = said if on_each_node else said[:1]
    steps = {step for found in said for step, _, _ in found}
    any_committed = any(whole for found in said for _, _, whole in found)
    if not on_each_node:
        return [Path(name) for _, name, _ in reversed(said[0])], any_committed
    return [
        folders.checkpoint_path(output_dir, s) for s in sorted(steps, reverse=True)
    ], any_committed


def wanted_checkpoint(given: str | bool | None) -> str | bool | None:
    """Parse ``resume_from_checkpoint`` to a folder, True, "auto", or None for a fresh start."""
    word = given.lower() if isinstance(given, str) else given
    if word in (None, False, "false", "none", ""):
        return None
    return True if word in (True, "true") else AUTO if word == AUTO else given


@told_refused(CheckpointError)
def check_resumable(given: str | bool | None, output_dir: Path) -> None:
    """Check quickly, before anything expensive, that there is a checkpoint to resume from.

    Raises:
        CheckpointError: there is none.
    """
    wanted = wanted_checkpoint(given)
    if wanted is None or wanted == AUTO:
        return
    if wanted is True:
        if not folders.committed(output_dir):
            skipped = []
            for found in folders.named(output_dir):
                try:
                    read_manifest(found.folder)
                except CheckpointError as error:
                    skipped += [f"{found.folder.name}: {line}" for line in _lines(error)]
            raise _none_to_resume(output_dir, skipped)
        return
    folder = expanded(str(wanted))
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
    """Verify a checkpoint's files against its manifest; return the manifest and all problems.

    Args:
        folder: the checkpoint.
        share: (k, n): read every n-th file only, from the k-th on.
        on_file: called with the bytes of each file that has been read.

    Raises:
        CheckpointError: the manifest is missing, or this dstrain cannot read it.
    """
    manifest = read_manifest(folder)
    problems = check_files(folder, manifest, share=share, on_file=on_file)
    if not problems:
        try:
            problems = _faults_within(folder, manifest, share)
        except CheckpointError as error:
            problems = _lines(error)
    return manifest, problems


def _faults_within(folder: Path, manifest: Manifest, share: tuple[int, int]) -> list[str]:
    """List problems in the content of intact files: the run's documents, the slices' headers.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        share: (k, n): read the headers of every n-th rank only, from the k-th on.

    Raises:
        CheckpointError: a document or header cannot be parsed.
    """
    if manifest.resumable:
        if content.RUN not in manifest.files:
            return [f"{content.RUN} is not listed in its manifest"]
        read_run(folder)
    if TRAINER_STATE in manifest.files:
        read_trainer_state(folder)
    if not manifest.has_slices:
        return []
    index = read_index(folder, manifest)
    faults = header_faults(folder, manifest, index, share)
    return faults + ([] if index.absent else check_coverage(index, manifest))


def verify_on_ranks(folder: Path, ranks: Ranks, *, on_each_node: bool = False) -> Manifest:
    """Verify a checkpoint's files on all ranks together, and return its manifest.

    Args:
        folder: the checkpoint.
        ranks: facts of this process.
        on_each_node: as in ``choose_checkpoint``.

    Raises:
        CheckpointError: the checkpoint is damaged; raised on every rank with all problems.
    """
    manifest, problems = _verified(folder, ranks, on_each_node=on_each_node, model_alone=True)
    if manifest is None:
        raise CheckpointError(
            Problem(f"{folder} cannot be used", "\n".join(problems), "choose another checkpoint")
        )
    return manifest


def _verified(
    folder: Path,
    ranks: Ranks,
    *,
    on_each_node: bool,
    model_alone: bool = False,
    inspect: Inspect = lambda folder, manifest: None,
) -> tuple[Manifest | None, list[str]]:
    """Verify a checkpoint on all ranks together; return its manifest (None: unusable) and problems.

    Args:
        folder: the checkpoint.
        ranks: facts of this process.
        on_each_node: whether each machine reads a folder of its own.
        model_alone: whether a checkpoint without optimizer state is accepted.
        inspect: as for ``choose_checkpoint``; not called for a damaged checkpoint.
    """
    manifest = None
    readers = ranks.on_machine() if on_each_node else ranks
    try:
        manifest, problems = verify(folder, share=(readers.rank, readers.world_size))
        if not manifest.resumable and not model_alone:
            problems.append("it holds the model alone (save_only_model=True)")
        elif ranks.is_main and (extra := extra_files(folder, manifest)):
            logger.warning("%s has files that are no part of it: %s", folder, ", ".join(extra))
        if not problems:
            inspect(folder, manifest)
    except CheckpointError as error:
        problems = _lines(error)
    if on_each_node:
        if manifest is not None and manifest.world_size == ranks.world_size:
            own = content.rank_file(ranks.rank)
            problems += [f"{own} is missing"] if own in manifest.not_in(folder) else []
        problems = [f"on the machine of rank {ranks.first_on_machine}: {p}" for p in problems]
        problems += _other_saves(manifest, ranks)
    said = [line for lines in gather_objects(problems) for line in lines]
    return (None if said else manifest), list(dict.fromkeys(said))


def _other_saves(manifest: Manifest | None, ranks: Ranks) -> list[str]:
    """Describe machines whose parts belong to a different save of this step; a collective.

    The manifests of all machines list the same files of ranks, of which ranks compare a digest.
    """
    mine = "" if manifest is None else _digest_of_rank_files(manifest)
    here, found = ranks.first_on_machine, []
    for theirs, machine in gather_objects((mine, here)):
        if mine and theirs and mine != theirs:
            found.append(
                f"the machines of ranks {here} and {machine} have parts of different saves"
            )
    return found


def _digest_of_rank_files(manifest: Manifest) -> str:
    records = {**manifest.files, **manifest.elsewhere}
    lines = [
        f"{name} {r.size} {r.checksum}"
        for name, r in sorted(records.items())
        if content.is_rank_file(name)
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


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
        try:
            found = folders.committed(place)
        except PermissionError:
            return f"{str(place)!r} may not be read"
        if found:
            return f"the newest checkpoint in {str(place)!r} is {str(found[-1].folder)!r}"
    return f"there is no checkpoint in {str(output_dir)!r}"
