"""The scripts of launch/ in environments that are out of the ordinary, and with wrong arguments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hosts import Hosts, make_repository, stand_in_hosts
from tests.launch import ROOT, quiet_environment

SCRIPTS = ("setup.sh", "quickstart.sh", "test.sh", "multi_node.sh")
LONG = "/".join(["long" * 20] * 3)  # longer than a #! line may be on any kernel

# What a rank runs: it writes down its flags.
TELLS = """
import json, pathlib, sys
from dstrain.core.launcher import note_end
pathlib.Path(sys.argv[3]).write_text(json.dumps(sys.argv[4:]))
note_end(0)
"""


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    seconds: float = 120,
    without: Sequence[str] = (),
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script as in a shell that knows nothing of any environment."""
    environment = quiet_environment() | env
    for name in ("VIRTUAL_ENV", "TORCH_EXTENSIONS_DIR", "NODE_RANK", *without):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", *command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def repository_of_pip(folder: Path, program: str | None = None) -> Path:
    """Make a repository whose `deepspeed` has the #! line that pip gives to such scripts."""
    repository = make_repository(folder, program)
    programs = repository / ".venv" / "bin"
    there = programs.resolve()
    programs.unlink()
    programs.mkdir()
    for path in there.iterdir():
        (programs / path.name).symlink_to(path)
    deepspeed = programs / "deepspeed"
    rest = deepspeed.read_text().split("\n", 1)[1]
    deepspeed.unlink()
    deepspeed.write_text(f"#!{programs}/python\n{rest}")
    deepspeed.chmod(0o755)
    return repository


