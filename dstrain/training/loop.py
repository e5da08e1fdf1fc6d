"""The training loop: windows of micro-batches in, optimizer steps out, no waiting between."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dstrain.core.log import get_logger
from dstrain.core.progress import Progress
from dstrain.core.ranks import Ranks
from dstrain.data import LossTargets, TokenCount, Window
from dstrain.engine import Engine, empty_cache
from dstrain.training.accumulation import Accumulation
from dstrain.training.epoch_reader import EpochReader
from dstrain.training.figures import RunFigures
from dstrain.training.key_value_cache import KeyValueCache
from dstrain.training.loss_health import no_sample
from dstrain.training.metrics import Reading
from dstrain.training.place import Place
from dstrain.training.preemption import EvaluationStopped, Preemption
from dstrain.training.resume import Event, PendingEvaluation, Position, Resumption, StepRecord
from dstrain.training.settings import Hooks, RunSettings
from dstrain.training.types import Loader

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

logger = get_logger(__name__)


@dataclass
class TrainLoop:
    """Runs one training: ``run`` is the loop, the other methods are its steps.

    Attributes:
        progress: optimizer steps, epochs, samples and tokens so far.
        figures: losses and counters.
        steps_before: optimizer steps that were done before this process resumed the run.
        tokens_before: input tokens that were read before this process resumed the run.
        preempted: whether a signal ended the run early.
        place: the place that the run has come to, for messages.
    """

    settings: RunSettings
    engine: Engine
    loader: Loader
    targets: LossTargets
    ranks: Ranks
    hooks: Hooks
    state: TrainerState
    control: TrainerControl
    preemption: Preemption
    cache: KeyValueCache
    count_tokens: TokenCount = field(default_factory=TokenCount)
    resumption: Resumption | None = None
    progress: Progress = field(default_factory=Progress)
    steps_before: int = 0
    tokens_before: int = 0
    preempted: bool = False
    place: Place = field(default_factory=Place)
    _last: StepRecord | None = None
    _saved_step: int = -1
    _ended_at: Progress | None = None  # before the count of epochs went on to the next one
    _can_be_saved: bool = False  # the state of the optimizer, once it has some
    _is_cut: bool = False  # whether the run ends inside of its last epoch, which may go on later

    def __post_init__(self) -> None:
        """Make the parts that do the loop's work."""
        self.figures = RunFigures(self.settings, self.ranks)
        self.passes = Accumulation(
            engine=self.engine,
            targets=self.targets,
            ranks=self.ranks,
            hooks=self.hooks,
            cache=self.cache,
            count_tokens=self.count_tokens,
            place=self.place,
        )
        self._reader = self._read(self.loader)

    def run(self) -> None:
        """Train until max_steps or until a callback stops the run."""
        self.figures.start()
        self.engine.model.train()
        if self.resumption is not None:
            self._take_up(self.resumption.position)
        self.hooks.event("on_train_begin")
        self.preemption.ask(now=True)  # a signal that came while the engine was built
        if self.preemption.answer():
            self._end_before_first_step()
            return
        if self.settings.eval_on_start and self.resumption is None:
            if not self._evaluate():  # a run that begins anew evaluates first of all, too
                self._end_before_first_step()
        elif self.resumption is not None:
            self._finish_resumed_point(self.resumption.position)
        self._run_epochs()

    @property
    def can_go_on(self) -> bool:
        """Tell whether a later run can go on from here, if a signal ended this one.

        Before the first step there is nothing to save, unless the run itself came from a
        checkpoint.
        """
        return self.progress.step > 0 or self.resumption is not None

    def _run_epochs(self, *, inside: bool = False) -> None:
        while not self._is_over():
            self._run_epoch(begins=not inside)
            if self.preempted:
                break
            self._ended_at, self.progress = self.progress, self.progress.next_epoch()
            inside = False
        self.passes.close()
        self.hooks.store_flos()
        self._note(self.figures.read())
        if not self.preempted:
            self._heed_last_signal()

    def _is_over(self) -> bool:
        return self.settings.is_over(self.progress) or self.control.should_training_stop

    def _run_epoch(self, *, begins: bool) -> None:
        self._reader.begin(self.progress)
        if begins:
            self.hooks.event("on_epoch_begin")
        before = self.progress
        windows = self._reader.windows(
            self.settings.accumulation, steps_in_epoch=before.steps_in_epoch
        )
        for window in windows:
            self._last = self._train_step(window)
            self._react("on_step_end", self._last, epoch_is_over=window.ends_epoch)
            if self.preempted:
                return
            if self.preemption.answer() and not self._is_over():
                self._end_early(epoch_is_over=window.ends_epoch)
                return
            if self._is_over() or self.control.should_epoch_stop:
                self._is_cut = not (window.ends_epoch or self.control.should_epoch_stop)
                break
        if self.progress.step == before.step and not before.steps_in_epoch:
            raise no_sample(self.progress.epoch)
        assert self._last is not None
        self._react("on_epoch_end", self._last, epoch_is_over=False)

    def _train_step(self, window: Window) -> StepRecord:
        """Take one optimizer step over a window of micro-batches."""
        self.place.enter("before its first micro-batch", in_step=True)
        self.hooks.event("on_step_begin")
        step = self.progress.step
        looks_again = self.targets.is_due_again(step, is_first=step == self.steps_before)
        done = self.passes.run(window.micro_batches, looks_again=looks_again)
        first = window.micro_batches[0].inputs
        self.figures.health.look_for_targets(done.weights, first, self.targets, step=step + 1)
        self.passes.finish()
        learning_rate = self.engine.learning_rates()[0]
        wants_norm = self.settings.is_log_step(step + 1, ends_epoch=window.ends_epoch)
        self.engine.clip(want_norm=wants_norm)
        self.hooks.event("on_pre_optimizer_step")
        self.preemption.ask()
        self.place.enter("the optimizer's step", in_step=True)
        outcome = self.engine.step(want_norm=wants_norm)
        self.hooks.event("on_optimizer_step")
        self.progress = self.progress.advance(samples=window.num_samples, tokens=done.num_tokens)
        self.figures.add(window, done, step=self.progress.step)
        if not outcome.applied:
            scale = self.engine.state.loss_scale()
            if scale is None and self.figures.health.stops_on_nan:
                self._note(self.figures.read())  # a loss that was no number says more
            self.figures.note_skipped(done.empty_columns, step=self.progress.step, loss_scale=scale)
        elif self.settings.saves and not self._can_be_saved:
            self.hooks.check_state()
            self._can_be_saved = True
        if self.settings.clears_cache(self.progress.step):
            empty_cache()
        self._show_progress(ends_epoch=window.ends_epoch)
        return StepRecord(outcome.applied, outcome.grad_norm, learning_rate)

    def _show_progress(self, *, ends_epoch: bool) -> None:
        """Tell callbacks, in their state, how far the run has come."""
        self.state.global_step = self.progress.step
        self.state.epoch = self.settings.epochs_done(self.progress, ends_epoch=ends_epoch)

    def _react(self, event: Event, last: StepRecord, *, epoch_is_over: bool) -> None:
        """Let callbacks decide at this point of the run, then do what they decided.

        Evaluation comes before saving, so that a checkpoint knows its own metric.
        """
        self.place.enter(f"in callbacks and logging ({event})")
        self.control = self.hooks.event(event)
        if self.control.should_log:
            self._log(last)
        self._evaluate_and_save(event, last, epoch_is_over=epoch_is_over)
        self.place.enter("reading the next batch")

    def _evaluate_and_save(self, event: Event, last: StepRecord, *, epoch_is_over: bool) -> None:
        """Evaluate and save as callbacks decided; a signal in the evaluation ends the run."""
        if self.control.should_evaluate:
            due = PendingEvaluation.of(event, self.control)
            if not self._evaluate():
                self._end_in_evaluation(due, epoch_is_over=epoch_is_over)
                return
        if self.control.should_save:
            self._save(event, last, epoch_is_over=epoch_is_over)

    def _evaluate(self) -> bool:
        """Evaluate, outside of training time; return False where a signal ended it."""
        self.place.enter("an evaluation")
        done = True
        with self.figures.not_training():
            try:
                self.control = self.hooks.evaluate_in_training()
            except EvaluationStopped:
                done = False
            self.engine.model.train()
        return done

    def _save(
        self,
        event: Event,
        last: StepRecord,
        *,
        epoch_is_over: bool,
        due: PendingEvaluation | None = None,
        stopped: bool = False,
    ) -> None:
        """Save a checkpoint, which is no training time."""
        self.place.enter("saving a checkpoint")
        ended = event == "on_epoch_end" and due is None and not self._is_cut
        inside = not (ended or epoch_is_over)
        norm = last.grad_norm
        with self.figures.not_training():
            self.hooks.store_flos()
            position = Position(
                progress=self.progress.next_epoch() if ended else self.progress,
                epoch_is_over=epoch_is_over or (self.control.should_epoch_stop and not ended),
                applied=last.applied,
                grad_norm=None if norm is None else float(norm),
                learning_rate=last.learning_rate,
                skipped_steps=self.figures.skipped_steps,
                loss_sum=self.figures.loss_sum,
                samples_seen=self.figures.samples_seen,
                meters=self.figures.meters(),
                random_ahead=self._reader.random_ahead if inside else None,
                source=self._reader.source(self.progress.samples_in_epoch) if inside else None,
                shares=self._reader.shares,
                due=due,
                loss=self.targets.findings(),
                stopped=stopped,
            )
            self.hooks.save_in_training(position)
        self._saved_step = self.progress.step

    def _log(self, last: StepRecord) -> None:
        """Read the figures (the one wait for the device) and report them."""
        reading = self.figures.read()
        if reading.num_steps == 0:
            return
        self.hooks.store_flos()
        self._note(reading)
        scale = self.engine.state.loss_scale()
        self.hooks.log(self.figures.logs(reading, last, loss_scale=scale))

    def _note(self, reading: Reading) -> None:
        """Update the totals of the run and of its state; see ``RunFigures.note``."""
        self.state.num_input_tokens_seen += reading.num_tokens
        self.figures.note(reading, step=self.progress.step)

    # --- going on from a checkpoint ---------------------------------------------------------------

    def _read(self, loader: object) -> EpochReader:
        saves, resumption = self.settings.saves, self.resumption
        return EpochReader(loader, self.ranks, saves=saves, resumption=resumption)

    def _take_up(self, position: Position) -> None:
        """Go on from a checkpoint's position."""
        self.progress = position.progress
        self.figures.restore(position)
        self.steps_before = position.progress.step
        self.tokens_before = self.state.num_input_tokens_seen
        self._last = StepRecord(position.applied, position.grad_norm, position.learning_rate)
        if position.loss is not None:
            self.targets.restore(position.loss, self.ranks)

    def _finish_resumed_point(self, position: Position) -> None:
        """Do what was still to be done between two steps when the checkpoint was saved."""
        due, ends_epoch = position.due, position.epoch_is_over
        self.control.should_training_stop |= position.stopped
        if due is not None:
            assert self._last is not None
            self._reader.restore_random()
            self._reader.take_up_random_ahead()
            due.restore_decisions(self.control)
            at_end = due.event == "on_epoch_end"  # of which nothing is left after this
            over = ends_epoch and not at_end
            self._evaluate_and_save(due.event, self._last, epoch_is_over=over)
            if self.preempted:
                return
            if at_end and ends_epoch:
                self._reader.skip_resumed_epoch()
                self.progress = self.progress.next_epoch()
            if at_end:
                return
            ends_epoch |= self.control.should_epoch_stop
            self._is_cut = self._is_over() and not ends_epoch
        if ends_epoch or self._is_cut:
            self._end_resumed_epoch()

    def _end_resumed_epoch(self) -> None:
        """Do what was still to be done when the checkpoint was saved at an epoch's last step."""
        assert self._last is not None
        self._reader.restore_random()
        if not self._is_cut:
            self._reader.skip_resumed_epoch()
        self._react("on_epoch_end", self._last, epoch_is_over=False)
        if not self.preempted:
            self.progress = self.progress.next_epoch()

    # --- ending early, to go on later -------------------------------------------------------------

    def _note_preempted(self) -> None:
        self.preempted = self.preemption.acted = self.control.should_training_stop = True

    def _end_before_first_step(self) -> None:
        """End without a save: a checkpoint that the run itself came from is there already."""
        if self.ranks.is_main:
            where = "before its first step, so that there is nothing to save"
            if self.can_go_on:
                where = f"before a step after step {self.progress.step}, from which it came"
            logger.warning("%s: training ends %s", self.preemption.cause, where)
        self._note_preempted()

    def _end_in_evaluation(self, due: PendingEvaluation, *, epoch_is_over: bool) -> None:
        """Save, so that the run goes on with the evaluation that the signal ended.

        A checkpoint of this step was saved before that, if at all, at the step's end; going on from
        it does what the epoch's end asks for. One that the run itself came from is there already.
        """
        step = self.progress.step
        if self.ranks.is_main:
            cause = self.preemption.cause
            logger.warning("%s: training ends in the evaluation after step %d", cause, step)
        due.restore_decisions(self.control)
        if step not in (self._saved_step, self.steps_before):
            assert self._last is not None
            over = epoch_is_over or (due.event == "on_epoch_end" and not self._is_cut)
            self._save(due.event, self._last, epoch_is_over=over, due=due)
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
            self._save("on_step_end", self._last, epoch_is_over=epoch_is_over)

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
            stopped = not self.settings.is_over(self.progress)
            self.progress, after = self._ended_at, self.progress
            self._save("on_epoch_end", self._last, epoch_is_over=False, stopped=stopped)
            self.progress = after
        self._note_preempted()

    # --- another micro-batch, where memory ran out ------------------------------------------------

    def change(self, engine: Engine, loader: object, *, accumulation: int) -> None:
        """Let another engine do again the step that broke off, with other micro-batches."""
        self.engine, self.loader, self.resumption = engine, loader, None
        self.passes.go_on_with(engine)
        self._reader = self._read(loader)
        self.settings = replace(self.settings, accumulation=accumulation)

    def go_on(self) -> None:
        """Go on with ``run`` inside an epoch, after ``change``."""
        self.engine.model.train()
        self._run_epochs(inside=True)
