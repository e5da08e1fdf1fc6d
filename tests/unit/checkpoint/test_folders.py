"""The folders of checkpoints: rotation, locks, and saves that are killed at any moment."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from dstrain.checkpoint import folders
from dstrain.checkpoint.find import verify
from dstrain.checkpoint.manifest import (
    read_manifest,
)
from dstrain.checkpoint.run_lock import RUN_LOCK, RunLock
from dstrain.core.errors import CheckpointError
from tests.unit.checkpoint.small import make_checkpoint


def steps(output_dir: Path) -> list[int]:
    return [found.step for found in folders.committed(output_dir)]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    """The best counts towards the limit, as documented, and the newest always stays."""
    made = {step: make_checkpoint(tmp_path, step) for step in (2, 4, 10, 20)}
    assert folders.rotate(tmp_path, limit=None, keep=[]) == []
    folders.rotate(tmp_path, limit=3, keep=[made[2]])
    assert steps(tmp_path) == [2, 10, 20]
    folders.rotate(tmp_path, limit=1, keep=[made[2]])
    assert steps(tmp_path) == [2, 20]
    folders.rotate(tmp_path, limit=1, keep=[])
    assert steps(tmp_path) == [20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20"]


def test_rotation_leaves_what_is_being_read(tmp_path, caplog):
    """A resume or an upload that is under way."""
    first = make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    with folders.holding(first), caplog.at_level(logging.WARNING, logger="dstrain"):
        folders.rotate(tmp_path, limit=1, keep=[])
        assert steps(tmp_path) == [1, 2]
    assert "is being read" in caplog.text
    folders.rotate(tmp_path, limit=1, keep=[])
    assert steps(tmp_path) == [2]


def test_a_removal_that_fails_is_a_warning(tmp_path, caplog, monkeypatch):
    """A full or read-only disk must not end the run."""
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="dstrain"):
        patch.setattr(os, "rename", refuse)
        assert folders.rotate(tmp_path, limit=1, keep=[]) == []
    assert "could not be removed: read-only" in caplog.text
    assert steps(tmp_path) == [1, 2]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="dstrain"):
        patch.setattr(shutil, "rmtree", refuse)
        folders.rotate(tmp_path, limit=1, keep=[])
    assert "could not be removed whole: read-only" in caplog.text
    assert steps(tmp_path) == [2]  # what is left of it is no checkpoint any more
    folders.recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_what_killed_runs_left_is_cleared_up(tmp_path):
    """Unfinished saves go; a checkpoint that was to be replaced comes back."""
    folders.new_staging(tmp_path, 3)
    old = make_checkpoint(tmp_path, 4)
    os.rename(old, tmp_path / ".checkpoint-4.replaced-0123abcd")
    gone = make_checkpoint(tmp_path, 5)
    os.rename(gone, tmp_path / ".checkpoint-5.removing-0123abcd")
    new = make_checkpoint(tmp_path, 6)
    replaced = make_checkpoint(tmp_path / "other", 6)
    os.rename(replaced, tmp_path / ".checkpoint-6.replaced-0123abcd")
    (tmp_path / "other").rmdir()
    marked = folders.new_staging(tmp_path, 7)
    with folders.holding(marked):
        folders.recover(tmp_path)
        assert marked.exists(), "somebody is writing there"
    folders.recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert verify(new)[1] == []


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    """A run that fell back to an older checkpoint comes by the same step again."""
    make_checkpoint(tmp_path, 4, size=100)
    folder = make_checkpoint(tmp_path, 4, size=200)
    assert read_manifest(folder).parameters == {"w": (20, 10)}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    """Two runs would rotate each other's checkpoints away."""
    lock, second = RunLock(tmp_path), RunLock(tmp_path)
    with lock.held():
        with open(tmp_path / RUN_LOCK) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(CheckpointError, match="another run"), second.held():
            pass
        with lock.held():  # the command and its training
            pass
        with pytest.raises(CheckpointError, match="another run"), second.held():
            pass
    with second.held():
        assert (tmp_path / RUN_LOCK).exists()
    assert not (tmp_path / RUN_LOCK).exists()  # it goes when the run has ended


def test_a_lock_whose_file_is_removed_is_taken_again(tmp_path, caplog):
    """By hand, say: another run must not slip in."""
    lock, second = RunLock(tmp_path), RunLock(tmp_path)
    with lock.held():
        (tmp_path / RUN_LOCK).unlink()
        lock.keep()
        with pytest.raises(CheckpointError, match="another run"), second.held():
            pass
        assert not caplog.records  # the folder is the same
        (tmp_path / RUN_LOCK).unlink()
        with second.held(), pytest.raises(CheckpointError, match="another run"):
            lock.keep()


def _save_until_killed(output_dir: Path, report: int, kill_at: int) -> None:
    """Save, rotate and save over; die by SIGKILL at file operation number ``kill_at``."""
    seen = itertools.count(1)

    counted = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}

    def hook(event: str, _: object) -> None:
        if event in counted and next(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step, size in ((1, 10), (2, 20), (3, 30), (3, 40)):
        make_checkpoint(output_dir, step, size=size)
        os.write(report, f"{step}:{size} ".encode())
        folders.rotate(output_dir, limit=1, keep=[])


def test_a_kill_at_any_file_operation_loses_nothing_that_was_committed(tmp_path):
    """Every moment of saving, replacing and rotating, one after another."""
    for kill_at in itertools.count(1):
        output_dir = tmp_path / str(kill_at)
        output_dir.mkdir()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _save_until_killed(output_dir, writer, kill_at)
            finally:
                os._exit(0)
        os.close(writer)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(reader) as pipe:
            reported = [tuple(map(int, word.split(":"))) for word in pipe.read().split()]
        folders.recover(output_dir)
        found = folders.committed(output_dir)
        for checkpoint in found:
            assert verify(checkpoint.folder)[1] == [], kill_at
        if reported:
            step, size = reported[-1]
            manifest = read_manifest(found[-1].folder)
            # The save after the last one reported may have been committed too.
            assert (manifest.step, manifest.parameters["w"][0] * 10) >= (step, size), kill_at
        leftovers = {p.name for p in output_dir.iterdir()} - {f.folder.name for f in found}
        assert leftovers == set(), kill_at
        shutil.rmtree(output_dir)
        if os.WIFEXITED(status):
            break
    assert kill_at > 60