def standing_in(folder: Path, python: str) -> Path:
    """Make a repository that is to be set up, whose python is a script of the shell."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f"#!/bin/sh\n{python}\n")
    (programs / "python").chmod(0o755)
    return folder


# ------------------------------------------------------------------ where the repository is


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_exported_cdpath_changes_nothing(name, tmp_path):
    repository = make_repository(tmp_path / "repository")
    before = sorted(path.name for path in repository.iterdir())
    words = [] if name == "setup.sh" else ["--help"]
    done = run([f"launch/{name}", *words], cwd=repository, CDPATH=".")
    assert done.returncode == 0, done.stderr
    if name == "setup.sh":
        assert done.stderr == f"[dstrain] Ready: source {repository}/.venv/bin/activate\n"
    assert sorted(path.name for path in repository.iterdir()) == before


def test_a_link_to_a_script_leads_to_the_repository(tmp_path):
    repository = make_repository(tmp_path / "repository")
    elsewhere = tmp_path / "x" / "y"
    elsewhere.mkdir(parents=True)
    for name in SCRIPTS:
        (elsewhere / name).symlink_to(Path("../../repository/launch") / name)
    done = run([elsewhere / "setup.sh"])
    assert done.returncode == 0
    assert f"source {repository}/.venv/bin/activate" in done.stderr
    assert run(["multi_node.sh", "--help"], cwd=elsewhere).returncode == 0
    done = run(["quickstart.sh", "--task", "x"], cwd=elsewhere)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted(SCRIPTS)
    assert not [*tmp_path.glob("x/.venv"), *tmp_path.glob(".venv")]


def test_to_source_the_set_up_under_its_own_name_installs_nothing(tmp_path):
    """As `bash -c 'source "$0"' launch/setup.sh`."""
    repository = standing_in(tmp_path / "repository", "touch installed; exit 1")
    done = run(
        ["-c", 'source "$0"; echo "$ROOT"', repository / "launch" / "setup.sh"], cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{repository}\n", "")
    assert not (tmp_path / "installed").exists()


@pytest.mark.parametrize("name", ["with a blank", LONG])
def test_a_job_runs_where_the_system_cannot_start_deepspeed_by_name(name, tmp_path):
    repository = repository_of_pip(tmp_path / name, TELLS)
    with pytest.raises(OSError, match="."):  # ENOENT: "bad interpreter", of bash
        subprocess.run([repository / ".venv" / "bin" / "deepspeed", "--help"], check=False)
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    told = tmp_path / "to ld"
    script = repository / "launch" / "multi_node.sh"
    # By the functions, without a set-up: it would see that `deepspeed` is to be mended.
    text = script.read_text()
    assert text.count("\ndstrain_setup\n") == 1
    script.write_text(text.replace("\ndstrain_setup\n", '\nexport PATH="$VENV/bin:$PATH"\n'))
    done = run([script, tmp_path / "hosts", str(told), "a b", "$x"], seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(told.read_text()) == ["a b", "$x"]


@pytest.mark.parametrize("name", ["with a blank", LONG])
def test_scripts_that_the_system_cannot_start_are_mended(name, tmp_path):
    repository = repository_of_pip(tmp_path / name)
    programs = repository / ".venv" / "bin"
    old = programs / "old-style"
    old.write_text(f"#!{programs}/python\n\nimport sys\nprint(sys.executable, sys.argv[1:])\n")
    old.chmod(0o755)
    source = """
    source "$1"
    ! is_set_up || echo before
    mend_scripts
    ! is_set_up || echo after
    "$VENV/bin/old-style" x y
    """
    command = ["-c", source, "test", repository / "launch" / "setup.sh"]
    done = run(command)
    assert done.stdout == f"after\n{programs}/python ['x', 'y']\n", done.stderr
    mended = old.read_bytes()
    assert run(command).returncode == 0
    assert old.read_bytes() == mended
    assert (programs / "pip").is_symlink()


def test_the_line_that_says_ready_can_be_pasted(tmp_path):
    repository = make_repository(tmp_path / "with a blank & more")
    done = run([repository / "launch" / "setup.sh"])
    assert done.returncode == 0
    line = done.stderr.partition("Ready: ")[2]
    done = run(["-c", f'{line.strip()}; echo "$VIRTUAL_ENV"'])
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ mistakes and failures


HOSTFILE = "worker-0 slots=1\nworker-1 slots=1\n"


@pytest.mark.parametrize(
    ("hostfile", "environment", "error"),
    [
        (None, {}, "hosts does not exist"),
        ("", {}, "names no machine"),
        ("# none\n", {}, "names no machine"),
        ("worker-0\n", {}, "line 1: expected 'NAME slots=NUMBER', found 'worker-0'"),
        ("worker-0 slots=x\n", {}, "line 1: expected 'NAME slots=NUMBER'"),
        ("worker-0 slots=000\n", {}, "line 1: worker-0 has no slots"),
        (f"worker-0 slots={'9' * 23}\n", {}, f"slots={'9' * 23} are too many"),
        ("worker-0 slots=4097\n", {}, "slots=4097 are too many for one machine"),
        ("-oProxyCommand=x slots=1\n", {}, "cannot begin with '-'"),
        (HOSTFILE + "worker-0 slots=1\n", {}, "line 3: worker-0 is in line 1 already"),
        (HOSTFILE, {"NODE_RANK": "x"}, "NODE_RANK=x: expected 0 to 1"),
        (HOSTFILE, {"NODE_RANK": "2"}, "NODE_RANK=2: expected 0 to 1"),
        (HOSTFILE, {"NODE_RANK": "9" * 19}, "expected 0 to 1"),
        (HOSTFILE, {"LINK_SECONDS": "0"}, "LINK_SECONDS=0: expected a number of seconds"),
        (HOSTFILE, {"STOP_SECONDS": "soon"}, "STOP_SECONDS=soon: expected"),
        (HOSTFILE, {"MASTER_PORT": "port"}, "MASTER_PORT=port: expected the number of a port"),
        (HOSTFILE, {"SSH_PORT": "65536"}, "SSH_PORT=65536: expected the number of a port"),
    ],
)
def test_a_mistake_about_machines_is_one_line_with_status_2(hostfile, environment, error, tmp_path):
    if hostfile is not None:
        (tmp_path / "hosts").write_text(hostfile)
    script = standing_in(tmp_path / "repository", "touch used") / "launch" / "multi_node.sh"
    rank = environment.pop("NODE_RANK", "")
    command = ["-c", 'NODE_RANK="$1" exec bash "${@:2}"', "test", rank, script, "hosts"]
    done = run(command, cwd=tmp_path, **environment)
    assert done.returncode == 2, done.stderr
    assert error in done.stderr
    assert done.stderr.startswith("[dstrain] error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "used").exists()


@pytest.mark.parametrize("words", [["--task", "x"], ["--task=x"], ["--task"]])
def test_an_unknown_task_is_a_mistake(words, tmp_path):
    script = standing_in(tmp_path / "repository", "touch used") / "launch" / "quickstart.sh"
    done = run([script, *words], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tasks are causal-lm, seq2seq" in done.stderr
    assert not (tmp_path / "used").exists()


@pytest.mark.parametrize("words", [["devv"], ["dev", "peft,tune"], ["--dev"], [""]])
def test_an_unknown_extra_is_a_mistake(words, tmp_path):
    repository = standing_in(tmp_path / "repository", "touch used")
    done = run([repository / "launch" / "setup.sh", *words], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"'{words[-1]}'; pyproject.toml has {', '.join(extras)}\n" in done.stderr
    assert not (tmp_path / "used").exists()
    assert not (repository / ".venv" / ".dstrain-setup").exists()


@pytest.mark.parametrize("name", ["setup.sh", "quickstart.sh", "test.sh", "multi_node.sh"])
def test_a_folder_for_temporary_files_that_is_none_is_a_mistake(name, tmp_path):
    repository = standing_in(tmp_path / "repository", "touch used")
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    words = ["hosts"] if name == "multi_node.sh" else []
    done = run([repository / "launch" / name, *words], cwd=tmp_path, TMPDIR="/nonexistent")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: TMPDIR=/nonexistent is no folder that can be written to" in done.stderr
    assert not (tmp_path / "used").exists()


def test_an_installation_that_fails_is_a_failure(tmp_path):
    fails = 'case "$*" in *pip*install*) echo "ERROR: no network" >&2; exit 2;; esac'
    repository = standing_in(tmp_path / "repository", fails)
    done = run([repository / "launch" / "setup.sh"])
    assert done.returncode == 1
    assert done.stderr.endswith("[dstrain] error: torch could not be installed; see above\n")
    assert not (repository / ".venv" / ".dstrain-setup").exists()


def test_many_machines_need_no_home(tmp_path):
    repository = make_repository(tmp_path / "repository", TELLS)
    own = {"DS_ENV_FILE": "", "SSH_OPTIONS": ""}
    with stand_in_hosts(tmp_path / "hosts", "unreachable-1", "unreachable-2") as hosts:
        homeless = Hosts(hosts.folder, hosts.names, hosts.environment, ("env", "-u", "HOME"))
        for env in (own, own | {"DS_ENV_FILE": str(tmp_path / "none")}):
            started = homeless.start(repository, ["--flag"], env=env)
            assert started.wait(120) == 1
            assert "not all 2 machines are ready" in started.stderr
            assert "HOME" not in started.stderr


# ------------------------------------------------------------------ what the scripts say


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_usage_at_the_top(name, word, tmp_path):
    script = standing_in(tmp_path / "repository", "touch used") / "launch" / name
    done = run([script, word], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    comment = []
    for line in script.read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").removeprefix(" "))
    assert done.stdout.splitlines() == comment
    assert f"bash launch/{name}" in done.stdout
    assert not (tmp_path / "used").exists()
    assert os.listdir(tmp_path) == ["repository"]
