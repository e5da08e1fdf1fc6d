"""The part of a machine in a run over ssh, at the moments in which a signal finds no script."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.launch import ROOT

# The script says that it runs, and ends well where it is asked to.
SCRIPT = "trap 'exit 0' TERM; touch running; while :; do sleep 0.1; done"
PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {ssh!r})
import on_host
on_host.ROOT = Path(sys.argv[1])
def signal_me():
    os.kill(os.getpid(), signal.SIGTERM)
class Part(on_host.Part):
    def _start(self, master_addr):
        if sys.argv[2] == "before":
            signal_me()
        script = super()._start(master_addr)
        if sys.argv[2] == "within":
            signal_me()
        return script
job = dict(folder=sys.argv[1], hostfile="", words=[], environment=[], number=0, master_port="1",
           task="x", slots=1, stop_seconds=20, link_seconds=600)
connection = on_host.Connection()
connection.silence_seconds = 600.0
part = Part(connection, job, "127.0.0.1")
if sys.argv[2] == "after":
    part._stop()
status = part.run()
if sys.argv[2] == "after":
    signal_me()
print("status", status, file=sys.stderr)
"""


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_signal_that_finds_no_script_is_neither_lost_nor_an_error(when: str, tmp_path: Path):
    (tmp_path / "launch").mkdir()
    script = SCRIPT.replace("touch running", f"touch {tmp_path}/running")
    (tmp_path / "launch" / "multi_node.sh").write_text(script)
    program = textwrap.dedent(PROGRAM).format(ssh=str(ROOT / "launch" / "ssh"))
    kept_open, write = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-E", "-c", program, str(tmp_path), when],
            stdin=kept_open,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        os.close(kept_open)
        os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "status " in done.stderr
