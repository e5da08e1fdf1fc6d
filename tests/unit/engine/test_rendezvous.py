"""An address or a port at which the ranks cannot meet: one error, soon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from dstrain.core.errors import CheckpointError, ConfigError
from dstrain.core.ranks import Ranks
from dstrain.engine.process_group import rendezvous
from tests.launch import (
    free_port,
    in_fresh_process,
    quiet_environment,
    remove_shared_memory,
)

FIRST, SECOND = Ranks(0, 0, 2, 1), Ranks(1, 0, 2, 1)
NOWHERE = "192.0.2.1"  # reserved for documentation: no machine has it


@pytest.fixture(autouse=True)
def _shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "WITHIN_SECONDS", 1.0)
    monkeypatch.setattr(rendezvous, "_TRY_SECONDS", 1.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def check(monkeypatch: Any, ranks: Ranks, address: str, port: object, seconds: float = 60) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(port))
    rendezvous.check_rendezvous(ranks, timeout_seconds=seconds)


def test_a_port_in_use_is_an_error_of_rank_0(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} (.|\n)*another process listens there"):
            check(monkeypatch, FIRST, "127.0.0.1", port)


@pytest.mark.parametrize("port", ["", "http", 0, 70000])
def test_a_port_that_is_none(monkeypatch, port):
    with pytest.raises(ConfigError, match="a port is a number"):
        check(monkeypatch, FIRST, "127.0.0.1", port)


def test_rank_0_that_cannot_reach_itself(monkeypatch):
    with pytest.raises(ConfigError, match="cannot reach itself there"):
        check(monkeypatch, FIRST, NOWHERE, free_port())


def test_another_machine_that_gets_no_answer(monkeypatch):
    """Or is refused, for as long as ranks wait for each other."""
    with pytest.raises(ConfigError, match=f"could not reach MASTER_ADDR={NOWHERE}"):
        check(monkeypatch, SECOND, NOWHERE, free_port(), seconds=1)


def test_waiting_for_the_other_ranks_is_said(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "_REMIND_SECONDS", 0.1)
    with rendezvous.warning_when_slow(FIRST):
        time.sleep(0.5)
    assert "rank 0 has waited" in caplog.text


def test_a_name_that_nobody_knows(monkeypatch):
    with pytest.raises(ConfigError, match="no address is known for this name"):
        check(monkeypatch, SECOND, "no-such-host.invalid", free_port())


def test_another_machine_with_its_own_address(monkeypatch):
    with pytest.raises(ConfigError, match="this machine's own address, and rank 0 runs on another"):
        check(monkeypatch, SECOND, "127.0.0.1", free_port())


def test_a_first_machine_that_starts_later_is_waited_for(monkeypatch):
    monkeypatch.setattr(rendezvous, "WITHIN_SECONDS", 30.0)
    port = free_port()
    with socket.socket() as later:

        def begin() -> None:
            time.sleep(1.5)
            later.bind(("127.0.0.1", port))
            later.listen()

        thread = threading.Thread(target=begin)
        thread.start()
        check(monkeypatch, SECOND, "127.0.0.1", port)
        thread.join()


@pytest.mark.parametrize("is_own", [True, False])
def test_rank_0_leaves_the_port_free_again(monkeypatch, is_own):
    """Where the address is not the machine's own too (behind a service), as it answers itself."""
    reach = rendezvous._reach

    def slowly(*args: Any, **kwargs: Any) -> None:
        reach(*args, **kwargs)
        time.sleep(0.3)  # the thread that answers waits for the next call

    monkeypatch.setattr(rendezvous, "_is_of_this_machine", lambda address: is_own)
    monkeypatch.setattr(rendezvous, "_reach", slowly)
    port = free_port()
    check(monkeypatch, FIRST, "127.0.0.1", port)
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
        pass


def test_other_ranks_of_a_machine_ask_nobody(monkeypatch):
    check(monkeypatch, Ranks(3, 1, 4, 2), NOWHERE, 70000)


GROUP = """
import sys, time
from dstrain.core.errors import DstrainError
from dstrain.engine.process_group.startup import start
try:
    start(use_cpu=True, timeout_seconds=int(sys.argv[1]))
except DstrainError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
print("up", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_rank_that_meets_another_runs_ranks_is_one_error(tmp_path):
    """Two runs with one port: rank 1 of the second finds the store of the first."""
    port = free_port()

    def rank(number: int, timeout: int, seconds: int) -> subprocess.Popen[str]:
        facts = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return subprocess.Popen(
            [sys.executable, "-c", GROUP, str(timeout), str(seconds)],
            env=quiet_environment() | {name: str(value) for name, value in facts.items()},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )  # fmt: skip

    first = [rank(0, 120, 600), rank(1, 120, 600)]
    try:
        for process in first:
            assert process.stdout is not None
            assert any(line == "up\n" for line in process.stdout)
        second = rank(1, 8, 0)
        told, _ = second.communicate(timeout=200)
    finally:
        for process in first:
            process.kill()
            process.communicate()
        remove_shared_memory(port)
    assert second.returncode == 2, told
    assert f"refused: the 2 ranks did not meet at MASTER_ADDR=127.0.0.1, port {port}" in told
    assert "belongs to another run" in told
    assert "Traceback" not in told, told


def test_a_failure_of_gloo_in_the_first_collective_is_told_and_a_users_error_stays(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    told = r"did not meet(.|\n)*connectFullMesh failed"
    with pytest.raises(ConfigError, match=told), rendezvous.as_rendezvous_error(FIRST):
        raise RuntimeError("Gloo connectFullMesh failed with [...] no error")
    with pytest.raises(CheckpointError, match="mine"), rendezvous.as_rendezvous_error(FIRST):
        raise CheckpointError("mine")


def ask_for_a_second_rank_that_does_not_come() -> None:
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(dist.DistStoreError) as caught:
        dist.init_process_group("gloo", rank=0, world_size=2, timeout=timedelta(seconds=1))
    told = str(rendezvous.rendezvous_error(caught.value, FIRST))
    assert "1/2 clients joined" in told
    assert "frame #" not in told
    assert len(told.splitlines()) == 3


def test_the_frames_of_torchs_own_error_are_left_out():
    in_fresh_process(ask_for_a_second_rank_that_does_not_come)
