"""`launch/multi_node.sh` over ssh: what arrives on the machines, and how a run ends there."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli.corpus import flags, write_corpus
from tests.hosts import (
    Hosts,
    MultiNode,
    cut,
    make_repository,
    namespace_hosts,
    stand_in_hosts,
    wait_for,
)

SECONDS = 120.0  # for a start of DeepSpeed's launcher on a machine that does other things too
NASTY = [
    "$(touch executed)",
    "`touch executed`",
    "$HOME ${PATH} $$ $'x' $\"y\"",
    "a & b && c | d || e; f > executed < /dev/null",
    '{"zero_optimization": {"stage": 2}, "a": [1, "two"]}',
    "it's",
    '"both\' kinds"',
    "  blanks  and\ttabs  ",
    "two\nlines\n",
    "\\ \\\\ \\n \\",
    "* ? [a-z] {a,b} ~ ~root !! !x #no ^a % %n %h =ls",
    "ünïcödé 漢字 🙂",
    os.fsdecode(b"no utf-8: \xff\xfe"),
    "",
    "-",
    "--",
    "--leading=dash",
    "-h",
    "(x) <(y)",
    "\x01\x7f\r\x1b[0m",
]

# Each rank writes down what it was given.
TELLS = """
import json, os, pathlib, sys
from dstrain.core.launcher import note_end
path = pathlib.Path(os.environ["HF_HOME_FOLDER"]) / ("rank-" + os.environ["RANK"])
path.write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
sys.stdout.write("from rank " + os.environ["RANK"] + "\\n")
note_end(0)
"""

# Each rank runs until it is asked to end, and says so in files.
RUNS = """
import os, pathlib, signal, sys, time
from dstrain.core.launcher import note_begin, note_end
note_begin()
folder, rank = pathlib.Path(sys.argv[3]), os.environ["RANK"]
def saves(number, _):
    time.sleep(1)
    (folder / ("saved-" + rank)).write_text(str(time.time()))
    note_end(75)
    os._exit(75)
signal.signal(signal.SIGTERM, saves)
(folder / ("begun-" + rank)).write_text(str(os.getpid()))
print("begun", flush=True)
while not (folder / ("fails-" + rank)).exists():
    (folder / ("alive-" + rank)).write_text(str(time.time()))
    print("." * 1000, flush=True)
    time.sleep(0.1)
note_end(3)
sys.exit(3)
"""

# As above, but nothing makes it end.
IGNORES = RUNS.replace("signal.SIGTERM, saves", "signal.SIGTERM, signal.SIG_IGN")


def begun(folder: Path, number: int = 2) -> bool:
    return len([p for p in folder.glob("begun-*") if p.read_text()]) == number


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("begun-*")]


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_ended(folder: Path) -> bool:
    return not any(map(is_alive, pids(folder)))


@pytest.fixture
def hosts(tmp_path):
    with stand_in_hosts(tmp_path / "hosts", "alpha", "beta") as hosts:
        yield hosts


def running(hosts: Hosts, repository: Path, folder: Path, **env: str) -> MultiNode:
    """Start a run whose ranks write into ``folder``, and wait until they do."""
    folder.mkdir()
    run = hosts.start(repository, [str(folder)], env=env)
    try:
        wait_for(lambda: begun(folder) or run.process.poll() is not None, SECONDS)
    finally:
        assert begun(folder), run.stdout + run.stderr
    return run


def stand_in_of(hosts: Hosts, name: str) -> int:
    """Return the process that stands in for ssh to a machine."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{hosts.folder}/ssh.py".encode() in words and name.encode() in words:
            return int(entry.name)
    raise AssertionError(f"no ssh to {name}")


# ------------------------------------------------------------------ what arrives


def everything_arrives(hosts: Hosts, folder: Path) -> MultiNode:
    repository = make_repository(folder / 're po\'s "x" $(touch executed) ü;&', TELLS)
    told = folder / "told"
    told.mkdir()
    own = folder / "environment"
    secret = "s3cr3t'\"$(touch executed)` ; & \\"
    own.write_text(
        f"# mine\n\nOWN_KEY = {secret} \r\n".replace("KEY = ", "KEY= ") + "WANDB_MODE=x y\n"
    )
    env = {
        "HF_HOME": "\n".join(NASTY),
        "NCCL_OF_MINE": "a b'c",
        "PYTHON_OF_MINE": secret,
        "DS_ENV_FILE": str(own),
    }
    own.write_text(own.read_text() + f"HF_HOME_FOLDER={told}\n")
    run = hosts.start(
        repository, NASTY, slots=2, hostfile='my hosts\' "$(touch executed)"', env=env
    )
    assert run.wait(2 * SECONDS) == 0, run.stdout + run.stderr
    for rank in range(4):
        words, environment = json.loads((told / f"rank-{rank}").read_text())
        assert words == ["train", "causal-lm", *NASTY]
        assert environment["HF_HOME"] == env["HF_HOME"]
        assert environment["NCCL_OF_MINE"] == env["NCCL_OF_MINE"]
        assert environment["PYTHON_OF_MINE"] == environment["OWN_KEY"] == secret
        assert environment["WANDB_MODE"] == "x y"
        assert environment["WORLD_SIZE"] == "4"
        assert environment["DS_ACCELERATOR"] == "cpu"
        assert f"{hosts.names[rank // 2]}: from rank {rank}\n" in run.stdout
    assert not [*folder.rglob("executed"), *Path.cwd().glob("executed")]
    return run


