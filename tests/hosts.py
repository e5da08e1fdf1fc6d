"""Two machines for tests of `launch/multi_node.sh`, and a repository that each of them has.

Machines are either names that a stand-in for `ssh` runs commands for, in a session and an
environment of their own on this machine, or network namespaces with an ssh server each.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.launch import ROOT, free_port, quiet_environment

# Read what comes for a command, run it as a login shell would, and pass everything on. A stopped
# stand-in is a cut link, a killed one a broken connection.
STAND_IN = """\
import os, subprocess, sys, threading, time
words = sys.argv[1:]
at = words.index("--")
host, command = words[at + 1], " ".join(words[at + 2:])
with open(os.environ["STAND_IN_FOLDER"] + "/commands", "a") as log:
    log.write(repr(words) + "\\n")
if host.startswith("unreachable"):
    print("ssh: Could not resolve hostname " + host, file=sys.stderr)
    sys.exit(255)
if host.startswith("silent"):
    time.sleep(600)
home = os.environ["STAND_IN_FOLDER"] + "/home-" + host
os.makedirs(home, exist_ok=True)
remote = subprocess.Popen(
    ["sh", "-c", command], env={"HOME": home, "PATH": os.defpath}, start_new_session=True,
    cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
)
def carry(source, target):
    try:
        while data := os.read(source, 65536):
            while data:
                data = data[os.write(target, data):]
    except OSError:
        pass
    os.close(target)
there = [pipe.fileno() for pipe in (remote.stdin, remote.stdout, remote.stderr)]
carriers = [
    threading.Thread(target=carry, args=ends, daemon=True)
    for ends in ((0, there[0]), (there[1], 1), (there[2], 2))
]
for carrier in carriers:
    carrier.start()
for carrier in carriers[1:]:
    carrier.join()
status = remote.wait()
os._exit(status if status >= 0 else 255)
"""


def make_repository(folder: Path, program: str | None = None) -> Path:
    """Make a repository with its environment in ``folder``, as `launch/setup.sh` leaves it.

    Args:
        folder: where; it must not exist.
        program: what the ranks run in place of dstrain's command.
    """
    (folder / ".venv" / ".dstrain-setup").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    op = Path(quiet_environment()["TORCH_EXTENSIONS_DIR"], "deepspeed_shm_comm")
    if program is None and op.is_dir():  # a build takes a minute
        shutil.copytree(op, folder / ".venv" / "torch_extensions" / op.name)
    (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
    (folder / "dstrain").mkdir()
    for path in (ROOT / "dstrain").iterdir():
        if program is None or path.name != "__main__.py":
            (folder / "dstrain" / path.name).symlink_to(path)
    if program is not None:
        (folder / "dstrain" / "__main__.py").write_text(program)
    done = subprocess.run(
        ["bash", "-c", 'source "$1" && setup_hash', "hash", folder / "launch" / "setup.sh"],
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / ".venv" / ".dstrain-setup" / "base").write_text(done.stdout)
    return folder


def wait_for(what: Callable[[], object], seconds: float, why: str = "") -> float:
    """Wait until something is true; return the seconds that took."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds, why or "waited in vain"
        time.sleep(0.1)
    return time.monotonic() - started


@dataclass
class MultiNode:
    """A run of `multi_node.sh` that goes on in the background."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="surrogateescape")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="surrogateescape")

    def wait(self, seconds: float) -> int:
        """Return the exit status, within so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            error.add_note(f"{self.stdout[-4000:]}\n---\n{self.stderr[-4000:]}")
            raise

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@dataclass
class Hosts:
    """Machines that ssh reaches."""

    folder: Path
    names: tuple[str, ...]
    environment: Mapping[str, str]
    front: Sequence[str] = ()  # before the command, on the machine that launches
    runs: list[MultiNode] = field(default_factory=list)

    def start(
        self,
        repository: Path,
        words: Sequence[str] = (),
        *,
        slots: int = 1,
        hostfile: str = "hostfile",
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> MultiNode:
        """Start `multi_node.sh` on all machines, its output in files but for ``stdout``."""
        folder = self.folder / f"run-{len(self.runs)}"
        folder.mkdir()
        (folder / hostfile).write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        with (folder / "stdout").open("wb") as output, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [*self.front, "bash", repository / "launch" / "multi_node.sh", hostfile, *words],
                env=quiet_environment()
                | {"MASTER_PORT": str(free_port())}
                | dict(self.environment)
                | dict(env or {}),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.runs.append(MultiNode(process, folder))
        return self.runs[-1]


@contextlib.contextmanager
def stand_in_hosts(folder: Path, *names: str) -> Iterator[Hosts]:
    """Give machines that a stand-in for ssh reaches."""
    (folder / "bin").mkdir(parents=True)
    (folder / "ssh.py").write_text(STAND_IN)
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec "{sys.executable}" -E -S "{folder}/ssh.py" "$@"\n')
    ssh.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), quiet_environment()["PATH"]])
    environment = {"PATH": path, "STAND_IN_FOLDER": str(folder), "MASTER_ADDR": "127.0.0.1"}
    hosts = Hosts(folder, names, environment)
    try:
        yield hosts
    finally:
        end_all(hosts)


