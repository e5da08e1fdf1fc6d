"""Build locks that killed builds left. Nothing is compiled here."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from dstrain.core import build_locks
from dstrain.core.errors import ConfigError

# Takes a lock as torch's FileBaton does, says so, and holds it until it is killed.
HOLD_LOCK = """
import os, sys, time
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Give an empty extensions folder that counts as on a local disk; locks settle at once."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_locks, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(build_locks, "_filesystem", lambda path: "ext4")
    return tmp_path


def make_lock(folder, op="fused_adam", age_seconds=60.0):
    lock = folder / op / "lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    made = time.time() - age_seconds
    os.utime(lock, (made, made))
    return lock


@contextlib.contextmanager
def running(*command, **options):
    """Give a process that runs during the body and is killed, as with `kill -9`, after it."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_lock_of_a_killed_build_is_removed_and_reported(folder, caplog):
    lock = make_lock(folder)
    assert build_locks.clear_stale_locks(folder) == [lock]
    assert not lock.exists()
    assert str(lock) in caplog.text


def test_young_lock_of_a_killed_build_is_removed_too(folder):
    # A job restarted at once after a crash must not wait for ever for being too quick.
    lock = make_lock(folder, age_seconds=0)
    assert build_locks.clear_stale_locks(folder) == [lock]


def test_lock_stays_while_its_owner_lives_and_goes_when_it_is_killed(folder):
    lock = folder / "fused_adam" / "lock"
    lock.parent.mkdir()
    with running(sys.executable, "-c", HOLD_LOCK, str(lock)):
        os.utime(lock, (0, 0))  # its age must not matter
        assert build_locks.clear_stale_locks(folder) == []
        assert lock.exists()
    assert build_locks.clear_stale_locks(folder) == [lock]


def test_compilers_that_outlived_their_build_are_waited_for(folder, caplog):
    # Python was killed but not its ninja: a second build would write the same object files.
    lock = make_lock(folder)
    with subprocess.Popen(["sleep", "0.4"], cwd=lock.parent) as ninja:
        assert build_locks.clear_stale_locks(folder) == [lock]
        assert ninja.poll() is not None
    assert f"sleep (process {ninja.pid})" in caplog.text


def test_a_shell_in_the_folder_is_no_compiler(folder):
    lock = make_lock(folder)
    script = "echo ready; read -r _"
    with running("bash", "-c", script, cwd=lock.parent, stdin=subprocess.PIPE) as shell:
        assert build_locks.clear_stale_locks(folder) == [lock]
        assert shell.poll() is None


def test_lock_of_a_build_that_is_just_ending_is_left_to_its_owner(folder, monkeypatch):
    # torch closes the lock, then removes it, and fails when it is gone by then.
    lock = make_lock(folder)
    monkeypatch.setattr(build_locks.time, "sleep", lambda seconds: lock.unlink())
    assert build_locks.clear_stale_locks(folder) == []


def test_lock_that_a_new_build_replaced_while_we_looked_stays(folder, monkeypatch):
    lock = make_lock(folder)

    def new_build_starts(seconds):
        lock.unlink()
        make_lock(folder, age_seconds=1)  # by a process that we do not see yet

    monkeypatch.setattr(build_locks.time, "sleep", new_build_starts)
    assert build_locks.clear_stale_locks(folder) == []
    assert lock.exists()


@pytest.mark.parametrize(("age_seconds", "removed"), [(60, False), (3600, True)])
def test_on_a_shared_disk_only_age_tells(folder, monkeypatch, age_seconds, removed):
    monkeypatch.setattr(build_locks, "_filesystem", lambda path: "nfs4")
    lock = make_lock(folder, age_seconds=age_seconds)
    assert build_locks.clear_stale_locks(folder) == ([lock] if removed else [])
    assert lock.exists() != removed


def test_another_users_lock_is_left_alone(folder, monkeypatch, caplog):
    lock = make_lock(folder)
    monkeypatch.setattr(build_locks.os, "geteuid", lambda: lock.stat().st_uid + 1)
    assert build_locks.clear_stale_locks(folder) == []
    assert "another user" in caplog.text


def test_lock_that_cannot_be_removed_is_an_error_with_a_remedy(folder, monkeypatch):
    lock = make_lock(folder)

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(build_locks.Path, "unlink", refuse)
    with pytest.raises(ConfigError, match="TORCH_EXTENSIONS_DIR") as caught:
        build_locks.clear_stale_locks(folder)
    assert str(lock) in str(caught.value)


def test_nothing_is_written_where_there_is_nothing_to_clear(folder):
    (folder / "fused_adam").mkdir()
    assert build_locks.clear_stale_locks(folder) == []
    assert build_locks.clear_stale_locks(folder / "missing") == []
    assert [path.name for path in folder.iterdir()] == ["fused_adam"]


def test_those_who_clear_take_turns(folder):
    # Else one could remove the lock of the build that began after the other's removal.
    lock = make_lock(folder)
    other = threading.Thread(target=build_locks.clear_stale_locks, args=(folder,))
    with build_locks.taking_turns(folder / ".dstrain-clear.lock"):
        other.start()
        other.join(timeout=0.3)
        assert lock.exists()
    other.join(timeout=20)
    assert not lock.exists()


def _build_in_a_loop(lock, until, lost):
    """Take and release the lock like torch; report every lock that was taken away from us."""
    while time.monotonic() < until:
        try:
            held = os.open(lock, os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            time.sleep(0.001)
            continue
        time.sleep(0.7)  # longer than the time between two looks
        try:
            mine = os.stat(lock).st_ino == os.fstat(held).st_ino
        except FileNotFoundError:
            mine = False
        if not mine:
            lost.put(os.getpid())
            return
        os.close(held)
        os.remove(lock)


def _clear_in_a_loop(folder, until):
    while time.monotonic() < until:
        build_locks.clear_stale_locks(folder)


def test_ranks_that_build_and_clear_at_once_never_lose_a_lock(folder, monkeypatch):
    monkeypatch.setattr(
        build_locks, "SETTLE_SECONDS", 0.5
    )  # a busy machine may stop a rank for a while
    lock = folder / "fused_adam" / "lock"
    lock.parent.mkdir()
    context = multiprocessing.get_context("fork")
    lost = context.Queue()
    until = time.monotonic() + 3
    ranks = [context.Process(target=_build_in_a_loop, args=(lock, until, lost)) for _ in range(2)]
    ranks += [context.Process(target=_clear_in_a_loop, args=(folder, until)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=20)
        assert rank.exitcode == 0
    assert lost.empty()


def test_filesystem_of_a_known_mount():
    assert build_locks._filesystem(build_locks.Path("/proc/self/stat")) == "proc"