def test_flags_and_variables_arrive_as_they_were_typed(hosts, tmp_path):
    everything_arrives(hosts, tmp_path)
    commands = (hosts.folder / "commands").read_text()
    assert commands.count("'bash -s']") == 2
    for word in ("s3cr3t", "touch", "re po"):
        assert word not in commands


def test_two_machines_of_their_own_get_what_was_typed(tmp_path):
    with namespace_hosts(tmp_path / "hosts") as hosts:
        everything_arrives(hosts, tmp_path)


# ------------------------------------------------------------------ before anything starts


def test_no_machine_starts_before_all_are_ready(tmp_path):
    repository = make_repository(tmp_path / "repository", TELLS)
    with stand_in_hosts(tmp_path / "hosts", "alpha", "unreachable-1", "unreachable-2") as hosts:
        run = hosts.start(repository, ["--flag"])
        assert run.wait(SECONDS) == 1
    assert "unreachable-1: ssh: Could not resolve hostname" in run.stderr
    for name in ("unreachable-1", "unreachable-2"):
        assert f"[dstrain] {name}: no ssh without a password" in run.stderr
    assert "not all 3 machines are ready" in run.stderr
    assert "alpha" not in run.stderr + run.stdout


def test_a_machine_that_takes_the_connection_and_hangs_is_named(tmp_path):
    repository = make_repository(tmp_path / "repository", TELLS)
    with stand_in_hosts(tmp_path / "hosts", "alpha", "silent") as hosts:
        # A machine that is slow to start is none that hangs.
        run = hosts.start(repository, ["--flag"], env={"LINK_SECONDS": "3", "START_SECONDS": "20"})
        assert run.wait(SECONDS) == 1
    assert "[dstrain] silent: no answer for 2" in run.stderr
    assert "not all 2 machines are ready" in run.stderr
    assert "alpha" not in run.stderr + run.stdout


def test_a_machine_without_the_repository_is_named(hosts, tmp_path):
    repository = make_repository(tmp_path / "repository", TELLS)
    (repository / "launch" / "ssh" / "on_host.py").rename(tmp_path / "gone")
    options = {"PDSH_SSH_ARGS_APPEND": '-i "a key" -o ServerAliveInterval=1', "SSH_PORT": "2222"}
    run = hosts.start(repository, env=options)
    assert run.wait(SECONDS) == 1
    # ssh takes the first of two.
    first = "['-p', '2222', '-i', 'a key', '-o', 'ServerAliveInterval=1', '-o', 'BatchMode=yes', "
    assert (hosts.folder / "commands").read_text().count(first) == 2
    for name in hosts.names:
        assert f"{name}: no repository with a .venv at {repository};" in run.stderr


def test_options_of_ssh_that_cannot_be_read_are_an_error(hosts, tmp_path):
    repository = make_repository(tmp_path / "repository", TELLS)
    run = hosts.start(repository, env={"SSH_OPTIONS": "-i 'key"})
    assert run.wait(SECONDS) == 2
    assert "error: SSH_OPTIONS=-i 'key: No closing quotation" in run.stderr
    assert "Traceback" not in run.stderr


# ------------------------------------------------------------------ the end


def test_a_run_that_is_stopped_or_fails_leaves_others_alone(hosts, tmp_path):
    """Of three runs at once, one is stopped by a signal, one by a rank that fails."""
    repository = make_repository(tmp_path / "repository", RUNS)
    folders = [tmp_path / name for name in ("stopped", "failing", "untouched")]
    stopped, failing, untouched = (running(hosts, repository, folder) for folder in folders)

    stopped.signal(signal.SIGTERM)
    assert stopped.wait(SECONDS) == 75
    assert len([*folders[0].glob("saved-*")]) == 2
    assert all_ended(folders[0])
    assert "failed" not in stopped.stderr

    (folders[1] / "fails-1").touch()
    started = time.monotonic()
    assert failing.wait(SECONDS) == 3  # though the other rank was asked to end, and saved
    assert time.monotonic() - started < 60
    assert (folders[1] / "saved-0").exists()
    assert all_ended(folders[1])
    assert "[dstrain] error: beta failed first (rank 1: status 3)" in failing.stderr

    assert untouched.process.poll() is None
    for path in folders[2].glob("alive-*"):
        before = path.read_text()
        wait_for(lambda path=path, before=before: path.read_text() > before, 20)
    assert not [*folders[2].glob("saved-*")]
    untouched.signal(signal.SIGINT)
    assert untouched.wait(SECONDS) == 75
    assert all_ended(folders[2])


