"""Signals to the scripts of launch/ before the job: in an installation, in a build of ops."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.test_launch_environment import standing_in
from tests.hosts import make_repository, wait_for
from tests.launch import quiet_environment

SECONDS = 120.0
PIP = """
case "$*" in *pip*install*) ;; *) exit 0 ;; esac
touch "$(dirname "$0")/installs"
sh -c 'sleep 300; true' &
wait
"""


def start(
    command: Sequence[str | Path], log: Path, *, ignored: Sequence[signal.Signals] = (), **env: str
) -> subprocess.Popen[bytes]:
    """Start a command that leads a session and a process group, as on a terminal."""

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=quiet_environment() | env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=prepare,
        )


def session(leader: int) -> dict[int, str]:
    """Return the processes of a session that have not ended, with their names."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found[int(entry.name)] = name
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a session."""
    for pid in session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


BUILDS = {
    "TERM": (signal.SIGTERM, False, ()),
    "USR1": (signal.SIGUSR1, False, ()),
    "Ctrl-C": (signal.SIGINT, True, ()),
    # Of a script that was started with `&`; ninja does not ignore what its parents do.
    "Ctrl-C-ignored": (signal.SIGINT, True, (signal.SIGINT,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BUILDS)
def test_a_signal_in_the_first_build_ends_all_of_it(case, tmp_path):
    number, to_group, ignored = BUILDS[case]
    repository = make_repository(tmp_path / "repository")
    extensions = repository / ".venv" / "torch_extensions"
    shutil.rmtree(extensions, ignore_errors=True)
    script = repository / "launch" / "quickstart.sh"
    log = tmp_path / "log"
    process = start(["bash", script, "--output_dir", tmp_path / "out"], log, ignored=ignored)
    try:
        wait_for(lambda: "cc1plus" in session(process.pid).values(), SECONDS, log.read_text())
        assert (extensions / "deepspeed_shm_comm" / "lock").exists()
        os.kill(-process.pid if to_group else process.pid, number)
        assert process.wait(30) == 128 + number
        assert session(process.pid) == {}
    finally:
        end(process)
    said = log.read_text()
    assert "Interrupted: an op that is not ready is built by the next run" in said
    assert ignored or f"[dstrain] ended by {number.name}, before the job has begun" in said
    for wrong in ("does not build", "Traceback", "compiler"):
        assert wrong not in said
    assert not (extensions / "deepspeed_shm_comm" / "lock").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_signal_to_the_build_itself_ends_all_of_it(tmp_path):
    """As a scheduler sends it, or somebody who calls the module by hand."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "dstrain.engine.ops", "shm_comm"]
    process = start(command, log, TORCH_EXTENSIONS_DIR=str(tmp_path / "ops"))
    try:
        wait_for(lambda: "cc1plus" in session(process.pid).values(), SECONDS, log.read_text())
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert session(process.pid) == {}
    finally:
        end(process)
    assert "Interrupted" in log.read_text()
    assert not [*(tmp_path / "ops").glob("*/lock")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_an_installation_ends_all_of_it(number, tmp_path):
    repository = standing_in(tmp_path / "repository", PIP)
    log = tmp_path / "log"
    process = start(["bash", repository / "launch" / "setup.sh"], log)
    installs = repository / ".venv" / "bin" / "installs"
    try:
        wait_for(lambda: installs.exists() and "sleep" in session(process.pid).values(), SECONDS)
        os.kill(-process.pid if number == signal.SIGINT else process.pid, number)
        assert process.wait(30) == 128 + number
        assert session(process.pid) == {}
    finally:
        end(process)
    assert log.read_text().endswith(f"[dstrain] ended by {number.name}, before the job has begun\n")
    assert not (repository / ".venv" / ".dstrain-setup").exists()


def test_what_nohup_ignores_ends_no_installation(tmp_path):
    repository = standing_in(tmp_path / "repository", PIP.replace("sleep 300", "sleep 3"))
    log = tmp_path / "log"
    script = repository / "launch" / "setup.sh"
    process = start(["bash", script], log, ignored=[signal.SIGHUP])
    installs = repository / ".venv" / "bin" / "installs"
    try:
        wait_for(lambda: installs.exists() and "sleep" in session(process.pid).values(), SECONDS)
        os.kill(-process.pid, signal.SIGHUP)
        assert process.wait(60) == 0
    finally:
        end(process)
    assert "Installed" in log.read_text()
