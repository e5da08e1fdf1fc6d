"""The harness itself: what a failing, hanging, dying or leaking rank looks like from outside.

Failures are expected here, so the tests about them run pytest in a process of its own on a file
of their own, and read what it printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.launch import launch, quiet_environment

RUN_SECONDS = 400

# Each test that fails costs a group; one file and one run keeps it to half a minute. What is waited
# out for nobody is shortened, in the pytest process and in the ranks alike.
STORIES = """
import os, signal, threading, time
import pytest, torch, torch.distributed as dist
import tests.ranks

tests.ranks.GRACE_SECONDS, tests.ranks.MEET_SECONDS, tests.ranks.LEAVE_SECONDS = 1.5, 3.0, 0.5
pytestmark = pytest.mark.ranks(2, timeout=4)

def test_one_rank_fails(rank):
    print("rank", rank, "was here")
    if rank == 1:
        assert {"a": rank} == {"a": 7}
    dist.all_reduce(torch.ones(1))

def test_after_a_failure():
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2

def test_second_rank_fails_later(rank):
    time.sleep(0.0 if rank == 1 else 0.3)
    raise ValueError(f"from {rank}")

def a_place_to_hang():
    time.sleep(60)

def test_hang(rank):
    if rank == 0:
        a_place_to_hang()

def test_death(rank):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))

def test_leaks(rank):
    os.environ["LEFT_BEHIND"] = "yes"
    if rank == 0:
        threading.Thread(target=time.sleep, args=(30,), name="stray", daemon=True).start()

def test_disagreement(rank):
    if rank == 1:
        pytest.skip("not me")

def test_one_sided_collective(rank):
    if rank == 0:
        dist.all_reduce(torch.ones(3), async_op=True)

def test_skip():
    pytest.skip("not today")

@pytest.mark.xfail(reason="known", strict=True)
def test_xfail(rank):
    assert rank == 0

def test_careless():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(99)
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def test_put_right():
    assert torch.get_default_dtype() == torch.float32
    assert torch.initial_seed() == 0
    assert os.getcwd() != "/"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def run_pytest(folder: Path, source: str, *options: str) -> str:
    """Run pytest on ``source`` and return what it printed."""
    (folder / "test_it.py").write_text(textwrap.dedent(source))
    command = [sys.executable, "-m", "pytest", "-p", "tests.ranks", "-rA", "-v", *options]
    done = subprocess.run(
        command,
        cwd=folder,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    return done.stdout + done.stderr


def alive(pid: int) -> bool:
    """Return whether ``pid`` runs; a zombie does not."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Wait until ``condition`` is true or ``seconds`` have passed."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give what pytest prints for `STORIES`."""
    return run_pytest(tmp_path_factory.mktemp("stories"), STORIES)


def story(printed: str, name: str) -> str:
    """Return the part under the heading of test ``name``."""
    headed = re.split(rf"^_+ (?:ERROR at \w+ of )?{name} _+$", printed, maxsplit=1, flags=re.M)
    assert len(headed) == 2, f"no failure of {name} in:\n{printed}"
    return re.split(r"^(?:_{2,} .* _{2,}|={2,} .* ={2,})$", headed[1], maxsplit=1, flags=re.M)[0]


# ------------------------------------------------------------------ what works


@pytest.mark.ranks(2)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_ranks_reduce_together(rank: int, world_size: int, factor: float) -> None:
    total = torch.tensor([factor * (rank + 1)])
    dist.all_reduce(total)
    assert world_size == dist.get_world_size() == 2
    assert total.item() == factor * 3


@pytest.mark.ranks(2)
def test_ranks_share_a_folder(rank: int, tmp_path: Path) -> None:
    (tmp_path / f"{rank}").touch()
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    "expected", [pytest.param(n, marks=pytest.mark.ranks(n, timeout=30)) for n in (1, 2)]
)
def test_world_size_as_a_parameter(expected: int, world_size: int) -> None:
    assert world_size == expected


@pytest.mark.ranks(1)
def test_ordinary_fixtures_work_in_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SET_FOR_THIS_TEST", "1")
    print("hello")
    assert capsys.readouterr().out == "hello\n"
    with pytest.raises(ZeroDivisionError):
        _ = 1 / 0


# ------------------------------------------------------------------ what fails, and how it reads


@pytest.mark.slow
def test_failure_of_one_rank_is_shown_with_its_peer(printed: str) -> None:
    text = story(printed, "test_one_rank_fails")
    assert "Differing items:" in text  # pytest's own rewriting
    assert "rank 1 of 2 failed first, in call" in text
    assert "rank 0 stood in call" in text
    assert "in all_reduce" in text
    assert "rank 0 was here" in text


@pytest.mark.slow
def test_group_recovers(printed: str) -> None:
    assert re.search(r"test_after_a_failure PASSED", printed)


@pytest.mark.slow
def test_first_failure_in_time_comes_first(printed: str) -> None:
    text = story(printed, "test_second_rank_fails_later")
    assert text.index("from 1") < text.index("rank 0 failed") < text.index("from 0")