def end_all(hosts: Hosts) -> None:
    """Kill what is left; the other ends stop when the connections close."""
    for run in hosts.runs:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()


def why_no_namespaces() -> str | None:
    """Return the reason why two machines of their own cannot be had here."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for name in ("ip", "sshd", "ssh-keygen"):
        if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            return f"needs {name}"
    probe = f"dstrain-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode == 0:
        done = subprocess.run(
            ["ip", "link", "add", "dstrain0", "netns", probe, "type", "veth", "peer", "name", "b"]
            + ["netns", probe],
            capture_output=True,
            text=True,
        )
        subprocess.run(["ip", "netns", "del", probe], check=False)
    return None if done.returncode == 0 else f"needs network namespaces: {done.stderr.strip()}"


@contextlib.contextmanager
def namespace_hosts(folder: Path) -> Iterator[Hosts]:
    """Give two machines in network namespaces, with an ssh server each; the first one launches."""
    reason = why_no_namespaces()
    if reason is not None:
        pytest.skip(reason)
    folder.mkdir(parents=True)
    spaces = [f"dstrain-{os.getpid()}-{number}" for number in (0, 1)]
    addresses = ["10.213.77.1", "10.213.77.2"]
    servers: list[subprocess.Popen[bytes]] = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd wants to be
    hosts: Hosts | None = None
    try:
        for space in spaces:
            ip("netns", "add", space)
        veth = ["type", "veth", "peer", "name", "eth0", "netns", spaces[1]]
        ip("link", "add", "eth0", "netns", spaces[0], *veth)
        for space, address in zip(spaces, addresses, strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            sshd = [
                shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin") or "sshd",
                *("-D", "-e", "-f", "/dev/null", "-h", str(folder / "host")),
                *("-o", f"AuthorizedKeysFile={folder}/user.pub", "-o", "StrictModes=no"),
                *("-o", "PermitRootLogin=yes", "-o", "UsePAM=no", "-o", "PidFile=none"),
                *("-o", "PasswordAuthentication=no", "-o", f"ListenAddress={address}:22"),
            ]
            with (folder / f"sshd-{address}").open("wb") as log:
                servers.append(subprocess.Popen(["ip", "netns", "exec", space, *sshd], stderr=log))
        options = (
            f'-i "{folder}/user" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null'
            " -o LogLevel=ERROR -F none"
        )
        hosts = Hosts(
            folder,
            tuple(addresses),
            {"SSH_OPTIONS": options, "GLOO_SOCKET_IFNAME": "eth0"},
            ("ip", "netns", "exec", spaces[0]),
        )
        for address in addresses:
            log = folder / f"sshd-{address}"
            wait_for(lambda log=log: "listening" in log.read_text(), 20, "no ssh server")
        yield hosts
    finally:
        if hosts is not None:
            end_all(hosts)
        for server in servers:
            server.kill()
            server.wait()
        for space in spaces:
            done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
            for pid in map(int, done.stdout.split()):  # sessions that know of no cut link
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def cut(hosts: Hosts) -> None:
    """Cut the link between two machines in namespaces."""
    space = hosts.front[-1]
    subprocess.run(["ip", "-n", space, "link", "set", "eth0", "down"], check=True)
