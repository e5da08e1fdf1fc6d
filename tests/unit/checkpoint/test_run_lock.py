"""The lock of a run's folder: one run at a time, and no file left of it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from dstrain.checkpoint.run_lock import RUN_LOCK, RunLock
from dstrain.core.errors import CheckpointError


def test_the_lock_is_gone_when_the_run_has_ended(tmp_path: Path):
    with RunLock(tmp_path).held():
        assert [p.name for p in tmp_path.iterdir()] == [RUN_LOCK]
        with (
            pytest.raises(CheckpointError, match="another run is writing"),
            RunLock(tmp_path).held(),
        ):
            pass
        assert (tmp_path / RUN_LOCK).exists(), "the one that was refused leaves it"
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path).held():  # another one may begin
        pass


def test_what_a_killed_run_has_left_holds_nobody_off(tmp_path: Path):
    (tmp_path / RUN_LOCK).touch()
    with RunLock(tmp_path).held():
        pass
    assert list(tmp_path.iterdir()) == []


def _make(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "mine").touch()
    elif kind == "symbolic link":
        (path.parent / "notes").write_text("mine")
        path.symlink_to(path.parent / "notes")
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["folder", "symbolic link", "special file"])
def test_what_a_user_has_by_that_name_is_an_error_and_stays(tmp_path: Path, kind: str):
    """A link was once written through and removed, a folder a bare IsADirectoryError."""
    path = tmp_path / RUN_LOCK
    _make(kind, path)
    before = os.lstat(path)
    with pytest.raises(CheckpointError, match=f"is a {kind}") as caught, RunLock(tmp_path).held():
        pass
    assert str(path) in str(caught.value)
    assert "move it away" in str(caught.value)
    assert os.lstat(path) == before


def test_a_link_that_leads_nowhere_is_no_way_to_make_a_file(tmp_path: Path):
    (tmp_path / RUN_LOCK).symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a symbolic link"), RunLock(tmp_path).held():
        pass
    assert not (tmp_path / "nothing").exists()


def test_a_file_with_content_is_not_removed(tmp_path: Path):
    (tmp_path / RUN_LOCK).write_text("mine")
    with RunLock(tmp_path).held():
        pass
    assert (tmp_path / RUN_LOCK).read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_whatever_the_system_says_is_one_error_with_a_remedy(tmp_path: Path, monkeypatch, code):
    def refuse(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(CheckpointError, match=os.strerror(code)), RunLock(tmp_path).held():
            pass


def test_a_lock_of_another_run_stays_where_the_folder_was_moved(tmp_path: Path):
    place, moved = tmp_path / "out", tmp_path / "moved"
    place.mkdir()
    with RunLock(place).held():
        place.rename(moved)
        place.mkdir()
        (place / RUN_LOCK).touch()
    assert (place / RUN_LOCK).exists()


def _contend(folder: str, until: float, results: multiprocessing.Queue[tuple[int, int]]) -> None:
    """Take and let go of the lock again and again; how often, and how often not alone."""
    inside, taken, met = Path(folder) / "inside", 0, 0
    while time.monotonic() < until:
        try:
            with RunLock(Path(folder)).held():
                taken += 1
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    met += 1
                    continue
                time.sleep(0.0001)
                inside.unlink()
        except CheckpointError:
            time.sleep(0.00005)
    results.put((taken, met))


def test_runs_that_try_again_and_again_never_meet(tmp_path: Path):
    """A file that is removed can be locked by one that opened it before, beside its successor."""
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, int]] = context.Queue()
    until = time.monotonic() + 2
    processes = [
        context.Process(target=_contend, args=(str(tmp_path), until, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    counts = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sum(taken for taken, _ in counts) > 100
    assert sum(met for _, met in counts) == 0
