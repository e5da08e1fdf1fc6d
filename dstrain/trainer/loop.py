"""The training loop: windows of micro-batches in, optimizer steps out, no waiting between."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dstrain.core.errors import DataError, Problem, TrainingError
from dstrain.core.log import get_logger
from dstrain.core.progress import Progress
from dstrain.core.ranks import HostSum, Ranks, gather_objects
from dstrain.core.seeds import random_state
from dstrain.data import (
    AheadHooks,
    LossTargets,
    MicroBatch,
    TokenCount,
    Window,
    empty_columns,
    fetches_ahead,
    is_ours,
    keep_source_states,
    no_targets,
    num_shares,
    set_epoch,
    source_state,
    windows,
)
from dstrain.engine import Engine, StepOutcome, device_name, empty_cache
from dstrain.trainer.cache import KeyValueCache
from dstrain.trainer.meters import Reading, TrainMeter
from dstrain.trainer.plan import Hooks, MicroStep, RunPlan
from dstrain.trainer.position import Due, Position, Resumption
from dstrain.trainer.preemption import EvaluationStopped, Preemption
from dstrain.trainer.stall import Place
from dstrain.trainer.window_weights import WindowWeights, telling_first

logger = get_logger(__name__)

_MOST_EMPTY = 3
"""Global batches without a target with which a run may begin."""


@dataclass
class TrainLoop:
    """One run. ``run`` is the loop; everything else is a step of it.

    ``agree`` is called when all micro-batches of a step are done, before it changes a weight;
    ``computing`` is true until then, from the step's first micro-batch. ``own_samples`` are those
    that this rank has trained on in this run, whichever loader they came from.
    """

    plan: RunPlan
    engine: Engine
    loader: Any
    targets: LossTargets
    ranks: Ranks
    hooks: Hooks
    state: Any
    control: Any
    micro_step: MicroStep
    preemption: Preemption
    cache: KeyValueCache
    count_tokens: TokenCount = field(default_factory=TokenCount)
    progress: Progress = field(default_factory=Progress)
    skipped_steps: int = 0
    loss_sum: float = 0.0
    samples_seen: int = 0
    own_samples: int = 0
    resumption: Resumption | None = None
    steps_before: int = 0
    tokens_before: int = 0
    agree: Callable[[], None] | None = None
    computing: bool = False
    preempted: bool = False
    place: Place = field(default_factory=Place)
    _host_sum: HostSum = field(default_factory=HostSum)
    _saved_step: int = -1
    _ended_at: Progress | None = None  # before the count of epochs went on to the next one
    _last: tuple[StepOutcome, float] | None = None
    _random_ahead: dict[str, Any] | None = None
    _has_seen_targets: bool = False
    _can_be_saved: bool = False  # the state of the optimizer, once it has some
    _is_cut: bool = False  # whether the run ends inside of its last epoch, which may go on later
    _steps_without_targets: int = 0

    def run(self) -> None:
        """Train until max_steps or until a callback stops the run."""
        self._meter = TrainMeter(device_name(), filter_bad=self.plan.filter_bad)
        self.engine.model.train()
        if self.resumption is not None:
            self._take_up(self.resumption.position)
        self.hooks.event("on_train_begin")
        self.preemption.ask(now=True)  # a signal that came while the engine was built
        self.preempted = self.preemption.acted = self.preemption.answer()
        if self.preempted:
            return
        if self.plan.eval_on_start and self.resumption is None:
            if not self._evaluate():
                self._note_preempted()  # a run that begins anew evaluates first of all, too
        elif self.resumption is not None:
            self._finish_resumed_point(self.resumption)
        self._run_epochs()

    def change(self, engine: Engine, loader: Any, *, accumulation: int) -> None:
        """Let another engine do again the step that broke off, with other micro-batches."""
        self.engine, self.loader = engine, loader
        self._host_sum = HostSum()  # the groups of before are gone
        self.plan = replace(self.plan, accumulation=accumulation)

    def go_on(self) -> None:
        """Go on with ``run`` inside an epoch, after ``change``."""
        self.engine.model.train()
        self._run_epochs(inside=True)

    def _run_epochs(self, *, inside: bool = False) -> None:
        while not self._is_over():
            self._run_epoch(begins=not inside)
            if self.preempted:
                break
            self._ended_at, self.progress = self.progress, self.progress.next_epoch()
            inside = False
        self._host_sum.close()
        self.hooks.store_flos()
        self._note(self._meter.read())
        if not self.preempted:
            self._heed_last_signal()

    def _is_over(self) -> bool:
        return self._has_done_all() or self.control.should_training_stop

    def _has_done_all(self) -> bool:
        """Tell whether all steps and epochs that were asked for are done."""
        epochs = self.plan.num_epochs
        over = epochs is not None and self.progress.epoch >= epochs
        return over or self.progress.step >= self.plan.max_steps

    def _take_up(self, position: Position) -> None:
        """Go on from a checkpoint's position."""
        self.progress = position.progress
        self.skipped_steps = position.skipped_steps
        self.loss_sum = position.loss_sum
        self.samples_seen = position.samples_seen
        self.steps_before = position.progress.step
        self.tokens_before = self.state.num_input_tokens_seen
        self._last = (
            StepOutcome(applied=position.applied, grad_norm=position.grad_norm),
            position.learning_rate,
        )
        if position.loss is not None:
            self.targets.take_up(position.loss, self.ranks)
        self._meter.restore(position.meters, rank=self.ranks.rank, world_size=self.ranks.world_size)

    def _finish_resumed_point(self, resumption: Resumption) -> None:
        """Do what was still to be done between two steps when the checkpoint was saved."""
        position, due = resumption.position, resumption.position.due
        ends_epoch = position.epoch_is_over
        self.control.should_training_stop |= position.stopped
        if due is not None:
            assert self._last is not None
            resumption.restore_random()
            self._random_ahead = resumption.random_ahead
            due.give_to(self.control)
            at_end = due.event == "on_epoch_end"  # of which nothing is left after this
            over = ends_epoch and not at_end
            self._evaluate_and_save(due.event, *self._last, epoch_is_over=over)
            if self.preempted:
                return
            if at_end and ends_epoch:
                self.resumption = None
                self.progress = self.progress.next_epoch()
            if at_end:
                return
            ends_epoch |= self.control.should_epoch_stop
            self._is_cut = self._is_over() and not ends_epoch
        if ends_epoch or self._is_cut:
            self._end_resumed_epoch()

    def _end_resumed_epoch(self) -> None:
        """Do what was still to be done when the checkpoint was saved at an epoch's last step."""
        assert self._last is not None and self.resumption is not None  # noqa: PT018
        self.resumption.restore_random()
        if not self._is_cut:
            self.resumption = None
        self._react("on_epoch_end", *self._last, epoch_is_over=False)
        if not self.preempted:
            self.progress = self.progress.next_epoch()

    def _run_epoch(self, *, begins: bool = True) -> None:
        source = None if self.resumption is None else self.resumption.position.source
        start = self.progress.samples_in_epoch
        if self.plan.saves:
            keep_source_states(self.loader)
        set_epoch(self.loader, self.progress.epoch, start=start, source=source)
        if begins:
            self.hooks.event("on_epoch_begin")
        before = self.progress
        for window in self._windows():
            self._last = self._train_step(window)
            self._react("on_step_end", *self._last, epoch_is_over=window.ends_epoch)
            if self.preempted:
                return
            if self.preemption.answer() and not self._is_over():
                self._end_early(epoch_is_over=window.ends_epoch)
                return
            if self._is_over() or self.control.should_epoch_stop:
                self._is_cut = not (window.ends_epoch or self.control.should_epoch_stop)
                break
        if self.progress.step == before.step and not before.steps_in_epoch:
            raise _no_sample(self.progress.epoch)
        assert self._last is not None
        self._react("on_epoch_end", *self._last, epoch_is_over=False)

    def _windows(self) -> Iterator[Window]:
        """Yield the windows of an epoch; in a resumed run, those that are left of the first one."""
        resumption, self._random_ahead = self.resumption, None
        self.resumption = None  # it is for the first epoch only
        if not fetches_ahead(self.loader):
            if resumption is not None:
                resumption.restore_random()
            return windows(self.loader, self.plan.accumulation)
        hooks = AheadHooks(before=self._note_random if self.plan.saves else None)
        skip = 0
        if resumption is not None:
            if resumption.random_ahead is None:
                resumption.restore_random()
            else:
                hooks.before_first = resumption.restore_random_ahead
                hooks.after_first = resumption.restore_random
            if not is_ours(self.loader):
                skip = self.progress.steps_in_epoch * self.plan.accumulation
                self._warn_of_replay(skip)
        return windows(self.loader, self.plan.accumulation, skip=skip, ahead=hooks)

    def _note_random(self) -> None:
        self._random_ahead = random_state()

    def _warn_of_replay(self, num_micro_batches: int) -> None:
        if num_micro_batches and self.ranks.is_main:
            logger.warning(
                "%d micro-batches are read and dropped: only loaders that dstrain builds can start "
                "inside an epoch",
                num_micro_batches,
            )

    def _train_step(self, window: Window) -> tuple[StepOutcome, float]:
        """Take one optimizer step over a window of micro-batches."""
        self.place.enter("before its first micro-batch", in_step=True)
        self.hooks.event("on_step_begin")
        micro_batches = telling_first(window.micro_batches, self.targets)
        step = self.progress.step
        looks_again = self.targets.looks_again_at(step, is_first=step == self.steps_before)
        self.micro_step.looks_again = looks_again
        self.micro_step.weights = weights = WindowWeights(
            self.targets,
            micro_batches,
            self.ranks,
            device=device_name(),
            host_sum=self._host_sum,
            looks_again=looks_again,
        )
        losses: list[torch.Tensor] = []
        tokens = 0
        empty: frozenset[str] = frozenset()
        self.computing = True
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            self.place.enter(f"micro-batch {index + 1}", in_step=True)
            loss = self._forward_backward(micro_batch, index, last=last)
            losses.append(loss.detach().clone())  # a CUDA graph writes the next into its place
            if not micro_batch.masked:
                tokens += self.count_tokens(micro_batch.inputs)
                empty |= empty_columns(micro_batch.inputs)
            if not last:
                self.hooks.event("on_substep_end")
        self.micro_step.weights, self.micro_step.looks_again = None, False
        if not self._has_seen_targets:
            self._look_for_targets(window, weights)
        if self.agree is not None:
            self.agree()
        self.computing = False
        learning_rate = self.engine.learning_rates()[0]
        wants_norm = self._logs_after(window)
        self.engine.clip(want_norm=wants_norm)
        self.hooks.event("on_pre_optimizer_step")
        self.preemption.ask()
        self.place.enter("the optimizer's step", in_step=True)
        outcome = self.engine.step(want_norm=wants_norm)
        self.hooks.event("on_optimizer_step")
        self.progress = self.progress.advance(samples=window.num_samples, tokens=tokens)
        self.samples_seen += window.num_samples
        self.own_samples += sum(m.num_samples for m in window.micro_batches)
        self._meter.add(
            losses,
            weights.counts,
            weights.totals,
            step=self.progress.step,
            num_tokens=tokens,
            empty=empty,
        )
        if not outcome.applied:
            self._note_skipped(empty)
        elif self.plan.saves and not self._can_be_saved:
            self.hooks.check_state()
            self._can_be_saved = True
        if self.plan.empty_cache_steps and self.progress.step % self.plan.empty_cache_steps == 0:
            empty_cache()
        self.state.global_step = self.progress.step
        self.state.epoch = self._epoch_position(window)
        return outcome, learning_rate

    def _note_skipped(self, empty: frozenset[str]) -> None:
        """Count a step that changed nothing, as fp16 takes to find its loss scale."""
        self.skipped_steps += 1
        what = f"step {self.progress.step} skipped: its gradients were not finite"
        if self.engine.loss_scale() is None:
            if self.plan.nan_loss == "stop":
                self._note(self._meter.read())  # a loss that was no number says more
            why = "no loss scale will be lowered: the next steps may be no better"
            names = {name for of_rank in gather_objects(empty) for name in of_rank}
            self._bad_number(what, why, tuple(sorted(names)))
        elif self.ranks.is_main:
            logger.warning("%s", what)

    def _forward_backward(self, micro_batch: MicroBatch, index: int, *, last: bool) -> torch.Tensor:
        """Run one micro-batch; return its mean loss, or its parts where the loss has several."""
        step, inputs = self.micro_step, micro_batch.inputs
        assert step.weights is not None
        counts = step.weights.expected(index)
        if not any(counts):
            inputs = self.targets.without_ignored(inputs)
        step.index, step.last, step.parts = index, last, None
        step.num_samples, step.inputs = micro_batch.num_samples, inputs
        told = self.targets.told(inputs, micro_batch.num_samples, counts=counts)
        changes = self.engine.changes
        watch = contextlib.nullcontext() if changes is None else changes.in_training_step()
        with self.cache.as_asked(), watch:
            loss = self.hooks.training_step(self.engine.model, inputs, told)
        step.inputs = None
        if not micro_batch.masked:
            self.hooks.count_flos(inputs)
        return loss if step.parts is None else step.parts

    def _look_for_targets(self, window: Window, weights: WindowWeights) -> None:
        """Stop a run whose first global batches have no target: nothing would be learned.

        Waits for the device, in each step until there is a target: in a sound run the first alone.

        Raises:
            DataError: on all ranks alike.
        """
        totals = weights.totals
        found = bool(totals.sum()) if isinstance(totals, torch.Tensor) else bool(totals)
        self._has_seen_targets = found
        self._steps_without_targets += 1
        step = self.progress.step + 1
        if not found and (
            self._steps_without_targets >= _MOST_EMPTY or step >= self.plan.max_steps
        ):
            raise no_targets(
                window.micro_batches[0].inputs, self.targets, num_steps=self._steps_without_targets
            )

    def _react(
        self, event: str, outcome: StepOutcome, learning_rate: float, *, epoch_is_over: bool
    ) -> None:
        """Let callbacks decide at this point of the run, then do what they decided.

        Evaluation comes before saving, so that a checkpoint knows its own metric.
        """
        self.place.enter(f"in callbacks and logging ({event})")
        self.control = self.hooks.event(event)
        if self.control.should_log:
            self._log(outcome, learning_rate)
        self._evaluate_and_save(event, outcome, learning_rate, epoch_is_over=epoch_is_over)
        self.place.enter("reading the next batch")

    def _evaluate_and_save(
        self, event: str, outcome: StepOutcome, learning_rate: float, *, epoch_is_over: bool
    ) -> None:
        """Evaluate and save as callbacks decided; a signal in the evaluation ends the run."""
        if self.control.should_evaluate:
            due = Due.of(event, self.control)
            if not self._evaluate():
                self._end_in_evaluation(due, epoch_is_over=epoch_is_over)
                return
        if self.control.should_save:
            self._save(event, outcome, learning_rate, epoch_is_over=epoch_is_over)

    def _save(
        self,
        event: str,
        outcome: StepOutcome,
        learning_rate: float,
        *,
        epoch_is_over: bool,
        due: Due | None = None,
        stopped: bool = False,
    ) -> None:
        """Save a checkpoint, which is no training time."""
        started = time.perf_counter()
        self.place.enter("saving a checkpoint")
        self.hooks.store_flos()
        ended = event == "on_epoch_end" and due is None and not self._is_cut
        norm = outcome.grad_norm
        position = Position(
            progress=self.progress.next_epoch() if ended else self.progress,
            epoch_is_over=epoch_is_over or (self.control.should_epoch_stop and not ended),
            applied=outcome.applied,
            grad_norm=None if norm is None else float(norm),
            learning_rate=learning_rate,
            skipped_steps=self.skipped_steps,
            loss_sum=self.loss_sum,
            samples_seen=self.samples_seen,
            meters=gather_objects(self._meter.state()),
            random_ahead=None if ended or epoch_is_over else self._random_ahead,
            source=None if ended or epoch_is_over else self._source(),
            shares=num_shares(self.loader),
            due=due,
            loss=self.targets.findings(),
            stopped=stopped,
        )
        self.hooks.save_in_training(position)
        self._saved_step = self.progress.step
        self._meter.exclude(time.perf_counter() - started)

    def _source(self) -> dict[str, Any] | None:
        """Return the state of the stream behind the loader; the saved one until it is read."""
        if self.resumption is not None:
            return self.resumption.position.source
        return source_state(self.loader, self.progress.samples_in_epoch)

    def _note_preempted(self) -> None:
        self.preempted = self.preemption.acted = self.control.should_training_stop = True

    def _end_in_evaluation(self, due: Due, *, epoch_is_over: bool) -> None:
        """Save, so that the run goes on with the evaluation that the signal ended.

        A checkpoint of this step was saved before that, if at all, at the step's end; going on from
        it does what the epoch's end asks for. One that the run itself came from is there already.
        """
        step = self.progress.step
        if self.ranks.is_main:
            cause = self.preemption.cause
            logger.warning("%s: training ends in the evaluation after step %d", cause, step)
        due.give_to(self.control)
        if step not in (self._saved_step, self.steps_before):
            assert self._last is not None
            over = epoch_is_over or (due.event == "on_epoch_end" and not self._is_cut)
            self._save(due.event, *self._last, epoch_is_over=over, due=due)
        self._note_preempted()

    def _end_early(self, *, epoch_is_over: bool) -> None:
        """Save, where this step has not been saved yet, so that the run can go on from here.

        The epoch's end, if this is it, is left to the run that goes on.
        """
        if self.ranks.is_main:
            step = self.progress.step
            logger.warning("%s: training ends after step %d", self.preemption.cause, step)
        self._note_preempted()
        if self._saved_step != self.progress.step:
            assert self._last is not None
            self._save("on_step_end", *self._last, epoch_is_over=epoch_is_over)

    def _heed_last_signal(self) -> None:
        """Save and end early where a signal came in the last step, evaluation or save.

        A run that goes on from there has no step left: it finishes what comes after the loop, and
        then does what its script does with the trained model.
        """
        self.preemption.ask(now=True)
        if not self.preemption.answer():
            return
        step = self.progress.step
        if self.ranks.is_main:
            cause = self.preemption.cause
            logger.warning("%s: training ends after step %d, the last one", cause, step)
        if step not in (self._saved_step, self.steps_before):
            assert self._last is not None and self._ended_at is not None  # noqa: PT018
            stopped = not self._has_done_all()
            self.progress, after = self._ended_at, self.progress
            self._save("on_epoch_end", *self._last, epoch_is_over=False, stopped=stopped)
            self.progress = after
        self._note_preempted()

    def _evaluate(self) -> bool:
        """Evaluate, outside of training time; return False where a signal ended it."""
        started, done = time.perf_counter(), True
        self.place.enter("an evaluation")
        try:
            self.control = self.hooks.evaluate_in_training()
        except EvaluationStopped:
            done = False
        self.engine.model.train()
        self._meter.exclude(time.perf_counter() - started)
        return done

    def _log(self, outcome: StepOutcome, learning_rate: float) -> None:
        """Read the meter (the one wait for the device) and report."""
        reading = self._meter.read()
        if reading.num_steps == 0:
            return
        self.hooks.store_flos()
        self._note(reading)
        logs: dict[str, float] = {"loss": reading.loss}
        if outcome.grad_norm is not None and outcome.applied:
            logs["grad_norm"] = float(outcome.grad_norm)
        logs["learning_rate"] = learning_rate
        if (scale := self.engine.loss_scale()) is not None:
            logs["loss_scale"] = scale
            logs["skipped_steps"] = self.skipped_steps
        logs["tokens_per_second"] = reading.num_tokens / max(reading.seconds, 1e-9)
        self.hooks.log(logs)

    def _note(self, reading: Reading) -> None:
        """Update the run's totals, and act on a loss that is not finite."""
        self.loss_sum += reading.loss_sum
        self.state.num_input_tokens_seen += reading.num_tokens
        if reading.first_bad_step is None:
            return
        self._bad_number(
            f"the training loss was NaN or infinite at step {reading.first_bad_step}",
            f"seen when step {self.progress.step} was logged; what was trained since may be spoilt",
            reading.empty_columns,
        )

    def _bad_number(self, what: str, why: str, empty: tuple[str, ...]) -> None:
        """Stop the run, or go on with a warning where ``nan_loss`` says so; on all ranks alike.

        Raises:
            TrainingError: ``nan_loss`` is "stop".
        """
        if self.plan.nan_loss == "continue":
            if self.ranks.is_main:
                logger.warning("%s; going on, as nan_loss='continue' says", what)
            return
        if empty:
            raise TrainingError(_mean_over_nothing(what, empty))
        raise TrainingError(
            Problem(
                what,
                why,
                "lower learning_rate, add warm-up, check the data around that step, use bf16 "
                "instead of fp16; nan_loss='continue' would go on",
            )
        )

    def _logs_after(self, window: Window) -> bool:
        """Tell whether the step about to be taken will probably be logged."""
        step = self.progress.step + 1
        if self.plan.log_every:
            return step % self.plan.log_every == 0 or step in (1, self.plan.max_steps)
        return window.ends_epoch

    def _epoch_position(self, window: Window) -> float:
        """Compute the epochs done; in a stream's, as transformers, ``max_steps`` count as one."""
        if self.plan.steps_per_epoch is None:
            done = self.progress.steps_in_epoch / self.plan.max_steps
            return self.progress.epoch + min(1.0, done)
        if window.ends_epoch:
            return self.progress.epoch + 1.0
        # A stream may give more than it says.
        return self.progress.epoch + min(
            1.0, self.progress.steps_in_epoch / self.plan.steps_per_epoch
        )


def _mean_over_nothing(what: str, empty: tuple[str, ...]) -> Problem:
    """Say what a loss that is no number probably comes of, where label columns had no target."""
    names = ", ".join(empty)
    return Problem(
        f"{what}; {names} held no target in one of its micro-batches",
        "all labels there are ignored (-100, or NaN), and a mean over them is 0/0",
        "let the loss leave out such rows: sum over the targets of each column and divide by "
        "max(1, their number); or give every micro-batch a target of each. If the loss does that, "
        "lower learning_rate or check the data around that step. nan_loss='continue' would go on",
    )


def _no_sample(epoch: int) -> DataError:
    """Return the error for an epoch without a sample."""
    if not epoch:
        return DataError(
            Problem(
                "the training data ended without a single sample",
                "the data set or loader gives nothing",
                "look at what it was made of: a filter that lets nothing through, an empty folder",
            )
        )
    return DataError(
        Problem(
            f"the training data gave no sample in epoch {epoch + 1}, though it did before",
            "an iterator can be read only once, and a new epoch reads the data again",
            "pass an IterableDataset whose __iter__ begins anew each time, or train for one epoch "
            "(num_train_epochs=1, or max_steps within it)",
        )
    )
