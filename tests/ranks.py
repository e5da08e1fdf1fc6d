"""Run marked tests on real ranks, in process groups that stay alive from test to test.

    @pytest.mark.ranks(2)                      # or ranks(2, timeout=300), or pytest.param(marks=)
    def test_sum(rank, world_size, tmp_path):  # tmp_path is one folder for all ranks
        ...

The pytest process never runs such a test. Each rank is a pytest session of its own which has
collected the same files and waits; told a node id, it runs that item with everything pytest has
(fixtures, skips, rewritten assertions) and sends the reports back. The pytest process turns the
reports of all ranks into one and logs it, so selection, `-x`, `--lf` and durations work as ever.

A rank that fails leaves its peers in a collective. They get a short grace, then their stacks are
taken, the group is killed, and the next test gets a fresh one. So does a test past its deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
from _pytest.skipping import evaluate_skip_marks

from tests.launch import free_port, quiet_environment, remove_shared_memory

MARKER = "ranks(world_size, timeout=120): run on that many ranks, for at most timeout seconds"
DEADLINE_SECONDS = 120.0
GRACE_SECONDS = 3.0  # for the peers of a rank that failed
START_SECONDS = 300.0  # a first start compiles DeepSpeed's shared memory op
COLLECTIVE_SECONDS = 60.0
MEET_SECONDS = 10.0  # for the barrier after a test
LEAVE_SECONDS = 2.0  # for a test's threads to end after its fixtures did
OUTPUT_TAIL_CHARS, PEER_TAIL_LINES = 4000, 20
PHASES = ("setup", "call", "teardown")
DUMP_SIGNAL = int(signal.SIGRTMAX) - 1  # not SIGUSR1: a trainer may answer that one
PR_SET_PDEATHSIG = 1
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# What libraries set or start once, for the life of the process.
ALLOWED_ENVIRONMENT = ("PYTEST_CURRENT_TEST", "KMP_", "TORCHINDUCTOR_", "TRITON_", "WANDB_")
ALLOWED_THREADS = ("tqdm_monitor", "pin_memory", "asyncio_", "QueueFeederThread", "wandb-")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("ranks"):  # in a rank, the worker has that name
        config.pluginmanager.register(Dispatcher(config), "ranks")


def _wanted(item: pytest.Item) -> tuple[int, float]:
    """Return (world size, deadline in seconds) of ``item``; world size 0 for an ordinary test."""
    mark = item.get_closest_marker("ranks")
    if mark is None:
        return 0, 0.0
    if len(mark.args) != 1 or not set(mark.kwargs) <= {"timeout"}:
        raise pytest.UsageError(f"{item.nodeid}: expected {MARKER}, got {mark}")
    return mark.args[0], mark.kwargs.get("timeout", DEADLINE_SECONDS)


def _report(item: pytest.Item, when: str, outcome: str, longrepr: object) -> pytest.TestReport:
    now, names = time.time(), dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(
        item.nodeid, item.location, names, outcome, longrepr, when, start=now, stop=now
    )


def _xfailed(report: pytest.TestReport) -> bool:
    return report.skipped and hasattr(report, "wasxfail")


# ------------------------------------------------------------------ in the pytest process


@dataclass
class Rank:
    """A worker process, and what it has said about the test it runs."""

    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    home: Path
    log_start: int = 0
    reports: list[pytest.TestReport] = field(default_factory=list)
    busy: bool = True
    complaint: str = ""

    def failure(self) -> pytest.TestReport | None:
        """Return its first report of a failure; an expected one too, for it leaves peers behind."""
        return next((r for r in self.reports if r.failed or _xfailed(r)), None)

    def phase(self) -> str:
        return PHASES[min(len({r.when for r in self.reports}), 2)]

    def stack(self) -> str:
        """Return where its threads stood when asked, without pytest's own frames."""
        noise = ("/_pytest/", "/pluggy/", "/tests/ranks.py", "<frozen runpy>")
        lines = (self.home / "stacks").read_text().splitlines()
        return "\n".join(line for line in lines if not any(part in line for part in noise))

    def output(self) -> str:
        """Return the end of what it has printed since the test began."""
        with (self.home / "output").open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")[-OUTPUT_TAIL_CHARS:].strip()


