"""Ending a run early on all ranks at the same step, because a rank was sent a signal.

A rank that was sent a signal cannot stop by itself, as the others would wait for it. So the ranks
exchange a few numbers on the host about once a second, on a group of their own, while the
optimizer steps: no device is waited for, and all ranks read the same answer after the same step.
During an evaluation they do so between its batches, of which all ranks have as many.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from dstrain.core.launcher import is_launched
from dstrain.core.log import get_logger
from dstrain.core.ranks import PATIENCE, Ranks, gather_failures, is_distributed

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# A save may take most of the 30 seconds that launchers and schedulers leave.
_EXCHANGE_SECONDS = 1.0
_MOST_STEPS = 1000


class EvaluationStopped(BaseException):
    """Raised on all ranks between the same two batches of an evaluation, for the loop to catch.

    Like ``KeyboardInterrupt`` it is no ``Exception``: code of users that evaluates may go on after
    a failure, and this is none.
    """


class Preemption:
    """Knows whether any rank was sent a signal; ``ask``, ``answer``, ``agree`` are collectives.

    Attributes:
        cause: the signal and its rank, in words, once all ranks know of it.
        number: the signal, once all ranks know of it; 0 before.
        acted: whether the run was ended for it; a signal that came too late for that is delivered
            again when the watch ends.
    """

    def __init__(self, ranks: Ranks, *, watches: bool, within: Preemption | None = None) -> None:
        """Watch nothing yet.

        Args:
            ranks: rank and world size of this process.
            watches: whether signals are handled; without it ranks exchange nothing.
            within: the watch of the search that this training is a trial of. It handles the
                signals; those that it caught before this one began count, too.
        """
        self.cause = ""
        self.number = 0
        self.acted = False
        self._ranks, self._watches, self._within = ranks, watches, within
        self._caught = 0
        self._group: Any = None
        self._message: torch.Tensor | None = None
        self._work: Any = None
        self._steps_left = self._steps = 1
        self._asked_at = 0.0
        self._evaluating = False

    @contextlib.contextmanager
    def watching(self, *, asks: bool = True) -> Iterator[None]:
        """Handle the signals inside the block; a collective of all ranks.

        Only a process's main thread can; a run in another one hears of the other ranks' signals.

        Args:
            asks: whether ``ask`` will be called, for which ranks need a process group; ``agree``
                needs none.
        """
        if not self._watches:
            yield
            return
        with contextlib.ExitStack() as stack:
            if asks and is_distributed():
                self._group = self._new_group()
                stack.push(self._leave_group)
            before = self._take_over()
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        if self._caught and not self.acted:
            signal.raise_signal(self._caught)

    def renew(self) -> None:
        """Use a new process group, where all of them were formed anew; a collective."""
        self._work = self._message = None
        self._steps_left = self._steps = 1
        if self._group is not None:
            self._group = self._new_group()

    def ask(self, *, now: bool = False) -> None:
        """Begin to find out whether to stop after this step, if it is time to.

        Args:
            now: it is time.
        """
        self._steps_left -= 1
        if self._group is None or (self._steps_left > 0 and not now):
            return
        import torch.distributed as dist

        present = time.perf_counter()
        seconds = (present - self._asked_at) / self._steps
        self._asked_at = present
        steps = min(_MOST_STEPS, max(1, int(_EXCHANGE_SECONDS / max(seconds, 1e-9))))
        # The largest of each number: a signal, who was sent it, and the fewest steps to the next.
        caught = self._signal()
        rank = self._ranks.rank if caught else -1
        self._message = torch.tensor([caught, rank, -steps], device="cpu")
        self._work = dist.all_reduce(
            self._message, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def answer(self) -> bool:
        """Tell whether any rank was sent a signal before it last asked; the same on all ranks."""
        number = rank = 0
        if self._work is not None:
            assert self._message is not None
            self._work.wait()
            number, rank, steps = self._message.tolist()
            self._work = self._message = None
            self._steps_left = self._steps = -steps
        elif self._group is None:
            number, rank = self._signal(), self._ranks.rank
        self._note(number, rank)
        return bool(self.cause)

    def agree(self) -> bool:
        """Tell whether any rank was sent a signal until now; the same on all ranks.

        Ranks wait for each other, in the default process group: for places between two trainings.
        """
        if self._watches and not self.cause:
            caught = self._signal()
            found = gather_failures((caught, self._ranks.rank) if caught else None)
            self._note(*(found[0] if found else (0, 0)))
        return bool(self.cause)

    def _note(self, number: int, rank: int) -> None:
        """Keep what all ranks know: the signal (0 for none), and the rank that was sent it."""
        if number:
            self.number = number
            self.cause = f"rank {rank} was sent {signal.Signals(number).name}"

    def _signal(self) -> int:
        """Return the signal that this rank was sent, or 0."""
        return self._caught or (0 if self._within is None else self._within._caught)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let ``heed`` end the evaluation inside the block; entered by all ranks.

        Raises:
            EvaluationStopped: a signal is known of already, or ``heed`` raised it.
        """
        if self.answer():
            raise EvaluationStopped
        self._pace_anew()
        self._evaluating = True
        try:
            yield
            if not self._evaluating:  # the user's code caught it
                raise EvaluationStopped
        finally:
            self._evaluating = False
        self.answer()
        self._pace_anew()

    def heed(self, *, may_ask: bool) -> None:
        """End the evaluation, between two batches, where a rank was sent a signal.

        Args:
            may_ask: whether a rank that fails from here on would fail all in the next exchange of
                predictions, and not leave them waiting in ours; the same on all ranks.

        Raises:
            EvaluationStopped: on all ranks.
        """
        if not self._evaluating:
            return
        if self.answer():
            self._evaluating = False
            raise EvaluationStopped
        if may_ask:
            self.ask()

    def _pace_anew(self) -> None:
        """Measure anew how often to ask: a batch of an evaluation and a step differ in length."""
        self._steps_left = self._steps = 1
        self._asked_at = time.perf_counter()

    def _take_over(self) -> dict[int, Any]:
        """Set our handler; what was set before, by signal."""
        before: dict[int, Any] = {}
        if self._within is not None or threading.current_thread() is not threading.main_thread():
            return before
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if not _is_to_stop(number, previous):
                continue
            if previous is None:  # set by C code, to which Python could not give it back
                logger.warning("%s is not watched: a library handles it", number.name)
                continue
            own = callable(previous) and previous is not signal.default_int_handler
            if own and self._ranks.is_main:
                logger.warning("the handler of %s is set aside during training", number.name)
            before[number] = signal.signal(number, self._catch)
        return before

    def _catch(self, number: int, _: object) -> None:
        """Handle a signal: launchers send several, of which the first counts.

        Raises:
            KeyboardInterrupt: Ctrl-C a second time: whoever typed it does not want to wait.
        """
        if number == self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught = self._caught or number

    def _new_group(self) -> Any:
        """Make a group with a long timeout: a metric of one batch may take longer than any step."""
        import torch.distributed as dist

        return dist.new_group(backend="gloo", timeout=PATIENCE)

    def _leave_group(self, kind: type[BaseException] | None, *_: object) -> None:
        """Destroy the group, unless an error may be that of a rank which does not come.

        gloo would wait for that rank, which an exchange that has begun still needs.

        Args:
            kind: of the error that ends the training, or None.
            *_: the error and its traceback.
        """
        import torch.distributed as dist

        if kind is None or self._work is None or self._work.is_completed():
            dist.destroy_process_group(self._group)
        self._group = None


def _is_to_stop(number: signal.Signals, previous: object) -> bool:
    """Tell whether a signal asks to stop early and go on later.

    A terminal that goes away sends SIGHUP, unless nohup has it ignored. Ctrl-C stops a process
    that was started by itself, a notebook's too, where it is; under a launcher it reaches all
    ranks, each in another line, from which nothing could be saved.
    """
    if number == signal.SIGHUP:
        return previous == signal.SIG_DFL
    if number == signal.SIGINT:
        return is_launched() and previous is signal.default_int_handler
    return True
