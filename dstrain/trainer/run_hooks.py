"""Parts of ``Trainer.train``: preparation, methods that the loop calls, and the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dstrain.core.errors import ConfigError, DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none, barrier, require_equal, sum_over_ranks
from dstrain.core.seeds import random_state, seed_rank, set_random_state
from dstrain.engine import Engine, MetricSchedule, device_name
from dstrain.trainer import build, compat, loaders, start
from dstrain.trainer.best import BestModel
from dstrain.trainer.callback_states import restore_callbacks
from dstrain.trainer.checkpointing import check_hooks
from dstrain.trainer.count_hooks import count_whole_parameters
from dstrain.trainer.engines import check_parts
from dstrain.trainer.events import begin_state
from dstrain.trainer.save_hooks import SaveHooks
from dstrain.trainer.search_hooks import SearchHooks
from dstrain.trainer.start import Start
from dstrain.training.key_value_cache import KeyValueCache
from dstrain.training.loop import TrainLoop
from dstrain.training.preemption import EvaluationStopped
from dstrain.training.resume import Resumption
from dstrain.training.settings import RunSettings
from dstrain.training.types import Loader

if TYPE_CHECKING:
    from transformers import TrainerControl

    from dstrain.trainer.compat import TrainOutput

logger = get_logger(__name__)


class RunHooks(SearchHooks, SaveHooks):
    """Has the parts of ``Trainer.train``."""

    current_flos: float

    # --- before the first step --------------------------------------------------------------------

    def _prepare_training(self, begin: Start | None) -> TrainLoop:
        """Prepare everything before the first step: loader, config, engine, state.

        Args:
            begin: the checkpoint that the run goes on from, or None.
        """
        assert self._preemption is not None
        self._align_special_tokens()
        self._notice_user_optimizer()
        self.resolved = self._resolve(None)  # arguments may have changed since the last time
        with all_or_none():
            loader = self.get_train_dataloader()
        start.check_shares(loader, self.ranks, begin)
        max_steps, per_epoch = self._count_steps(loader, begin)
        self.resolved = self._resolve(max_steps)
        check_parts(self.model, self.resolved)
        check_hooks(self.model, self.args, self.resolved)
        with all_or_none():
            if self.ranks.is_main:
                build.record_resolved_config(self.resolved, self.args)
        if self.ranks.is_main:
            for warning in self.resolved.warnings:
                logger.warning("%s", warning)
            self._warn_of_user_save()
            self._announce(loader, max_steps=max_steps)
        self.close()  # an engine of an earlier run must be gone before the new one takes memory
        engine = self._start_engine(max_steps)
        count_whole_parameters(self.model)
        self._warn_of_mixing(engine.model)
        self._begin_state(loader, max_steps=max_steps, steps_per_epoch=per_epoch)
        seed_rank(self.args.seed, step=0, rank=self.ranks.rank)
        resumption = None if begin is None else self._resume(engine, begin)
        return TrainLoop(
            settings=self._run_settings(loader, max_steps=max_steps, steps_per_epoch=per_epoch),
            engine=engine,
            loader=loader,
            targets=self.targets,
            ranks=self.ranks,
            hooks=self,
            state=self.state,
            control=self.control,
            preemption=self._preemption,
            cache=KeyValueCache(self.model, used=self.args.use_cache),
            count_tokens=loaders.token_count(self.model, self.args, self.processing_class),
            resumption=resumption,
        )

    def _count_steps(self, loader: object, begin: Start | None) -> tuple[int, int | None]:
        """Count the optimizer steps of the whole run, and of one epoch (None for a stream).

        Raises:
            DataError: ranks have data of different lengths.
        """
        # Accumulation may come from the user's DeepSpeed config, so it is read after resolving.
        max_steps, per_epoch = loaders.training_steps(loader, self.args, self.resolved.accumulation)
        require_equal("the length of the training data", (max_steps, per_epoch), DataError)
        if begin is not None and self.args.max_steps <= 0:
            batch = self.resolved.global_batch_size
            max_steps = start.steps_in_all(
                begin, max_steps=max_steps, per_epoch=per_epoch, batch=batch
            )
        return max_steps, per_epoch

    def _run_settings(
        self, loader: object, *, max_steps: int, steps_per_epoch: int | None
    ) -> RunSettings:
        """Make the settings of the loop."""
        args = self.args
        return RunSettings(
            max_steps=max_steps,
            steps_per_epoch=steps_per_epoch,
            accumulation=self.resolved.accumulation,
            nan_loss=args.nan_loss,
            filter_bad=args.logging_nan_inf_filter,
            eval_on_start=args.eval_on_start,
            saves=self.checkpoints.writes or args.preemption != "ignore",
            empty_cache_steps=args.torch_empty_cache_steps or 0,
            num_epochs=start.num_epochs(args),
            log_every=int(self.state.logging_steps) if args.logging_strategy == "steps" else 0,
        )

    def _begin_state(self, loader: object, *, max_steps: int, steps_per_epoch: int | None) -> None:
        """Reset the state, callbacks and best model for a run whose engine has been built."""
        begin_state(
            self.state,
            self.control,
            self.args,
            max_steps=max_steps,
            steps_per_epoch=steps_per_epoch,
            train_batch_size=self.resolved.batch_unit.as_argument(self.resolved.micro_batch_size),
        )
        self.current_flos = 0.0
        self.events.begin_run(
            self.model,
            stage=self.resolved.stage,
            group_of=self.get_optimizer_group,
            save_model=lambda folder: self.save_model(folder, _internal_call=True),
            is_main=self.ranks.is_main,
        )
        self._show_objects(loader)
        self.checkpoints.best = BestModel(self.args, self.state, self.ranks, self.model)

    def _resume(self, engine: Engine, begin: Start) -> Resumption:
        """Load a checkpoint into the engine and the trainer's state; a collective of all ranks.

        Raises:
            CheckpointError: it does not fit the model or the optimizer.
        """
        args, ranks = self.args, self.ranks
        unpickles = start.reader_for(args, self.resolved).unpickles
        resumption = start.load(
            engine, begin, ranks, self.resolved, seed=args.seed, unpickles=unpickles
        )
        start.restore_state(self.state, begin.state)
        self.best.take_up(begin.state, begin.folder)
        if args.restore_callback_states_from_checkpoint:
            with all_or_none():
                restore_callbacks(
                    self.events.handler.callbacks,
                    begin.state.stateful_callbacks or {},
                    is_main=ranks.is_main,
                )
        if ranks.is_main:
            start.warn_of_other_arguments(self.state, begin.state)
        return resumption

    def _rebuild(
        self, micro_batch: int, accumulation: int, *, max_steps: int
    ) -> tuple[Engine, Loader]:
        """Put an engine with another micro-batch in the place of one that ran out of memory.

        Args:
            micro_batch: samples per rank in one forward pass.
            accumulation: micro-batches per optimizer step.
            max_steps: optimizer steps of the run.

        Returns:
            the engine, and a loader of such micro-batches.
        """
        shown = self.resolved.batch_unit.as_argument(micro_batch)
        self.fitted = shown, accumulation
        self.state.train_batch_size = shown
        self.resolved = self._resolve(max_steps)
        loader = self.get_train_dataloader()
        engine = self._start_engine(max_steps)
        self._show_objects(loader)
        self.checkpoints.begin_again(self.args, is_read=self.events.read_checkpoints())
        return engine, loader

    # --- what the loop calls ----------------------------------------------------------------------

    def evaluate_in_training(self) -> TrainerControl:
        """Evaluate because a callback asked for it; random states of training stay as they were.

        Returns:
            the control object: what callbacks want done.

        Raises:
            EvaluationStopped: a signal ended it; log and callbacks are as if it had not begun.
        """
        engine = self._engines.training
        assert self._preemption is not None and engine is not None  # noqa: PT018
        state, undo = random_state(), self._undo_of_evaluation()
        try:
            with (
                self.events.reports_held(),
                self._preemption.evaluating(),
                engine.buffers.undisturbed(),
            ):
                metrics = self.evaluate(ignore_keys=self.ignore_keys_for_eval)
        except EvaluationStopped:
            undo()
            raise
        finally:
            set_random_state(state)
        self._follow_metric(metrics)
        self._report_trial(metrics)
        # An evaluation before the first step has no checkpoint that it could be of.
        if self.state.global_step and self.best.judge(metrics):
            self.control.should_save |= self.args.save_strategy == "best"
        return self.control

    def _follow_metric(self, metrics: dict[str, float]) -> None:
        """Pass the metric of an evaluation to a schedule that follows it.

        Raises:
            ConfigError: the evaluation has no such metric.
        """
        if not isinstance(self.lr_scheduler, MetricSchedule) or self.state.global_step == 0:
            return
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if name not in metrics:
            raise ConfigError(
                Problem(
                    f"metric_for_best_model={self.args.metric_for_best_model!r}",
                    f"the schedule follows it, and the evaluation has {', '.join(metrics)}",
                    "name one of these",
                )
            )
        self.lr_scheduler.step(metrics[name])

    # --- the end ----------------------------------------------------------------------------------

    def _finish_training(self, loop: TrainLoop, started: float) -> TrainOutput:
        """Log final metrics and tell callbacks; speeds are of this run, not of one resumed from."""
        steps = loop.progress.step
        done = loop.steps_before
        rank_samples = torch.tensor(loop.figures.rank_samples, device=device_name())
        metrics = compat.speed_metrics(
            "train",
            started,
            num_samples=int(sum_over_ranks(rank_samples)),
            num_steps=steps - done,
            num_tokens=self.state.num_input_tokens_seen - loop.tokens_before,
        )
        metrics["total_flos"] = self.state.total_flos
        metrics["train_loss"] = loop.figures.loss_sum / max(1, steps)
        if self.resolved.precision == "fp16" or loop.figures.skipped_steps:
            metrics["train_skipped_steps"] = loop.figures.skipped_steps
        if self.checkpoints.missing:
            metrics["missing_checkpoints"] = len(self.checkpoints.missing)
        metrics |= self._memory.stop("train")
        self.log(metrics)
        if self.args.load_best_model_at_end and not self.preempted:
            self.best.load(loop.engine, failed=self.checkpoints.failed)
        self.event("on_train_end")
        if self.preempted:
            self.save_state()
            barrier()  # the launcher ends all ranks once one has ended
        return compat.TrainOutput(steps, metrics["train_loss"], metrics)
