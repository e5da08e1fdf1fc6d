"""Build locks and stamps of DeepSpeed's ops. Nothing is compiled here."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest

from dstrain.core.errors import ConfigError
from dstrain.engine import ops

# Takes a lock as torch's FileBaton does, says so, and holds it until it is killed.
HOLD_LOCK = """
import os, sys, time
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty extensions folder on what passes for a local disk, where locks settle at once."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(ops, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(ops, "_filesystem", lambda path: "ext4")
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
    """A process that runs during the body and is killed, as with `kill -9`, after it."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def build_for_test(monkeypatch, load=lambda name: None):
    """Replace the compiler by one that only leaves a library; return the ops it was asked for."""
    asked = []

    def fake_load(name):
        load(name)
        asked.append(name)
        library = ops.extensions_dir() / ops.OPS[name].folder / f"{ops.OPS[name].folder}.so"
        library.parent.mkdir(exist_ok=True)
        library.touch()

    monkeypatch.setattr(ops, "_load", fake_load)
    return asked


# ---- stale locks -------------------------------------------------------------------------------


def test_lock_of_a_killed_build_is_removed_and_reported(folder, caplog):
    lock = make_lock(folder)
    assert ops.clear_stale_locks(folder) == [lock]
    assert not lock.exists()
    assert str(lock) in caplog.text


def test_young_lock_of_a_killed_build_is_removed_too(folder):
    # A job restarted at once after a crash must not wait for ever for being too quick.
    lock = make_lock(folder, age_seconds=0)
    assert ops.clear_stale_locks(folder) == [lock]


def test_lock_stays_while_its_owner_lives_and_goes_when_it_is_killed(folder):
    lock = folder / "fused_adam" / "lock"
    lock.parent.mkdir()
    with running(sys.executable, "-c", HOLD_LOCK, str(lock)):
        os.utime(lock, (0, 0))  # its age must not matter
        assert ops.clear_stale_locks(folder) == []
        assert lock.exists()
    assert ops.clear_stale_locks(folder) == [lock]


def test_compilers_that_outlived_their_build_are_waited_for(folder, caplog):
    # Python was killed but not its ninja: a second build would write the same object files.
    lock = make_lock(folder)
    with subprocess.Popen(["sleep", "0.4"], cwd=lock.parent) as ninja:
        assert ops.clear_stale_locks(folder) == [lock]
        assert ninja.poll() is not None
    assert f"sleep (process {ninja.pid})" in caplog.text


def test_a_shell_in_the_folder_is_no_compiler(folder):
    lock = make_lock(folder)
    script = "echo ready; read -r _"
    with running("bash", "-c", script, cwd=lock.parent, stdin=subprocess.PIPE) as shell:
        assert ops.clear_stale_locks(folder) == [lock]
        assert shell.poll() is None


def test_lock_of_a_build_that_is_just_ending_is_left_to_its_owner(folder, monkeypatch):
    # torch closes the lock, then removes it, and fails when it is gone by then.
    lock = make_lock(folder)
    monkeypatch.setattr(ops.time, "sleep", lambda seconds: lock.unlink())
    assert ops.clear_stale_locks(folder) == []


def test_lock_that_a_new_build_replaced_while_we_looked_stays(folder, monkeypatch):
    lock = make_lock(folder)

    def new_build_starts(seconds):
        lock.unlink()
        make_lock(folder, age_seconds=1)  # by a process that we do not see yet

    monkeypatch.setattr(ops.time, "sleep", new_build_starts)
    assert ops.clear_stale_locks(folder) == []
    assert lock.exists()


@pytest.mark.parametrize(("age_seconds", "removed"), [(60, False), (3600, True)])
def test_on_a_shared_disk_only_age_tells(folder, monkeypatch, age_seconds, removed):
    monkeypatch.setattr(ops, "_filesystem", lambda path: "nfs4")
    lock = make_lock(folder, age_seconds=age_seconds)
    assert ops.clear_stale_locks(folder) == ([lock] if removed else [])
    assert lock.exists() != removed


def test_another_users_lock_is_left_alone(folder, monkeypatch, caplog):
    lock = make_lock(folder)
    monkeypatch.setattr(ops.os, "geteuid", lambda: lock.stat().st_uid + 1)
    assert ops.clear_stale_locks(folder) == []
    assert "another user" in caplog.text


def test_lock_that_cannot_be_removed_is_an_error_with_a_remedy(folder, monkeypatch):
    lock = make_lock(folder)

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ops.Path, "unlink", refuse)
    with pytest.raises(ConfigError, match="TORCH_EXTENSIONS_DIR") as caught:
        ops.clear_stale_locks(folder)
    assert str(lock) in str(caught.value)


def test_nothing_is_written_where_there_is_nothing_to_clear(folder):
    (folder / "fused_adam").mkdir()
    assert ops.clear_stale_locks(folder) == []
    assert ops.clear_stale_locks(folder / "missing") == []
    assert [path.name for path in folder.iterdir()] == ["fused_adam"]


def test_those_who_clear_take_turns(folder):
    # Else one could remove the lock of the build that began after the other's removal.
    lock = make_lock(folder)
    other = threading.Thread(target=ops.clear_stale_locks, args=(folder,))
    with ops._taking_turns(folder / ".dstrain-clear.lock"):
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
        ops.clear_stale_locks(folder)


def test_ranks_that_build_and_clear_at_once_never_lose_a_lock(folder, monkeypatch):
    monkeypatch.setattr(ops, "SETTLE_SECONDS", 0.5)  # a busy machine may stop a rank for a while
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


# ---- stamps ------------------------------------------------------------------------------------


def test_built_once_then_skipped(folder, monkeypatch, capsys):
    asked = build_for_test(monkeypatch)
    assert not ops.is_built("shm_comm")
    ops.build_ops(["shm_comm", "fused_adam"])
    assert "Building DeepSpeed's fused_adam (about 60 s, once) ..." in capsys.readouterr().err
    assert ops.is_built("shm_comm")
    ops.build_ops(["shm_comm", "fused_adam"])
    assert asked == ["shm_comm", "fused_adam"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["python", "torch", "deepspeed", "processor"])
def test_built_for_something_else_is_built_anew_from_nothing(folder, monkeypatch, key):
    build_for_test(monkeypatch)
    ops.build_ops(["fused_adam"])
    leftover = folder / "fused_adam" / "fused_adam.o"
    leftover.touch()
    changed = {**ops._fingerprint(), key: "other"}
    monkeypatch.setattr(ops, "_fingerprint", lambda: changed)
    assert not ops.is_built("fused_adam")
    ops.build_ops(["fused_adam"])
    assert ops.is_built("fused_adam")
    assert not leftover.exists()


def test_a_build_by_a_run_is_kept_and_stamped(folder, monkeypatch):
    # DeepSpeed built it itself in an earlier run: ninja finds nothing to do, so keep its files.
    build_for_test(monkeypatch)
    (folder / "fused_adam").mkdir()
    kept = folder / "fused_adam" / "fused_adam.o"
    kept.touch()
    ops.build_ops(["fused_adam"])
    assert kept.exists()
    assert ops.is_built("fused_adam")


def test_not_built_without_its_library_or_with_a_torn_stamp(folder, monkeypatch):
    build_for_test(monkeypatch)
    ops.build_ops(["fused_adam"])
    library = folder / "fused_adam" / "fused_adam.so"
    os.rename(library, library.with_suffix(".kept"))
    assert not ops.is_built("fused_adam")
    os.rename(library.with_suffix(".kept"), library)
    assert ops.is_built("fused_adam")
    stamp = folder / "fused_adam" / "dstrain-built.json"
    stamp.write_text(json.dumps(ops._fingerprint())[:20])
    assert not ops.is_built("fused_adam")


def test_an_op_that_a_run_built_again_is_checked_but_kept(folder, monkeypatch, capsys):
    # By another ninja, say: with ours it may take a minute, which a user should see.
    asked = build_for_test(monkeypatch)
    ops.build_ops(["fused_adam"])
    os.utime(folder / "fused_adam" / "fused_adam.so", (1, 1))
    kept = folder / "fused_adam" / "fused_adam.o"
    kept.touch()
    assert not ops.is_built("fused_adam")
    ops.build_ops(["fused_adam"])
    assert "Checking DeepSpeed's fused_adam" in capsys.readouterr().err
    assert kept.exists()
    assert len(asked) == 2


def test_failed_build_leaves_no_stamp(folder, monkeypatch):
    def fail(name):
        raise ConfigError("does not compile")

    build_for_test(monkeypatch, load=fail)
    with pytest.raises(ConfigError, match="does not compile"):
        ops.build_ops(["fused_adam"])
    assert not ops.is_built("fused_adam")


def test_build_clears_a_stale_lock_first(folder, monkeypatch):
    # With the lock in place torch would wait for ever.
    lock = make_lock(folder)
    build_for_test(monkeypatch, load=lambda name: not lock.exists() or pytest.fail("would hang"))
    ops.build_ops(["fused_adam"])
    assert ops.is_built("fused_adam")


def test_build_waits_for_a_run_that_builds_the_same_op(folder, monkeypatch, capsys):
    lock = folder / "fused_adam" / "lock"
    lock.parent.mkdir()
    release_soon = HOLD_LOCK.replace("sleep(60)", "sleep(0.8); os.remove(sys.argv[1])")
    build_for_test(monkeypatch, load=lambda name: not lock.exists() or pytest.fail("two builds"))
    with running(sys.executable, "-c", release_soon, str(lock)):
        ops.build_ops(["fused_adam"])
    assert "Waiting for the run that builds DeepSpeed's fused_adam" in capsys.readouterr().err


def test_unknown_op_names_the_nearest(folder, monkeypatch, capsys):
    monkeypatch.setattr(ops.signal, "signal", lambda *arguments: None)
    assert ops.main(["shm_comm", "fusedadam"]) == 1
    assert "did you mean 'fused_adam'" in capsys.readouterr().err


# ---- where -------------------------------------------------------------------------------------


def test_extensions_dir_is_the_variable_then_the_venv(monkeypatch, tmp_path):
    monkeypatch.setattr(ops.sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "given"))
    assert ops.extensions_dir() == tmp_path / "given"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert ops.extensions_dir() == tmp_path / "venv" / "torch_extensions"


def test_extensions_dir_outside_a_venv_is_where_torch_would_build(monkeypatch, tmp_path):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setattr(ops.sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    expected = cpp_extension._get_build_directory("some_op", verbose=False)
    assert str(ops.extensions_dir() / "some_op") == expected


def test_ninja_of_an_unactivated_venv_comes_before_the_systems(monkeypatch, tmp_path):
    # Ninja 1.11 and 1.13 hash commands differently: taking turns, each rebuilds what the other did.
    for folder in ("system", "venv"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").touch(mode=0o755)
    monkeypatch.setattr(ops.sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    assert ops.prepare_environment() == tmp_path / "ext"
    assert ops.shutil.which("ninja") == str(tmp_path / "venv" / "ninja")
    path = os.environ["PATH"]
    ops.prepare_environment()
    assert os.environ["PATH"] == path


def test_filesystem_of_a_known_mount():
    assert ops._filesystem(ops.Path("/proc/self/stat")) == "proc"


def test_torch_still_guards_its_builds_with_a_lock_held_open():
    # All of clear_stale_locks stands on this.
    import inspect

    baton = pytest.importorskip("torch.utils.file_baton").FileBaton
    assert "self.fd = os.open(self.lock_file_path, os.O_CREAT | os.O_EXCL)" in inspect.getsource(
        baton.try_acquire
    )


def test_asking_whether_an_op_is_built_needs_no_torch(folder):
    # launch/setup.sh asks at each start, in this way.
    check = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['is_built']('shm_comm');"
        "print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", check, ops.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
