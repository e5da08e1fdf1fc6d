"""Stamps of DeepSpeed's ops. Nothing is compiled here."""

import json
import os
import subprocess
import sys

import pytest

from dstrain.core.build_locks import torch_leaves_locks
from dstrain.core.errors import ConfigError
from dstrain.engine import ops
from tests.unit.core.test_build_locks import HOLD_LOCK, folder, make_lock, running

__all__ = ["folder"]  # a fixture


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
    assert ops.main(["shm_comm", "fusedadam"]) == 2
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
    for place in ("system", "venv"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "ninja").touch(mode=0o755)
    monkeypatch.setattr(ops.sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    assert ops.prepare_environment() == tmp_path / "ext"
    assert ops.shutil.which("ninja") == str(tmp_path / "venv" / "ninja")
    path = os.environ["PATH"]
    ops.prepare_environment()
    assert os.environ["PATH"] == path


LEAVES_LOCKS = pytest.mark.skipif(
    not torch_leaves_locks(), reason="torch's locks are the kernel's, and end with their process"
)


@LEAVES_LOCKS
def test_torch_still_guards_its_builds_with_a_lock_held_open():
    # All of clear_stale_locks stands on this.
    import inspect

    baton = pytest.importorskip("torch.utils.file_baton").FileBaton
    assert "self.fd = os.open(self.lock_file_path, os.O_CREAT | os.O_EXCL)" in inspect.getsource(
        baton.try_acquire
    )


TORCHS_BATON = """
import sys, time
from torch.utils import cpp_extension
from dstrain.core import build_locks
from dstrain.engine import torch_builds
build_locks.SETTLE_SECONDS, build_locks._filesystem = 0.05, lambda path: "ext4"
build_locks._LOOK_SECONDS = 0.2
torch_builds.guard_builds()
torch_builds.guard_builds()  # of each Trainer
baton = cpp_extension.FileBaton(sys.argv[1])
open(sys.argv[2], "w").close()  # all is imported, which takes long on a busy machine
print("builds" if baton.try_acquire() else "loads")
"""


@LEAVES_LOCKS
def test_torch_takes_over_the_build_of_one_that_was_killed_and_loads_that_of_another(folder):
    """Where it once waited for ever, or loaded what was not there."""
    import_is_slow = 120
    lock, ready = make_lock(folder), folder / "ready"
    command = [sys.executable, "-c", TORCHS_BATON, str(lock), str(ready)]
    wait = f"[time.sleep(0.1) for _ in iter(lambda: os.path.exists({str(ready)!r}), True)]"
    compiles = [sys.executable, "-c", f"import os, time; {wait}; time.sleep(2)"]
    with subprocess.Popen(compiles, cwd=lock.parent) as ninja:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=import_is_slow
        )
        assert ninja.poll() is not None
    assert done.stdout.strip() == "builds", done.stderr
    assert f"(process {ninja.pid}) goes on after its build was killed" in done.stderr
    lock.unlink()
    ready.unlink()
    release_soon = HOLD_LOCK.replace(
        "time.sleep(60)", f"{wait}; time.sleep(2); os.remove(sys.argv[1])"
    )
    with running(sys.executable, "-c", release_soon, str(lock)) as owner:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=import_is_slow
        )
    assert done.stdout.strip() == "loads", done.stderr
    assert f"(process {owner.pid}) builds it" in done.stderr


def test_asking_whether_an_op_is_built_needs_no_torch(folder):
    # launch/setup.sh asks at each start, in this way.
    check = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['is_built']('shm_comm');"
        "print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", check, ops.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
