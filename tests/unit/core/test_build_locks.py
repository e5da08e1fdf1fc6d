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
    monkeypatch.setattr(build_locks, "torch_leaves_locks", lambda: True)  # not all do
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


def test_a_start_waits_for_no_compilers_that_outlived_their_build(folder, caplog):
    # One orphaned build once stopped every run on the machine, whatever op it needed.
    orphaned, stale = make_lock(folder), make_lock(folder, op="cpu_adam")
    with subprocess.Popen(["sleep", "60"], cwd=orphaned.parent) as ninja:
        started = time.monotonic()
        assert build_locks.clear_stale_locks(folder) == [stale]
        assert time.monotonic() - started < 10
        assert orphaned.exists()
        ninja.kill()
    assert f"sleep (process {ninja.pid}) still at work in {orphaned.parent}" in caplog.text


def test_a_run_that_needs_the_op_waits_for_them_and_says_so(folder, monkeypatch, capsys):
    # Python was killed but not its ninja: a second build would write the same object files.
    monkeypatch.setattr(build_locks, "_LOOK_SECONDS", 0.1)
    lock = make_lock(folder)
    with subprocess.Popen(["sleep", "0.6"], cwd=lock.parent) as ninja:
        assert not build_locks.wait_for_build(lock), "the op is still to build"
        assert ninja.poll() is not None
    assert not lock.exists()
    said = capsys.readouterr().err
    assert "Waiting for DeepSpeed's fused_adam: sleep" in said
    assert f"(process {ninja.pid}) goes on after its build was killed in {lock.parent}" in said


def test_a_wait_for_a_build_has_a_limit_and_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(build_locks, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(build_locks, "_LOOK_SECONDS", 0.1)
    lock = make_lock(folder)
    with subprocess.Popen(["sleep", "60"], cwd=lock.parent) as ninja:
        with pytest.raises(ConfigError, match="no op takes this long") as caught:
            build_locks.wait_for_build(lock)
        ninja.kill()
    assert f"sleep (process {ninja.pid})" in str(caught.value)
    assert "end that process" in str(caught.value)
    assert str(lock) in str(caught.value)


def test_a_build_that_is_under_way_is_waited_for_by_name(folder, capsys):
    lock = folder / "fused_adam" / "lock"
    lock.parent.mkdir()
    release_soon = HOLD_LOCK.replace("sleep(60)", "sleep(0.8); os.remove(sys.argv[1])")
    with running(sys.executable, "-c", release_soon, str(lock)) as owner:
        assert build_locks.wait_for_build(lock)
        assert f"(process {owner.pid}) builds it" in capsys.readouterr().err


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


def test_lock_that_cannot_be_removed_is_an_error_with_a_remedy(folder, monkeypatch, caplog):
    lock = make_lock(folder)

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(build_locks.Path, "unlink", refuse)
    with pytest.raises(ConfigError, match="TORCH_EXTENSIONS_DIR") as caught:
        build_locks.wait_for_build(lock)
    assert str(lock) in str(caught.value)
    assert build_locks.clear_stale_locks(folder) == []  # this run may not need the op
    assert str(caught.value) in caplog.text


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


def test_a_process_that_never_ends_its_turn_is_named(folder, capsys, caplog, monkeypatch):
    """Once the rest waited for it without a word, for ever."""
    lock = make_lock(folder)
    turn = folder / ".dstrain-clear.lock"
    hold = "import sys, time\nfrom pathlib import Path\n"
    hold += "from dstrain.core.build_locks import taking_turns\n"
    hold += "with taking_turns(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    monkeypatch.setattr(build_locks, "_REMIND_SECONDS", 0.2)
    monkeypatch.setattr(build_locks, "_most_seconds", lambda locks: 0.6)
    with running(sys.executable, "-c", hold, str(turn)) as holder:
        assert build_locks.clear_stale_locks(folder) == []
        assert f"Waiting for process {holder.pid}, which has {turn}" in capsys.readouterr().err
        assert f"process {holder.pid} has kept {turn}" in caplog.text
        with (
            pytest.raises(ConfigError, match=f"see what process {holder.pid} does"),
            build_locks.taking_turns(turn, limit_seconds=0.2),
        ):
            pass
    assert build_locks.clear_stale_locks(folder) == [lock]


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
