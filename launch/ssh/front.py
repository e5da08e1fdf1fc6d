"""Run a training on several machines, each through an ssh connection of its own.

`multi_node.sh` runs this; `on_host.py` is the other end. All machines have to be ready before the
first one starts. Nothing that the user has typed or set is on a command line of ssh or of the shell
on the other side: it travels as JSON through the connection.

For each machine there are one ssh process, three pipes and one connection, and a look at each when
something happens. Each gets the list of all: hosts x hosts lines, five megabytes for 512.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from machine import LOST, Machine
from output import OUTPUTS, say, write_all
from settings import Settings
from wire import NO_REPOSITORY, message

CHUNK_BYTES = 1 << 16
MOST_UNWRITTEN_BYTES = 1 << 22  # of output that nobody reads yet; then the ranks wait
TICK_SECONDS = 1.0
MOST_CONNECTING = 32  # at a time: a host on the way of all connections takes only so many at once
END_BY_THEMSELVES_SECONDS = 10.0  # for ranks that see their peers fail, to say so
MISTAKE = 2  # the exit status after a mistake in arguments or environment
PREEMPTED = 75  # the exit status after a signal and a checkpoint

# For bash, which reads it from the connection, as Python reads what follows.
BOOTSTRAP = """\
cd -- {root} && [ -f launch/ssh/on_host.py ] && [ -x .venv/bin/deepspeed ] || exit {status}
exec .venv/bin/python -E -X utf8 launch/ssh/on_host.py
"""


SIGNALS: list[signal.Signals] = []  # that have come and wait to be passed on


class Ended(Exception):
    """Raised to end the run with an exit status."""

    def __init__(self, status: int) -> None:
        self.status = status


def die(text: str, status: int = 1) -> NoReturn:
    """End with an error: status 1 for a failure, `MISTAKE` for what the user can set right."""
    say(f"error: {text}")
    raise Ended(status)


class Front:
    """All machines of a run."""

    def __init__(self, settings: Settings, words: list[str]) -> None:
        self._settings = settings
        self._words = words
        self._machines: list[Machine] = []
        first_rank = 0
        for name, slots in settings.hosts:
            self._machines.append(Machine(name, slots, first_rank))
            first_rank += slots
        self._selector = selectors.DefaultSelector()
        # A selector of its own for what is read, so that all of it can be left aside at once.
        self._reading = selectors.DefaultSelector()
        self._selector.register(self._reading, selectors.EVENT_READ)
        self._is_paused = False
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._said_alive_at = time.monotonic()
        self._has_started = False
        self._caught: signal.Signals | None = None
        self._interrupts = 0
        self._ask_at = self._kill_at = float("inf")  # the machines that are left, to end

    # ---- the walk of a run

    def run(self) -> int:
        """Connect, check, start, carry on to the end; return the exit status."""
        self._raise_limits()
        self._loop(until=self._all_known)
        if any(machine.ready is None for machine in self._machines):
            self._refuse()
        master_addr = self._settings.master_addr or self._first_address()
        for machine in self._machines:
            machine.send(message({"go": master_addr}))
        self._has_started = True
        self._loop(until=lambda: all(m.ended_at is not None for m in self._machines))
        return self._conclude()

    def _loop(self, *, until: Callable[[], bool]) -> None:
        while True:
            self._connect_more()
            for key, _ in self._selector.select(0.1 if self._is_paused else TICK_SECONDS):
                if key.fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, CHUNK_BYTES)
                elif key.fileobj is self._reading:
                    self._read()
                else:
                    key.data.flush()
            self._reap()
            self._pass_signals_on()
            if until():
                return
            self._pause_or_go_on()
            self._keep_alive()
            self._end_what_is_left()
            self._watch_writes()

    def _all_known(self) -> bool:
        return all(m.ready is not None or m.ended_at is not None for m in self._machines)

    # ---- the beginning

    def _raise_limits(self) -> None:
        """Allow three pipes for each machine; more than that is refused before anything starts."""
        needed = 64 + 4 * len(self._machines)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < needed:
            if hard != resource.RLIM_INFINITY and hard < needed:
                die(f"{needed} open files are needed; `ulimit -Hn` allows {hard}", MISTAKE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

    def _connect_more(self) -> None:
        number_connecting = sum(machine.is_connecting for machine in self._machines)
        for number, machine in enumerate(self._machines):
            if number_connecting >= MOST_CONNECTING:
                return
            if machine.process is not None:
                continue
            octal = "".join(f"\\{byte:03o}" for byte in os.fsencode(self._settings.root))
            bootstrap = BOOTSTRAP.format(root=f"$'{octal}'", status=NO_REPOSITORY).encode()
            command = self._settings.ssh(machine.name)
            machine.connect(command, bootstrap + message(self._job(number)))
            self._reading.register(machine.fd(1), selectors.EVENT_READ, (machine, 1))
            self._reading.register(machine.fd(2), selectors.EVENT_READ, (machine, 2))
            machine.open_fds = {1, 2}
            number_connecting += 1

    def _job(self, number: int) -> dict[str, Any]:
        """Return the job of a machine, without the address where ranks meet, which comes later."""
        settings = self._settings
        return {
            "number": number,
            "slots": self._machines[number].slots,
            "hostfile": "".join(f"{name} slots={slots}\n" for name, slots in settings.hosts),
            "master_port": settings.master_port,
            "task": settings.task,
            "words": self._words,
            "environment": settings.environment,
            "link_seconds": settings.link_seconds,
            "stop_seconds": settings.stop_seconds,
        }

    def _refuse(self) -> NoReturn:
        """End with an error for every machine that is not ready, before any has started."""
        root = self._settings.root
        for machine in self._machines:
            if machine.ready is not None:
                continue
            status = machine.process.returncode if machine.process else None
            if machine.silent_seconds is not None:
                say(
                    f"{machine.name}: no answer for {machine.silent_seconds:.0f} s "
                    "(START_SECONDS); see there whether a login script or a disk hangs"
                )
            elif status == LOST:
                say(
                    f"{machine.name}: no ssh without a password (see above; SSH_PORT and "
                    "SSH_OPTIONS may help)"
                )
            elif status == NO_REPOSITORY:
                say(
                    f"{machine.name}: no repository with a .venv at {root}; share the disk, or run "
                    "'bash launch/setup.sh' in a copy of the same version at that path"
                )
            else:
                say(f"{machine.name}: ended with status {status} before it was ready")
        die(
            f"not all {len(self._machines)} machines are ready. Where there is no ssh, start each "
            "by itself: see NODE_RANK in launch/multi_node.sh"
        )

    def _first_address(self) -> str:
        """Return the address of the first machine that it knows itself, for an alias of ssh."""
        first = self._machines[0]
        found = (first.ready or {}).get("addresses")
        if not found:
            die(f"no address known for {first.name}, the first machine; set MASTER_ADDR", MISTAKE)
        return str(found[0])

    # ---- reading and writing

    def _read(self) -> None:
        for key, _ in self._reading.select(0):
            machine, stream = key.data
            if not machine.receive(stream):
                self._reading.unregister(key.fd)
                machine.open_fds.discard(stream)

    def _pause_or_go_on(self) -> None:
        """Read nothing more from any machine while too much has not been written."""
        unwritten = sum(output.size for output in OUTPUTS.values())
        if not self._is_paused and unwritten > MOST_UNWRITTEN_BYTES:
            self._is_paused = True
            self._selector.unregister(self._reading)
        elif self._is_paused and unwritten < MOST_UNWRITTEN_BYTES / 2:
            self._is_paused = False
            self._selector.register(self._reading, selectors.EVENT_READ)
            for machine in self._machines:
                machine.heard_at = time.monotonic()

    def _watch_writes(self) -> None:
        """Wait for those ssh processes that have not taken everything."""
        registered = self._selector.get_map()
        for machine in self._machines:
            if machine.process is None or machine.ended_at is not None:
                continue
            fd = machine.fd(0)
            if machine.has_unsent and fd not in registered:
                self._selector.register(fd, selectors.EVENT_WRITE, machine)
            elif not machine.has_unsent and fd in registered:
                self._selector.unregister(fd)

    def _running(self) -> list[Machine]:
        return [m for m in self._machines if m.process is not None and m.ended_at is None]

    def _keep_alive(self) -> None:
        """Tell every machine that this one is alive; give up those that are silent for too long."""
        now = time.monotonic()
        if now - self._said_alive_at > self._settings.link_seconds / 6:
            self._said_alive_at = now
            for machine in self._running():
                if not machine.has_unsent:
                    machine.send(message({}))
        for machine in self._running():
            silence = now - machine.heard_at
            most = self._settings.link_seconds
            if machine.ready is None:
                most = max(most, self._settings.start_seconds)
            if not self._is_paused and silence > most and machine.silent_seconds is None:
                assert machine.process is not None
                if machine.process.poll() is None:
                    machine.silent_seconds = silence
                    if machine.ready is not None:
                        say(f"{machine.name}: out of reach for {silence:.0f} s; given up")
                    machine.process.kill()

    # ---- the end

    def _reap(self) -> None:
        """Note which ssh processes have ended."""
        now = time.monotonic()
        for machine in self._running():
            assert machine.process is not None
            if machine.process.poll() is None:
                continue
            machine.exited_at = machine.exited_at or now
            # What it wrote is read first. A helper of ssh may hold a pipe open, but not for ever.
            if machine.open_fds and (self._is_paused or now - machine.exited_at < 2):
                continue
            for stream in machine.open_fds:
                self._reading.unregister(machine.fd(stream))
            machine.open_fds.clear()
            if machine.fd(0) in self._selector.get_map():
                self._selector.unregister(machine.fd(0))
            machine.end()
            if self._has_started:
                self._judge(machine)

    def _judge(self, machine: Machine) -> None:
        """Decide what the end of a machine's ranks means for those that are left."""
        status, now = machine.exit_status, time.monotonic()
        if status == 0:
            return
        left = [m for m in self._machines if m.ended_at is None]
        if machine.status is None:
            say(f"{machine.name}: connection lost; its ranks save there if they can, and end")
            wait = 0.0
        elif status == PREEMPTED:  # all save together, and are about to end
            wait = float(self._settings.stop_seconds)
        else:
            wait = END_BY_THEMSELVES_SECONDS
            if left and self._caught is None:
                say(f"{machine.name}: ended with status {status}; the others are to end as well")
        if left and now + wait < self._ask_at:
            self._ask_at = now + wait
            self._kill_at = min(self._kill_at, self._ask_at + self._settings.stop_seconds)

    def _end_what_is_left(self) -> None:
        """Ask the machines that are left to end, and kill their ranks when that takes too long."""
        now = time.monotonic()
        if now >= self._ask_at:
            self._ask_at = float("inf")
            self._tell(message({"signal": signal.SIGTERM.name}))
        if now >= self._kill_at:
            self._kill_at = float("inf")
            for machine in self._running():
                say(f"{machine.name}: has not ended in {self._settings.stop_seconds} s; killed")
            self._tell(message({"kill": True}))

    def _tell(self, what: bytes) -> None:
        for machine in self._running():
            machine.send(what)

    def _pass_signals_on(self) -> None:
        """Send the machines the signals that have come here."""
        while SIGNALS:
            number = SIGNALS.pop(0)
            if number == signal.SIGTSTP:
                say("the ranks on other machines cannot be suspended; they go on")
                continue
            self._caught = self._caught or number
            self._interrupts += number == signal.SIGINT
            if not self._has_started or self._interrupts > 2:
                raise Ended(128 + number)
            self._tell(message({"signal": number.name}))

    def hang_up(self) -> None:
        """Close the connections that are left; the other ends then stop their ranks."""
        for machine in self._running():
            assert machine.process is not None
            machine.process.terminate()

    def _conclude(self) -> int:
        """Say who failed first, and return the status of the run."""
        failed = sorted(
            (m for m in self._machines if m.exit_status not in (0, PREEMPTED)),
            key=lambda machine: machine.failed_at,
        )
        saved = [m for m in self._machines if m.exit_status == PREEMPTED]
        if not failed:
            return PREEMPTED if saved else 0
        first = failed[0]
        if self._caught is None or first.exit_status != 128 + self._caught:
            how = "lost its connection" if first.status is None else f"status {first.status}"
            others = f", then {len(failed) - 1} more of {len(self._machines)}" if failed[1:] else ""
            say(f"error: {first.name} failed first ({first.ranks}: {how}){others}")
        # What fails by itself fails again: it is no preemption, though the others may have saved
        # when they were asked to end.
        by_itself = first.status is not None and self._caught is None
        if saved and not (by_itself and all(first.failed_at < m.failed_at for m in saved)):
            return PREEMPTED
        return first.exit_status


def catch_signals() -> None:
    """Collect the signals that are to be passed on. What the caller ignores (nohup) stays so."""
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGTSTP,
    ):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: SIGNALS.append(signal.Signals(number)))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the loop


def main() -> int:
    """Read the settings, and run."""
    for output in OUTPUTS.values():
        output.start()
    with open(0, "rb", closefd=False) as given:
        settings = Settings.read(given.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    catch_signals()
    try:
        settings.ssh("")
    except ValueError as error:
        say(f"error: SSH_OPTIONS={settings.ssh_options}: {error}")
        return MISTAKE
    front = Front(settings, sys.argv[1:])
    try:
        return front.run()
    except Ended as ended:
        return ended.status
    finally:
        front.hang_up()


if __name__ == "__main__":
    status = main()
    write_all(until=lambda: bool(SIGNALS))  # a signal ends the wait for a reader
    os._exit(status)  # a thread may wait for one still
