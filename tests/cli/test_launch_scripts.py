"""What the scripts of launch/ do around a job, whatever the job is: here it is one of the shell."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from tests.launch import ROOT

JOB = """
set -euo pipefail
source "{root}/launch/setup.sh"
dstrain_run_job bash -c '{job}'
"""
RANK = 'echo $$ >"$DSTRAIN_JOB/rank-0"; '


def start(job: str, **pipes: object) -> subprocess.Popen[str]:
    """Start a script that runs this job."""
    return subprocess.Popen(
        ["bash", "-c", JOB.format(root=ROOT, job=job)],
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        **pipes,
    )


@pytest.mark.parametrize(
    ("job", "status"),
    [
        (RANK + 'echo 0 >"$DSTRAIN_JOB/status-0"', 0),
        (RANK + 'echo 75 >"$DSTRAIN_JOB/status-0"; exit 75', 75),
        # DeepSpeed's front where its launch.py was killed, and where the ranks had saved by then.
        ("true", 1),
        (RANK + 'echo 75 >"$DSTRAIN_JOB/status-0"', 75),
        (RANK + 'echo 75 >"$DSTRAIN_JOB/status-0"; exit 1', 75),
        (RANK + 'echo 76 >"$DSTRAIN_JOB/status-0"', 76),
        ("exit 2", 2),
        ("kill -KILL $$", 137),
    ],
)
def test_the_status_is_that_of_the_ranks(job, status):
    assert start(job).wait(60) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_passed_on_to_ranks_as_sigterm(number):
    """To them alone, and for as long as they need."""
    job = (
        RANK + 'trap "sleep 1; echo 75 >$DSTRAIN_JOB/status-0; exit 75" TERM; '
        "echo begun; while :; do sleep 0.1; done"
    )
    with start(job, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)  # until the traps are set
        process.send_signal(number)
        assert process.wait(60) == 75


def test_a_reader_that_leaves_ends_neither_script_nor_job(tmp_path):
    done = tmp_path / "done"
    job = f"{RANK} for i in $(seq 20000); do echo line $i of many; done; echo x >&2; touch {done}"
    job += '; echo 0 >"$DSTRAIN_JOB/status-0"'
    with start(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline() == "line 1 of many\n"
        process.stdout.close()
        assert process.wait(60) == 0
    assert done.exists()


def test_all_output_arrives():
    job = f"{RANK} seq 20000; seq 3 >&2; " + 'echo 0 >"$DSTRAIN_JOB/status-0"'
    process = start(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert out == "".join(f"{number}\n" for number in range(1, 20001))
    assert err == "1\n2\n3\n"
