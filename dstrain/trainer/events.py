"""Events of a run, and the state that transformers' callbacks read."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dstrain.config.resolution.running import shown_arguments
from dstrain.core.log import get_logger
from dstrain.reporting import progress_callback, set_tensorboard_folder, tracker_callbacks
from dstrain.training.freeze_watch import LOOKS_AFTER, FreezeWatch
from dstrain.training.preemption import EvaluationStopped

if TYPE_CHECKING:
    from dstrain.trainer.trainer import Trainer


logger = get_logger(__name__)


class Events:
    """Calls callbacks in transformers' order and holds their state and control."""

    def __init__(self, trainer: Trainer, callbacks: Sequence[Any] | None) -> None:
        """Set up callbacks, in order: default flow, trackers, the user's, a progress display."""
        from dstrain.reporting import compat

        args, ranks = trainer.args, trainer.ranks
        self._trainer = trainer
        self._freezing: FreezeWatch | None = None
        trackers = tracker_callbacks(args.report_to)
        if any(t.__name__ == "TensorBoardCallback" for t in trackers):
            set_tensorboard_folder(args.logging_dir, args.output_dir)
        quiet = args.disable_tqdm
        if quiet is None:
            quiet = args.get_process_log_level() > logging.WARNING
        self.handler = compat.CallbackHandler(
            [
                compat.DefaultFlowCallback,
                *trackers,
                *(callbacks or ()),
                progress_callback(quiet=quiet),
            ],
            trainer.model,
            trainer.processing_class,
            None,
            None,
        )
        self.state = compat.TrainerState(
            is_local_process_zero=ranks.is_local_main, is_world_process_zero=ranks.is_main
        )
        self.control = compat.TrainerControl()
        trainer.state, trainer.control = self.state, self.control

    def __call__(self, name: str, **kwargs: Any) -> Any:
        """Run one event through all callbacks; returns the control object."""
        trainer = self._trainer
        event = getattr(self.handler, name)
        positional = {"on_log": "logs", "on_evaluate": "metrics", "on_predict": "metrics"}.get(name)
        if name == "on_prediction_step":
            self.handler.eval_dataloader = kwargs.pop("eval_dataloader", None)
        extra = (kwargs.pop(positional),) if positional else ()
        shown = shown_arguments(trainer.args, trainer.resolved)
        with self._taking_changes(), shown as args:
            self.control = event(args, trainer.state, self.control, *extra, **kwargs)
        trainer.control = self.control
        if self._freezing is not None and name in LOOKS_AFTER:
            self._freezing.look()
        return self.control

    def _taking_changes(self) -> contextlib.AbstractContextManager[None]:
        """Let weights that callbacks change inside be those that training goes on with."""
        engine = self._trainer._engines.training
        changes = None if engine is None or engine.is_released else engine.changes
        return contextlib.nullcontext() if changes is None else changes.in_callbacks()

    @contextlib.contextmanager
    def reports_held(self) -> Iterator[None]:
        """Hold back what is logged in the block from trackers until the block ends.

        They cannot take a point back. So where a signal ends an evaluation of several sets they
        hear of none: the run that goes on evaluates all of them again.
        """
        from dstrain.reporting import compat

        kinds = tuple(compat.INTEGRATION_TO_CALLBACK.values())
        trackers: list[Any] = [c for c in self.handler.callbacks if isinstance(c, kinds)]
        held: list[Callable[[], Any]] = []

        def hold(tracker: Any, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            report = type(tracker).on_log
            logs = None if logs is None else dict(logs)
            held.append(functools.partial(report, tracker, *args, logs=logs, **kwargs))

        for tracker in trackers:
            tracker.on_log = functools.partial(hold, tracker)
        try:
            yield
        except EvaluationStopped:
            held.clear()
            raise
        finally:
            for tracker in trackers:
                del tracker.on_log
            for report in held:
                report()

    def read_checkpoints(self) -> bool:
        """Tell whether a callback may read a checkpoint in ``on_save``, which then must exist."""
        from dstrain.reporting import compat

        return any(
            getattr(c, "reads_checkpoints", type(c).on_save is not compat.TrainerCallback.on_save)
            for c in self.handler.callbacks
        )

    def exportable(self) -> list[Any]:
        """List the callbacks whose state checkpoints hold."""
        from dstrain.trainer.compat import ExportableState

        return [c for c in self.handler.callbacks if isinstance(c, ExportableState)]

    def take_down(self) -> Callable[[], None]:
        """Record the state of callbacks; return a function that restores it.

        It is about those that say in ``state`` what that is, for checkpoints, as early stopping
        does. What others hold may be what a user collects over several runs.
        """
        states = [(c, copy.deepcopy(c.state().get("attributes", {}))) for c in self.exportable()]

        def give_back() -> None:
            for callback, attributes in states:
                for name, value in copy.deepcopy(attributes).items():
                    setattr(callback, name, value)

        return give_back

    def begin_run(self, loader: Any, *, max_steps: int, steps_per_epoch: int | None) -> None:
        """Reset the state for a run of ``max_steps``; the log history of earlier runs is kept."""
        from dstrain.reporting.wandb_tracker import WandbCallback

        trainer, args = self._trainer, self._trainer.args
        state = trainer.state
        state.global_step = 0
        state.epoch = 0.0
        state.max_steps = max_steps
        state.num_input_tokens_seen = 0
        state.total_flos = trainer.current_flos = 0.0
        # In the unit of the argument, with the value that runs: the DeepSpeed config may decide it.
        resolved = trainer.resolved
        state.train_batch_size = resolved.batch_unit.as_argument(resolved.micro_batch_size)
        state.num_train_epochs = -(-max_steps // steps_per_epoch) if steps_per_epoch else 1
        state.compute_steps(args, max_steps)
        for callback in self.handler.callbacks:
            if isinstance(callback, WandbCallback):
                callback.save_model = lambda folder: trainer.save_model(folder, _internal_call=True)
        control = self.control
        control.should_training_stop = control.should_epoch_stop = False
        if trainer.ranks.is_main:
            self._freezing = FreezeWatch(trainer.model, trainer.get_optimizer_group)
            self._warn_of_parts()
        self.hold(loader)

    def _warn_of_parts(self) -> None:
        """Say that gradients are in parts, where a callback may look for them."""
        from dstrain.reporting import compat

        stage, plain = self._trainer.resolved.stage, compat.TrainerCallback.on_pre_optimizer_step
        names = [
            type(callback).__name__
            for callback in self.handler.callbacks
            if type(callback).on_pre_optimizer_step is not plain
        ]
        if stage == 0 or not names:
            return
        logger.warning(
            "%s has on_pre_optimizer_step, and at ZeRO stage %d gradients are partitioned: "
            "parameter.grad is None there, and code that reads or changes it does nothing. To read "
            "gradients call deepspeed.utils.safe_get_full_grad(parameter), on all ranks; to change "
            "them set zero_stage to 0",
            ", ".join(names),
            stage,
        )

    def hold(self, loader: Any) -> None:
        """Give callbacks the model, optimizer, schedule and training loader in use, or let go."""
        trainer = self._trainer
        self.handler.model = trainer.model
        self.handler.optimizer = trainer.optimizer
        self.handler.lr_scheduler = trainer.lr_scheduler
        self.handler.train_dataloader = loader
        if loader is None:
            self._freezing = None
