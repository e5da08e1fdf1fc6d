"""Which processes above a rank are watched, and what it does when one of them is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain.core.launcher import Process
from tests.launch import quiet_environment

PYTHON = "/usr/bin/python3.11"

RANK = """
import pathlib, signal, sys, time
from dstrain.core import launcher

def end(*_):
    pathlib.Path("ended").touch()
    sys.exit()

signal.signal(signal.SIGTERM, end)
launcher.watch_launchers()
pathlib.Path("watches").write_text(str(launcher.is_launched()))
time.sleep(60)
"""

STARTS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([*sys.argv[1:], sys.executable, "rank.py"])
pathlib.Path("pid").write_text(str(child.pid))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        ((PYTHON, "/venv/bin/deepspeed", "--num_gpus", "2", "x.py"), True),
        ((PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="), True),
        ((PYTHON, "/venv/bin/torchrun", "x.py"), True),
        (("torchrun", "x.py"), True),
        ((PYTHON, "-m", "torch.distributed.run", "x.py"), True),
        (("/bin/bash", "-c", "deepspeed x.py"), False),
        (("tmux", "new", "-s", "ds"), False),
        (("vim", "deepspeed"), False),
        ((PYTHON, "train.py", "deepspeed"), False),
        (("",), False),
    ],
)
def test_what_is_a_launcher(words, launches):
    assert Process(7, 1, "0", words).launches() is launches


def starts(folder: Path, name: str, *between: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a rank below a process of this name, and wait until it has looked above itself."""
    (folder / "rank.py").write_text(RANK)
    (folder / name).write_text(STARTS)
    process = subprocess.Popen(
        [sys.executable, name, *between], cwd=folder, env=quiet_environment(),
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (folder / "watches").exists() or not (folder / "watches").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    return process, int((folder / "pid").read_text())


@pytest.mark.parametrize("between", [(), ("nice",), ("bash", "-c", '"$0" "$@"; true')])
def test_a_rank_is_sent_sigterm_when_its_launcher_is_gone(tmp_path, between):
    """Also where a wrapper stands between the two."""
    process, _ = starts(tmp_path, "torchrun", *between)
    try:
        assert (tmp_path / "watches").read_text() == "True"
        process.kill()
        process.wait()
        until = time.monotonic() + 30
        while not (tmp_path / "ended").exists():
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        _kill_session(process.pid)


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("notebook", ()),
        ("notebook", ("bash", "-c", '"$0" "$@"; true')),
        ("torchrun", ("bash", "-c", 'setsid "$0" "$@"; true')),
    ],
)
def test_other_parents_may_end(tmp_path, name, between):
    """A script of a user's own that leaves its child running; one detached from a rank."""
    process, pid = starts(tmp_path, name, *between)
    try:
        assert (tmp_path / "watches").read_text() == "False"
        process.kill()
        process.wait()
        time.sleep(2.5)
        assert not (tmp_path / "ended").exists()
        os.kill(pid, 0)
    finally:
        _kill_session(process.pid)
        for found in Path("/proc").glob("[0-9]*/cwd"):  # the one in a session of its own
            try:
                if found.readlink() == tmp_path:
                    os.kill(int(found.parent.name), signal.SIGKILL)
            except OSError:
                continue


def _kill_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
