"""Methods of a ``Trainer`` about signals to stop: in a training, and in a search of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstrain.core.launcher import note_ending
from dstrain.core.log import get_logger
from dstrain.core.ranks import barrier
from dstrain.core.stop import Preempted
from dstrain.trainer.evaluation_hooks import EvaluationHooks
from dstrain.training.preemption import EvaluationStopped, Preemption

if TYPE_CHECKING:
    from dstrain.search.trials import SearchStopped

logger = get_logger(__name__)


class SignalHooks(EvaluationHooks):
    """Ends trainings and searches on all ranks where one of them was sent a signal.

    Attributes:
        hp_search_backend: name of the backend while a search runs, else None.
    """

    hp_search_backend: str | None = None
    _search_watch: Preemption | None = None  # of the search that runs
    _trials_done: int = 0  # trials of the search that have their objective
    _has_saved_for_signal: bool = False  # whether the last preempted training can go on later

    def _watch_signals(self) -> Preemption:
        """Make the watch of a training, or of an evaluation between two of a search."""
        self._preemption = Preemption(
            self.ranks, watches=self.args.preemption != "ignore", within=self._search_watch
        )
        return self._preemption

    def _preempted_exit(self, watch: Preemption) -> Preempted | None:
        """Return the exit to raise after a training; None where ``train`` is to return.

        Args:
            watch: of the training.
        """
        searches = self.hp_search_backend is not None  # which then ends, with the exit to raise
        if not self.preempted or searches or self.args.preemption != "exit":
            return None
        if self._has_saved_for_signal:
            return Preempted(f"{watch.cause}: training has ended early and is saved")
        return Preempted(
            f"{watch.cause}: training has ended before its first step, and nothing is saved",
            unsaved=watch.number,
        )

    # --- searches ---------------------------------------------------------------------------------

    def _begin_trial(self) -> None:
        """Begin no trial where a rank was sent a signal since the last one; a collective.

        Raises:
            SearchStopped: on all ranks.
        """
        if self._search_watch is not None and self._search_watch.agree():
            raise self._search_stopped(self._search_watch, "between two trials")

    def _check_not_cut(self) -> None:
        """Check that no signal ended the training of a trial, which then has no result.

        Raises:
            SearchStopped: on all ranks.
        """
        if self.preempted:
            assert self._preemption is not None
            raise self._search_stopped(self._preemption, f"in trial {self.state.trial_name}")

    def _evaluate_trial(self) -> dict[str, float]:
        """Evaluate after the training of a trial.

        Raises:
            SearchStopped: a signal ended it, between the same two batches of all ranks.
        """
        watch = self._watch_signals()
        with watch.watching():
            try:
                with watch.evaluating():
                    return self.evaluate()
            except EvaluationStopped:
                where = f"in the evaluation of trial {self.state.trial_name}"
                raise self._search_stopped(watch, where) from None

    def _end_trial(self) -> None:
        """Count a trial that has its objective; look for signals since; a collective."""
        self._trials_done += 1
        if self._search_watch is not None:
            self._search_watch.agree()

    def _search_is_over(self) -> bool:
        """Tell whether a signal asks to begin no further trial; the same on all ranks."""
        return self._search_watch is not None and bool(self._search_watch.cause)

    def _end_search(self, watch: Preemption) -> Preempted | None:
        """Note whether a signal ended a search; a collective of all ranks.

        Args:
            watch: of the search.

        Returns:
            the exit to raise; None where ``hyperparameter_search`` is to return.
        """
        self.preempted = watch.acted = watch.agree()
        if not self.preempted:
            return None
        done = self._trials_done
        text = f"{watch.cause}: the search has ended early, with {done} of its trials complete"
        if self.ranks.is_main:
            logger.warning("%s", text)
        if self.args.preemption != "exit":
            return None
        barrier()  # the launcher ends all ranks once one has ended
        has_saved = done > 0 or self._has_saved_for_signal
        end = Preempted(text, unsaved=0 if has_saved else watch.number)
        note_ending(end.status)
        return end

    def _search_stopped(self, watch: Preemption, where: str) -> SearchStopped:
        """Note, with the search, a signal that all ranks know of; return what ends the trial."""
        from dstrain.search.trials import SearchStopped

        if self._search_watch is not None:
            self._search_watch.cause, self._search_watch.number = watch.cause, watch.number
        return SearchStopped(f"{watch.cause} {where}")
