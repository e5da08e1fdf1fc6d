"""Calling the callbacks of a trainer, and making the state that they read."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks
from dstrain.reporting import progress_callback, set_tensorboard_folder, tracker_callbacks
from dstrain.training.freeze_watch import LOOKS_AFTER, FreezeWatch
from dstrain.training.preemption import EvaluationStopped

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState


logger = get_logger(__name__)


class Events:
    """Calls callbacks in transformers' order.

    Attributes:
        handler: transformers' ``CallbackHandler``.
    """

    def __init__(
        self,
        callbacks: Sequence[object] | None,
        args: TrainingArguments,
        *,
        model: torch.nn.Module,
        processing_class: object,
    ) -> None:
        """Set up callbacks, in order: default flow, trackers, the user's, a progress display.

        Args:
            callbacks: the user's callbacks, classes or instances.
            args: the user's arguments.
            model: the model that callbacks are shown.
            processing_class: the tokenizer or processor that callbacks are shown.
        """
        from dstrain.reporting import compat

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
            model,
            processing_class,
            None,
            None,
        )

    def tell(
        self,
        name: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Run one event through all callbacks; return what they want done.

        Args:
            name: such as "on_step_end".
            args: the user's arguments.
            state: the state of the run.
            control: the control object, which callbacks may change.
            **kwargs: further values that this event passes.
        """
        positional = {"on_log": "logs", "on_evaluate": "metrics", "on_predict": "metrics"}.get(name)
        if name == "on_prediction_step":
            self.handler.eval_dataloader = kwargs.pop("eval_dataloader", None)
        extra = (kwargs.pop(positional),) if positional else ()
        told: TrainerControl = getattr(self.handler, name)(args, state, control, *extra, **kwargs)
        return told

    def look_for_frozen(self, name: str) -> None:
        """Warn, after some events, of parameters that callbacks have frozen or unfrozen."""
        if self._freezing is not None and name in LOOKS_AFTER:
            self._freezing.look()

    @contextlib.contextmanager
    def reports_held(self) -> Iterator[None]:
        """Hold back what is logged in the block from trackers until the block ends.

        Trackers cannot delete a point. So where a signal ends an evaluation of several sets, they
        are told of none of them: the resumed run evaluates all sets again.
        """
        from dstrain.reporting import compat

        kinds = tuple(compat.INTEGRATION_TO_CALLBACK.values())
        trackers: list[Any] = [c for c in self.handler.callbacks if isinstance(c, kinds)]
        held: list[Callable[[], object]] = []

        def hold(
            tracker: Any, *args: object, logs: Mapping[str, float] | None = None, **kwargs: object
        ) -> None:
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
        """Tell whether a callback may read checkpoints in ``on_save``: they must be complete."""
        from dstrain.reporting import compat

        return any(
            getattr(c, "reads_checkpoints", type(c).on_save is not compat.TrainerCallback.on_save)
            for c in self.handler.callbacks
        )

    def exportable(self) -> list[Any]:
        """List the callbacks whose state checkpoints hold."""
        from dstrain.trainer.compat import ExportableState

        return [c for c in self.handler.callbacks if isinstance(c, ExportableState)]

    def record_states(self) -> Callable[[], None]:
        """Record the state of callbacks; return a function that restores it.

        Only callbacks that export a state for checkpoints are recorded, such as early stopping.
        Others may collect values over several runs on purpose.
        """
        states = [(c, copy.deepcopy(c.state().get("attributes", {}))) for c in self.exportable()]

        def restore_states() -> None:
            for callback, attributes in states:
                for name, value in copy.deepcopy(attributes).items():
                    setattr(callback, name, value)

        return restore_states

    def begin_run(
        self,
        model: torch.nn.Module,
        *,
        stage: int,
        group_of: Callable[[torch.nn.Parameter], object],
        save_model: Callable[[str], None],
        is_main: bool,
    ) -> None:
        """Prepare callbacks for a training.

        Args:
            model: the model, with its engine on it.
            stage: the ZeRO stage.
            group_of: the optimizer's group that a parameter is in, or None.
            save_model: writes the model into a folder; for trackers that upload it.
            is_main: whether this is rank 0.
        """
        from dstrain.reporting.wandb_tracker import WandbCallback

        for callback in self.handler.callbacks:
            if isinstance(callback, WandbCallback):
                callback.save_model = save_model
        if is_main:
            self._freezing = FreezeWatch(model, group_of)
            self._warn_of_parts(stage)

    def _warn_of_parts(self, stage: int) -> None:
        """Warn that gradients are partitioned, where a callback may read them."""
        from dstrain.reporting import compat

        plain = compat.TrainerCallback.on_pre_optimizer_step
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

    def hold(
        self, model: torch.nn.Module, optimizer: object, scheduler: object, loader: object
    ) -> None:
        """Give callbacks the objects that are in use.

        Args:
            model: the core model.
            optimizer: the optimizer; None before training.
            scheduler: the schedule; None before training.
            loader: the training loader; None where no training runs.
        """
        self.handler.model = model
        self.handler.optimizer = optimizer
        self.handler.lr_scheduler = scheduler
        self.handler.train_dataloader = loader
        if loader is None:
            self._freezing = None


def new_state(ranks: Ranks) -> tuple[TrainerState, TrainerControl]:
    """Make the state and control of a trainer that has not begun to train."""
    from dstrain.reporting import compat

    state = compat.TrainerState(
        is_local_process_zero=ranks.is_local_main, is_world_process_zero=ranks.is_main
    )
    return state, compat.TrainerControl()


def begin_state(
    state: TrainerState,
    control: TrainerControl,
    args: TrainingArguments,
    *,
    max_steps: int,
    steps_per_epoch: int | None,
    train_batch_size: int,
) -> None:
    """Reset the state for a run; the log history of earlier runs is kept.

    Args:
        state: the trainer's state.
        control: the trainer's control object.
        args: the user's arguments.
        max_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps per epoch; None for a stream.
        train_batch_size: the micro-batch that runs, in the unit of the argument.
    """
    state.global_step = 0
    state.epoch = 0.0
    state.max_steps = max_steps
    state.num_input_tokens_seen = 0
    state.total_flos = 0.0
    state.train_batch_size = train_batch_size
    state.num_train_epochs = -(-max_steps // steps_per_epoch) if steps_per_epoch else 1
    state.compute_steps(args, max_steps)
    control.should_training_stop = control.should_epoch_stop = False