class RankGroup:
    """The worker processes of one world size."""

    def __init__(self, config: pytest.Config, world_size: int, files: list[Path]) -> None:
        self.config, self.port = config, free_port()
        self.folder = config._tmp_path_factory.mktemp(f"ranks{world_size}-")
        self.ranks = [self._spawn(number, world_size, files) for number in range(world_size)]

    def _spawn(self, number: int, world_size: int, files: list[Path]) -> Rank:
        config, home = self.config, self.folder / f"rank{number}"
        home.mkdir()
        pytest_arguments = [
            *files,
            *("--rootdir", config.rootpath, "--import-mode", config.getoption("importmode")),
            *("--basetemp", home / "tmp", "-o", "addopts=", "-s", "-p", "no:terminal"),
            *("-p", "no:cacheprovider", "-p", "no:faulthandler"),
            *(["-c", config.inipath] if config.inipath else []),
            *(f"-W{entry}" for entry in config.known_args_namespace.pythonwarnings or ()),
            *(f"-o{entry}" for entry in config.getoption("override_ini") or ()),
        ]
        here, there = multiprocessing.Pipe()
        ids = dict.fromkeys(("RANK", "LOCAL_RANK"), number)
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), world_size)
        facts = ids | sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        with (home / "output").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.ranks", str(there.fileno())],
                env=quiet_environment() | {name: str(value) for name, value in facts.items()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[there.fileno()],
                start_new_session=True,  # one signal then reaches the rank's children too
            )
        there.close()
        style = ("verbose", "tbstyle", "showlocals", "fulltrace")
        options = {name: config.getoption(name, None) for name in style}
        rank = Rank(number, process, here, home)
        self._send(rank, (os.getpid(), home, [str(a) for a in pytest_arguments], options))
        return rank

    def start(self) -> str:
        """Wait until every rank has joined; return "" or why one did not."""
        self._listen(time.monotonic() + START_SECONDS)
        remove_shared_memory(self.port)
        missing = [r for r in self.ranks if r.busy or r.complaint]
        if not missing:
            return ""
        lines = [f"{len(self.ranks)} ranks did not start"]
        for rank in missing:
            why = rank.complaint or "was not ready"
            lines.append(f"rank {rank.number}: {why}\n{rank.output()}")
        # A process killed while it builds an op leaves a lock that all later ones wait for.
        extensions = Path(quiet_environment()["TORCH_EXTENSIONS_DIR"])
        lines.extend(f"perhaps stale: {lock}" for lock in extensions.glob("*/lock"))
        self.kill()
        return "\n".join(lines)

    def run(self, item: pytest.Item, following: str | None, tmp_path: Path, limit: float) -> None:
        """Have every rank run ``item``, then meet; what came of it stands in the ranks."""
        for rank in self.ranks:
            rank.reports, rank.log_start = [], (rank.home / "output").stat().st_size
            self._send(rank, (item.nodeid, following, tmp_path))
        self._listen(time.monotonic() + limit, item)
        if not any(rank.busy or rank.failure() for rank in self.ranks):
            for rank in self.ranks:
                self._send(rank, None)
            self._listen(time.monotonic() + MEET_SECONDS, item)
            for rank in self.ranks:
                if rank.busy:
                    text = "the ranks did not meet after the test: was a collective left behind?"
                    rank.reports.append(_report(item, "teardown", "failed", text))
        if any(rank.busy for rank in self.ranks):
            for rank in self.ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, DUMP_SIGNAL)
            time.sleep(0.5)  # the time to write the stacks

    def _send(self, rank: Rank, request: object) -> None:
        rank.busy = True
        with contextlib.suppress(OSError):  # dead: `_hear` will see it
            rank.connection.send(request)

    def _listen(self, deadline: float, item: pytest.Item | None = None) -> None:
        """Hear the ranks until none is busy; once one has failed, only for the grace."""
        while any(rank.busy for rank in self.ranks) and time.monotonic() < deadline:
            busy = {rank.connection: rank for rank in self.ranks if rank.busy}
            ready = wait(list(busy), min(0.5, max(0.0, deadline - time.monotonic())))
            for connection, rank in busy.items():
                # A child of the rank may hold the line open, so the process is looked at too.
                if connection in ready or rank.process.poll() is not None:
                    self._hear(rank)
                if item and rank.complaint:
                    failed = _report(item, rank.phase(), "failed", rank.complaint)
                    rank.reports.append(failed)
            if any(rank.failure() or rank.complaint for rank in self.ranks):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

    def _hear(self, rank: Rank) -> None:
        """Take one message from ``rank``, or note its death."""
        try:
            if not rank.connection.poll():
                raise EOFError
            kind, data = rank.connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(5)
            code = rank.process.returncode
            cause = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
            kind, data = "complaint", f"the process of rank {rank.number} died: {cause}"
        if kind == "report":
            load = self.config.hook.pytest_report_from_serializable
            rank.reports.append(load(config=self.config, data=data))
        else:
            rank.busy, rank.complaint = False, data

    def kill(self) -> None:
        """Kill the ranks and their children."""
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.process.wait()
            rank.connection.close()
        remove_shared_memory(self.port)