@pytest.mark.slow
def test_hang_is_cut_at_its_deadline(printed: str) -> None:
    text = story(printed, "test_hang")
    assert "deadline of 4 s: rank 0 of 2 not finished" in text
    assert "in a_place_to_hang" in text


@pytest.mark.slow
def test_death_is_named(printed: str) -> None:
    assert "the process of rank 0 died: SIGKILL" in story(printed, "test_death")


@pytest.mark.slow
def test_leaks_are_failures(printed: str) -> None:
    text = story(printed, "test_leaks")
    assert "environment: LEFT_BEHIND was None, is 'yes'" in text
    assert "thread: stray is still alive" in text


@pytest.mark.slow
def test_ranks_must_agree(printed: str) -> None:
    text = story(printed, "test_disagreement")
    assert "the ranks disagree: rank 0 passed, rank 1 skipped" in text


@pytest.mark.slow
def test_one_sided_collective_is_a_failure(printed: str) -> None:
    assert "did not meet after the test" in story(printed, "test_one_sided_collective")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("test_skip", "SKIPPED (not today)"),
        ("test_xfail", "XFAIL (known)"),
        ("test_careless", "PASSED"),
        ("test_put_right", "PASSED"),
    ],
)
def test_outcomes(printed: str, name: str, outcome: str) -> None:
    assert re.search(rf"::{name} {re.escape(outcome)}", printed)


@pytest.mark.slow
def test_count_of_outcomes(printed: str) -> None:
    assert "5 failed, 5 passed, 1 skipped, 1 xfailed, 2 errors" in printed


# ------------------------------------------------------------------ pytest's own habits


@pytest.mark.slow
def test_stop_at_first_and_rerun_last_failed(tmp_path: Path) -> None:
    source = """
    import pytest
    @pytest.mark.ranks(1)
    def test_a(): pass
    @pytest.mark.ranks(1)
    def test_b(): assert False
    @pytest.mark.ranks(1)
    def test_c(): pass
    def test_d(): pass
    """
    assert "1 failed, 2 passed" in run_pytest(tmp_path, source, "-x")
    assert re.search(r"1 failed in", run_pytest(tmp_path, source, "--lf"))
    assert re.search(r"1 passed, 3 deselected", run_pytest(tmp_path, source, "-k", "test_c"))


@pytest.mark.slow
def test_ranks_that_cannot_start_say_why(tmp_path: Path) -> None:
    source = """
    import os, pytest
    if "RANK" in os.environ:
        raise SystemExit(5)
    @pytest.mark.ranks(1)
    def test_a(): pass
    """
    printed = run_pytest(tmp_path, source)
    assert "1 ranks did not start" in story(printed, "test_a")
    assert "the process of rank 0 died: exit code" in printed


@pytest.mark.slow
def test_no_rank_outlives_pytest(tmp_path: Path) -> None:
    source = """
    import os, pathlib, time, pytest
    @pytest.mark.ranks(2)
    def test_long(rank):
        pathlib.Path(__file__).with_name(f"pid{rank}").write_text(str(os.getpid()))
        time.sleep(100)
    """
    (tmp_path / "test_it.py").write_text(textwrap.dedent(source))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.ranks"],
        cwd=tmp_path,
        env=quiet_environment(),
        stdout=subprocess.DEVNULL,
    )
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    try:
        assert wait_for(lambda: all(f.exists() and f.read_text() for f in files), seconds=120)
    finally:
        process.kill()
        process.wait()
    pids = [int(file.read_text()) for file in files]
    assert wait_for(lambda: not any(alive(pid) for pid in pids), seconds=5)


# ------------------------------------------------------------------ the launcher


@pytest.mark.slow
def test_launch_runs_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch, deepspeed\n"
        "deepspeed.init_distributed('gloo')\n"
        "total = torch.ones(1)\n"
        "torch.distributed.all_reduce(total)\n"
        # One write each: the pieces of a `print` mix with those of the other rank.
        "sys.stdout.write(f'total {int(total)} at {os.environ[\"MASTER_PORT\"]}\\n')\n"
        "sys.stderr.write(f'word {os.environ[\"WORD\"]}\\n')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    done = launch([script], timeout=120, env={"WORD": "given"})
    assert done.returncode == 0, done.stderr
    ports = re.findall(r"total 2 at (\d+)", done.stdout)
    assert len(ports) == 2
    assert done.stderr.count("word given") == 2
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{ports[0]}_*"))


@pytest.mark.slow
def test_launch_kills_everything_at_its_deadline(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, time\nos.write(1, b'pid %d\\n' % os.getpid())\ntime.sleep(100)\n")
    for seconds in (8, 16, 32):  # until the launcher has come as far as the ranks
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            launch([script], timeout=seconds)
        pids = [int(pid) for pid in re.findall(r"pid (\d+)", "\n".join(caught.value.__notes__))]
        if len(pids) == 2:
            break
    assert len(pids) == 2
    assert wait_for(lambda: not any(alive(pid) for pid in pids), seconds=5)


def test_quiet_environment_drops_rank_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert not {"RANK", "MASTER_PORT"} & set(quiet_environment())
    assert os.environ["RANK"] == "3"