def test_ranks_save_and_end_when_the_front_is_killed(hosts, tmp_path):
    repository = make_repository(tmp_path / "repository", RUNS)
    folder = tmp_path / "run"
    run = running(hosts, repository, folder)
    run.signal(signal.SIGKILL)
    run.wait(SECONDS)
    wait_for(lambda: all_ended(folder), 30)
    assert len([*folder.glob("saved-*")]) == 2


def test_a_silent_connection_ends_the_run_and_ranks_that_do_not_end_are_killed(hosts, tmp_path):
    """The stand-in is stopped, so that neither end sees a connection that closes."""
    repository = make_repository(tmp_path / "repository", IGNORES)
    folder = tmp_path / "run"
    run = running(hosts, repository, folder, LINK_SECONDS="6", STOP_SECONDS="3")
    process = stand_in_of(hosts, "beta")
    os.kill(process, signal.SIGSTOP)
    assert run.wait(60) == 255
    assert "beta: out of reach for" in run.stderr
    assert "beta failed first (rank 1: lost its connection)" in run.stderr
    assert "alpha: has not ended in 3 s; killed" in run.stderr
    wait_for(lambda: all_ended(folder), 30)


def test_output_that_nobody_reads_stops_no_run(hosts, tmp_path):
    """A pager that is not scrolled, or Ctrl-S, for longer than a machine may be out of reach."""
    repository = make_repository(tmp_path / "repository", RUNS.replace("1000", "200_000"))
    folder = tmp_path / "run"
    folder.mkdir()
    read, write = os.pipe()
    run = hosts.start(repository, [str(folder)], env={"LINK_SECONDS": "6"}, stdout=write)
    os.close(write)
    wait_for(lambda: begun(folder), SECONDS)
    # Pipes and buffers fill: the ranks wait in a write.
    last = folder / "alive-1"
    wait_for(lambda: last.exists() and time.time() - float(last.read_text() or "inf") > 12, SECONDS)
    assert run.process.poll() is None
    assert all(map(is_alive, pids(folder)))
    before = last.read_text()
    with open(read, "rb", buffering=0) as reader:
        wait_for(lambda: reader.read(1 << 20) and last.read_text() > before, SECONDS)
    # Now the reader is gone for good, and the ranks go on.
    before = last.read_text()
    wait_for(lambda: last.read_text() > before, SECONDS)
    run.signal(signal.SIGUSR1)
    assert run.wait(SECONDS) == 75
    assert len([*folder.glob("saved-*")]) == 2


# ------------------------------------------------------------------ real training


def training(hosts: Hosts, folder: Path, **env: str) -> MultiNode:
    """Start a training that would take for ever, and wait for its first steps."""
    repository = make_repository(folder / "repository")
    corpus = write_corpus(folder / "corpus")
    words = flags(folder / "out", train_file=corpus, max_steps=1_000_000, save_strategy="no")
    env["HF_HOME"] = str(folder / "hf")
    run = hosts.start(repository, words, env=env)
    wait_for(lambda: run.stderr.count(" loss ") > 3 or run.process.poll() is not None, 4 * SECONDS)
    assert run.process.poll() is None, run.stdout + run.stderr
    return run


def test_training_on_two_machines_saves_when_the_front_is_signalled(tmp_path):
    with namespace_hosts(tmp_path / "hosts") as hosts:
        run = training(hosts, tmp_path)
        run.signal(signal.SIGTERM)
        status = run.wait(SECONDS)
    assert status == 75, run.stdout + run.stderr
    assert [*(tmp_path / "out").glob("checkpoint-*/manifest.json")]
    assert "failed" not in run.stderr


def test_a_cut_link_ends_the_front_and_all_ranks(tmp_path):
    """The ranks are in the middle of a collective, from which they cannot save."""
    with namespace_hosts(tmp_path / "hosts") as hosts:
        run = training(hosts, tmp_path, LINK_SECONDS="8", STOP_SECONDS="8")
        ranks = [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_rank(p, tmp_path)]
        assert len(ranks) == 2
        cut(hosts)
        started = time.monotonic()
        assert run.wait(SECONDS) == 255
        front = time.monotonic() - started
        wait_for(lambda: not any(map(is_alive, ranks)), 60)
        print(f"front ended after {front:.1f} s, ranks after {time.monotonic() - started:.1f} s")
    assert f"{hosts.names[1]} failed first (rank 1: lost its connection)" in run.stderr


def is_rank(process: Path, folder: Path) -> bool:
    """Tell whether a process trains into a folder below ``folder``."""
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        launched = b"\0LOCAL_RANK=" in b"\0" + (process / "environ").read_bytes()
    except OSError:
        return False
    return launched and f"{folder}/out".encode() in words