def _verdict(item: pytest.Item, ranks: list[Rank]) -> list[pytest.TestReport]:
    """Return one report for each phase, made from what all ranks said."""
    failed = [(report, rank) for rank in ranks if (report := rank.failure())]
    if any(_xfailed(report) for report, _ in failed):  # one rank is enough to fail as expected
        failed = [pair for pair in failed if "[XPASS(strict)]" not in pair[0].longreprtext]
    failed.sort(key=lambda pair: (pair[0].skipped, pair[0].stop))  # unexpected ones, then by time
    busy = [rank for rank in ranks if rank.busy]
    skipped = [rank for rank in ranks if any(report.skipped for report in rank.reports)]
    first = culprit = None
    if failed:
        first, culprit = failed[0]
        if hasattr(first.longrepr, "reprcrash"):
            crash = first.longrepr.reprcrash
            crash.message = f"[rank {culprit.number}] {crash.message}"
        heading = f"rank {culprit.number} of {len(ranks)} failed first, in {first.when}; it printed"
        first.sections.append((heading, culprit.output() or "(nothing)"))
    elif busy:
        when = min((rank.phase() for rank in busy), key=PHASES.index)
        numbers = ", ".join(str(rank.number) for rank in busy)
        text = f"deadline of {_wanted(item)[1]:g} s: rank {numbers} of {len(ranks)} not finished"
        first = _report(item, when, "failed", text)
    elif 0 < len(skipped) < len(ranks):
        words = [f"rank {r.number} {'skipped' if r in skipped else 'passed'}" for r in ranks]
        first = _report(item, "call", "failed", f"the ranks disagree: {', '.join(words)}")
    if first:
        for report, rank in failed[1:]:
            heading = f"rank {rank.number} failed {report.stop - first.stop:.2f} s later"
            end = "\n".join(report.longreprtext.splitlines()[-PEER_TAIL_LINES:])
            first.sections.append((f"{heading}, in {report.when}", end))
        for rank in busy:
            first.sections.append((f"rank {rank.number} stood in {rank.phase()}", rank.stack()))
        for rank in ranks:
            if rank is not culprit and (output := rank.output()):
                first.sections.append((f"rank {rank.number} printed", output))
    reports = []
    for index, when in enumerate(PHASES):
        if first and when == first.when:
            reports.append(first)
        elif not first or index < PHASES.index(first.when):
            said = [r for rank in ranks for r in rank.reports if r.when == when]
            reports.extend(sorted(said, key=lambda report: report.duration)[-1:])
        elif when == "teardown":
            reports.append(_report(item, when, "passed", None))
    return reports


