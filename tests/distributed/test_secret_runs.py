"""A whole run is given credentials everywhere, and none is in a file, in its output or uploaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import hub_server
from tests.launch import ROOT, launch, quiet_environment

MARK = "marked-c0ffee"


def files_with_mark(folder: Path) -> list[str]:
    """Return files below a folder that hold the mark."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and MARK.encode() in path.read_bytes()
    ]


def test_a_run_gives_no_credential_away(tmp_path: Path) -> None:
    """DeepSpeed config, arguments, callbacks, trackers, errors, all logs, uploads."""
    with hub_server() as hub:
        environment = quiet_environment() | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "DS_LOG_LEVEL": "INFO",
            "TEST_MARK": MARK,
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.distributed.secret_job", str(tmp_path / "out")],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "done" in done.stdout
        assert hub.tokens == {f"{MARK}-hub"}
        assert MARK not in output, [line for line in output.splitlines() if MARK in line]
        for name, repository in hub.repositories.items():
            leaking = [path for path, data in repository.files.items() if MARK.encode() in data]
            assert not leaking, (name, leaking)
            assert "my_ds_config.json" not in repository.files
            assert "resolved_config.json" in repository.files
    assert "<API_KEY>" in (tmp_path / "out" / "resolved_config.json").read_text()
    assert "DeepSpeedEngine configuration" in output  # which has the key, were it not hidden
    (tmp_path / "out" / "my_ds_config.json").unlink()
    assert files_with_mark(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--hub_token", f"{MARK}-hub"], "HF_TOKEN"),
        ([f"--push-to-hub-token={MARK}-hub"], "HF_TOKEN"),
        (["--deepspeed", f'{{"comet": {{"api_key": "{MARK}"}}}}'], "give the path of that"),
    ],
)
def test_a_launchers_command_takes_none(words: list[str], remedy: str, tmp_path: Path) -> None:
    """The launcher prints its command, so the first run says so, before anything else."""
    where = ["--output_dir", str(tmp_path / "out")]
    done = launch(
        ["--quiet", "--module", "dstrain", "train", "causal-lm", *where, *words], timeout=100
    )
    assert done.returncode == 2
    said = done.stderr[done.stderr.index("dstrain: error:") :].split("\n\n")[0]
    assert "on the command line of a launcher" in said
    assert remedy in said
    assert MARK not in said.split("exits with return code")[0].split("[20")[0]
    assert not (tmp_path / "out").exists()


def test_the_ssh_way_of_many_machines_takes_none(tmp_path: Path) -> None:
    """The token would be in the command of ssh."""
    (tmp_path / "hosts").write_text("worker-0 slots=2\nworker-1 slots=2\n")
    command = ["bash", "launch/multi_node.sh", str(tmp_path / "hosts"), "--hub_token", MARK]
    environment = {k: v for k, v in quiet_environment().items() if k != "NODE_RANK"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "Log in with 'hf auth login' on worker-0" in done.stderr
    assert MARK not in done.stdout + done.stderr


def test_launch_scripts_take_the_token_out_of_the_command(tmp_path: Path) -> None:
    """The ranks get it as HF_TOKEN, and no command has it."""
    script = """
    source launch/setup.sh
    dstrain_take_token "$@"
    printf '%s\\n' "token=$HF_TOKEN" "${WORDS[@]}"
    """
    for words in (["--hub_token", "x y"], ["--hub-token=x y"], ["--push_to_hub_token", "x y"]):
        done = subprocess.run(
            ["bash", "-c", script, "test", "--a", "b c", *words, "--push_to_hub"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines() == ["token=x y", "--a", "b c", "--push_to_hub"]