class Dispatcher:
    """The plugin of the pytest process: hands marked items to a group, logs what comes back."""

    def __init__(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", MARKER)
        self.config = config
        self.group: RankGroup | None = None
        self.broken: dict[int, str] = {}  # world sizes that could not start, and why
        self.num_run = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Bring tests of one world size together; otherwise keep the order."""
        items.sort(key=lambda item: _wanted(item)[0])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> object:
        if not _wanted(item)[0]:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        if skip := evaluate_skip_marks(item):  # before a group is started for nothing
            place = (str(item.path), (item.location[1] or 0) + 1, skip.reason)
            reports = [_report(item, "setup", "skipped", place)]
        else:
            reports = self._run(item, nextitem)
        try:
            # What the test before, in this process, kept open for a neighbour.
            item.session._setupstate.teardown_exact(nextitem)
        except Exception as error:
            reports.append(_report(item, "teardown", "failed", f"of an earlier test: {error!r}"))
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        """Return the reports of ``item``, run on a group that is started if need be."""
        world_size, limit = _wanted(item)
        started = time.monotonic()
        try:
            if problem := self._prepare(item.session, world_size):
                return [_report(item, "setup", "failed", problem)]
            starting_seconds = time.monotonic() - started
            self.num_run += 1
            tmp_path = self.group.folder / f"test{self.num_run}"
            tmp_path.mkdir()
            # A rank keeps wide fixtures for its own next test only.
            same = nextitem is not None and _wanted(nextitem)[0] == world_size
            self.group.run(item, nextitem.nodeid if same else None, tmp_path, limit)
        except BaseException:
            self.pytest_unconfigure()
            raise
        reports = _verdict(item, self.group.ranks)
        reports[0].duration += starting_seconds
        if any(report.failed or _xfailed(report) for report in reports):
            self.pytest_unconfigure()
        else:
            shutil.rmtree(tmp_path, ignore_errors=True)
        return reports

    def _prepare(self, session: pytest.Session, world_size: int) -> str:
        """Make the group alive one of ``world_size``; return "" or why that is not possible."""
        if self.group and len(self.group.ranks) == world_size:
            return ""
        self.pytest_unconfigure()
        if world_size not in self.broken:
            items = [item for item in session.items if _wanted(item)[0] == world_size]
            files = list(dict.fromkeys(item.path for item in items))
            self.group = RankGroup(self.config, world_size, files)
            if problem := self.group.start():
                self.group, self.broken[world_size] = None, problem
        return self.broken.get(world_size, "")

    def pytest_unconfigure(self) -> None:
        """Kill the group, if there is one; the next test that needs one gets a fresh one."""
        if self.group:
            self.group.kill()
            self.group = None


# ------------------------------------------------------------------ in a rank


def _settings() -> list[tuple[Callable[[], object], Callable[[object], object]]]:
    """Return the getter and setter of each process-wide setting that a test may change."""
    import torch

    return [
        *((partial(signal.getsignal, n), partial(signal.signal, n)) for n in HANDLED_SIGNALS),
        (Path.cwd, os.chdir),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, lambda _: torch.set_default_device(None)),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_num_threads, torch.set_num_threads),
    ]


def _remember() -> Callable[[], list[str]]:
    """Return a function that puts this process back as it is now and returns what was leaked."""
    environment, threads = dict(os.environ), set(threading.enumerate())
    settings = [(get, put, get()) for get, put in _settings()]

    def restore() -> list[str]:
        gc.collect()  # engines and executors end their threads when they are freed
        gc.freeze()  # what is left (late imports) would be looked through at each engine's end
        changed = sorted({name for name, _ in environment.items() ^ os.environ.items()})
        leaks = [
            f"environment: {name} was {environment.get(name)!r}, is {os.environ.get(name)!r}"
            for name in changed
            if not name.startswith(ALLOWED_ENVIRONMENT)
        ]
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(environment)
        for get, put, value in settings:
            if get() != value:  # some setters import half of torch
                put(value)
        if transformers := sys.modules.get("transformers.integrations.deepspeed"):
            transformers.unset_hf_deepspeed_config()
        deadline = time.monotonic() + LEAVE_SECONDS
        while left := [
            thread
            for thread in threading.enumerate()
            if thread not in threads and not thread.name.startswith(ALLOWED_THREADS)
        ]:
            if time.monotonic() > deadline:
                return leaks + [f"thread: {thread.name} is still alive" for thread in left]
            time.sleep(0.01)
        return leaks

    return restore


class Worker:
    """The plugin of a rank's pytest session: runs items when told, reports each phase."""

    __name__ = "ranks"  # pytest registers it by this name

    def __init__(self, connection: Connection, options: dict[str, object]) -> None:
        self.connection, self.options = connection, options

    @pytest.fixture
    def rank(self) -> int:
        return int(os.environ["RANK"])

    @pytest.fixture
    def world_size(self) -> int:
        return int(os.environ["WORLD_SIZE"])

    @pytest.fixture
    def tmp_path(self) -> Path:
        return self.folder

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", MARKER)
        vars(config.option).update(self.options)
        self.config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Join the group, then run what is asked for until the pytest process goes away."""
        import deepspeed

        timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
        deepspeed.init_distributed("gloo", timeout=timeout)
        items = {item.nodeid: item for item in session.items}
        gc.freeze()  # what is imported stays, and need not be looked through after each test
        complaint = ""
        while True:
            self.connection.send(("answer", complaint))
            try:
                request = self.connection.recv()
            except EOFError:
                return True
            complaint = self._meet() if request is None else self._run(items, *request)

    def _meet(self) -> str:
        import torch.distributed as dist

        try:
            dist.barrier()
        except Exception as error:
            return f"the ranks did not meet after the test: {error}"
        return ""

    def _run(
        self, items: dict[str, pytest.Item], nodeid: str, following: str | None, folder: Path
    ) -> str:
        if nodeid not in items:
            return f"this rank has not collected {nodeid}"
        self.folder = folder
        hook = self.config.hook.pytest_runtest_protocol
        hook(item=items[nodeid], nextitem=items.get(following))
        return ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        """Begin every test in the same state, whichever ran before."""
        import numpy
        import torch

        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(0)
        self.restore = _remember()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        """Put things back after the fixtures' end, and refuse leaks."""
        try:
            result = yield
        finally:
            leaks = self.restore()
        if leaks:
            pytest.fail("left behind by this test:\n" + "\n".join(leaks), pytrace=False)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send each phase's report at once: the time of the first failure matters."""
        dump = self.config.hook.pytest_report_to_serializable
        self.connection.send(("report", dump(config=self.config, report=report)))


def work(connection: Connection) -> None:
    """Be one rank."""
    parent, home, pytest_arguments, options = connection.recv()
    # The connection's end tells an idle rank that pytest is gone; a busy one needs the signal.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.set_inheritable(connection.fileno(), False)
    faulthandler.enable()
    with (home / "stacks").open("w") as stacks:
        faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)
        code = pytest.main(pytest_arguments, plugins=[Worker(connection, options)])
    os._exit(code)  # without the exit handlers of torch, which may wait for peers


if __name__ == "__main__":
    # Not this module's `work`: pytest imports the file again, under its own name.
    from tests.ranks import work as work_of_the_named_module

    work_of_the_named_module(Connection(int(sys.argv[1])))
