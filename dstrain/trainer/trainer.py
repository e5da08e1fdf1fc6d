"""The public ``Trainer``: its constructor, and ``train``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import check_resumable, held_lock
from dstrain.config.resolution.running import ShownArguments
from dstrain.core.errors import ConfigError, Problem, TrainingError, raise_problems
from dstrain.core.launcher import note_ending
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none
from dstrain.core.seeds import seed_everything
from dstrain.data import Collator
from dstrain.engine import check_versions, device_type
from dstrain.models import check_writable
from dstrain.reporting.memory import MemoryMetrics
from dstrain.trainer import build, loaders
from dstrain.trainer.attributes import OtherAttributes
from dstrain.trainer.best import BestModel
from dstrain.trainer.checkpointing import RunCheckpoints, check_hooks, keep_folder
from dstrain.trainer.engines import EngineKeeper, check_parts
from dstrain.trainer.events import Events, new_state
from dstrain.trainer.model_init import check_source
from dstrain.trainer.old_names import old_resume, one_name
from dstrain.trainer.overrides import ignored_overrides
from dstrain.trainer.run_hooks import RunHooks
from dstrain.trainer.signatures import (
    Functions,
    misfits_of,
    serve_loss_function,
    serve_overrides,
)
from dstrain.trainer.start import find_start, reader_for
from dstrain.trainer.user_optimizer import UserOptimizer
from dstrain.training.features import check_features, training_features
from dstrain.training.loop import TrainLoop
from dstrain.training.oom_recovery import (
    Rebuilding,
    check_fitting,
    found_before,
    run_with_recovery,
)
from dstrain.training.types import Dataset, Nested, ProcessingClass, Scheduler, Trial
from dstrain.training.watches import RankWatches

if TYPE_CHECKING:
    from dstrain.trainer.compat import TrainOutput

logger = get_logger(__name__)


class Trainer(RunHooks, OtherAttributes):
    """Trains and evaluates a model with DeepSpeed; the surface of transformers' Trainer.

    What a subclass may override stands in the classes that this one is made of.

    Attributes:
        model: the core model, always.
        model_wrapped: what runs forward passes: the DeepSpeed engine while it is on the model.
        args: the user's arguments.
        resolved: the DeepSpeed config of the present arguments; of a training, while one runs.
        state: transformers' ``TrainerState``.
        control: transformers' ``TrainerControl``.
        optimizer: the optimizer in use, or None before training.
        lr_scheduler: the schedule in use, or None before training.
        is_in_train: whether ``train`` is running.
        model_accepts_loss_kwargs: whether ``forward`` is given ``num_items_in_batch``.
        fitted: what ``auto_find_batch_size`` found in the training that runs or ran last, as
            (micro-batch, accumulation) in the units of the arguments; None where those fit.
        preempted: whether a signal ended the last ``train`` early (``preemption``).
        sequence_length: tokens of one sample, where a subclass knows them (None: unknown); for
            ``zero_stage="auto"``, which else keeps a share of the memory for activations.
        is_model_parallel: False: a model is not spread over devices layer by layer here.
        place_model_on_device: False: the engine places the model.
    """

    is_model_parallel = False
    place_model_on_device = False

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Dataset = None,
        eval_dataset: Dataset = None,
        processing_class: ProcessingClass = None,
        model_init: Callable[..., torch.nn.Module] | None = None,
        *unnamed: object,
        tokenizer: ProcessingClass = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: Sequence[object] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Scheduler] = (None, None),
        preprocess_logits_for_metrics: Callable[[Nested, Nested], Nested] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        """Start the ranks and check what can be checked before anything expensive.

        Args:
            model: a ``PreTrainedModel``, or any module that returns a loss, a tuple that begins
                with one, or a ``ModelOutput``.
            args: defaults to ``TrainingArguments("tmp_trainer")``.
            data_collator: list of samples -> batch.
            train_dataset: map-style dataset or stream.
            eval_dataset: map-style dataset or stream, or a dict of these by name.
            processing_class: tokenizer or processor; saved with the model.
            model_init: makes the model instead, anew for each ``train()``; may take the trial of a
                hyperparameter search.
            *unnamed: refused: releases of transformers differ in the order of what follows.
            tokenizer: old name of ``processing_class``.
            compute_loss_func: makes the loss of (outputs, labels, num_items_in_batch); see
                ``compute_loss``.
            compute_metrics: ``EvalPrediction`` -> dict of metrics; called on rank 0 alone. With
                ``batch_eval_metrics`` it is called with each batch, and with ``compute_result``.
            callbacks: ``TrainerCallback`` classes or instances, after the default ones.
            optimizers: the user's own optimizer and schedule.
            preprocess_logits_for_metrics: (logits, labels) of a batch -> what is kept of the
                logits; on each rank's device.
            optimizer_cls_and_kwargs: class and keyword arguments of the user's own optimizer.

        Raises:
            ConfigError: arguments that cannot work with this model and data.
        """
        self.args = args if args is not None else TrainingArguments("tmp_trainer")
        self._memory = MemoryMetrics(enabled=not self.args.skip_memory_metrics)
        self._memory.start("init")
        self.ranks = build.start_run(self.args)
        self._watches = RankWatches(self.ranks)
        self._shown = ShownArguments()
        with self._watches.over(
            "the construction of the trainer", step=0, timeout_seconds=self.args.ddp_timeout
        ):
            check_versions()  # where the group was there already
            self.compute_metrics = compute_metrics
            functions = Functions(
                compute_loss_func=compute_loss_func,
                # One that is called with batches takes another argument: ``_check_evaluation``.
                compute_metrics=None if self.args.batch_eval_metrics else compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                data_collator=data_collator,
                callbacks=callbacks or (),
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
            self._refuse_misfits(unnamed, functions)
            check_source(model, model_init, optimizers)
            processing_class = one_name(processing_class, tokenizer)
            if eval_dataset is None and (
                self.args.eval_strategy != "no" or self.args.eval_on_start
            ):
                raise ConfigError(
                    Problem(
                        f"eval_strategy={self.args.eval_strategy!r}, "
                        f"eval_on_start={self.args.eval_on_start}, without eval_dataset",
                        "there is nothing to evaluate on",
                        "pass eval_dataset, or set eval_strategy to no and eval_on_start to false",
                    )
                )
            with all_or_none():
                if self.args.should_save:
                    check_writable(self.args.output_dir)
                    check_resumable(self.args.resume_from_checkpoint, Path(self.args.output_dir))
            seed_everything(self.args.seed)
            self.model_init = model_init
            self.model = self._fresh_model(None) if model is None else model
            self.compute_loss_func = serve_loss_function(compute_loss_func)
            self.train_dataset = train_dataset
            self.eval_dataset = eval_dataset
            self.processing_class = processing_class
            self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
            self.data_collator = data_collator or loaders.default_collator(processing_class)
            self.optimizer, self.lr_scheduler = optimizers
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
            self._user = UserOptimizer(*optimizers)
            self._note_model()
            check_features(self.model, self.args, device=device_type())
            # Before the model is touched: a config that cannot be used must not cost a model load.
            self.resolved = self._resolve(None)
            check_parts(self.model, self.resolved)
            check_hooks(self.model, self.args, self.resolved)
            build.check_formats_of(self.model, self.resolved, self.ranks)
            check_fitting(self.args, self.resolved)
            build.check_passed(self.args, optimizers, optimizer_cls_and_kwargs, self.resolved)
            self._check_evaluation()
            self._engines = EngineKeeper(self.close, patience_seconds=self.args.ddp_timeout)
            self.events = Events(
                callbacks, self.args, model=self.model, processing_class=processing_class
            )
            self.state, self.control = new_state(self.ranks)
            self.checkpoints = RunCheckpoints(self.ranks)
            self.checkpoints.best = BestModel(self.args, self.state, self.ranks, self.model)
            self._begin_publishing()
            self.event("on_init_end")
            self._memory.stop("init")

    # --- what a user calls ----------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Trial = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train for ``num_train_epochs`` or ``max_steps``; may be called again.

        Args:
            resume_from_checkpoint: a checkpoint's folder, written at any number of ranks and ZeRO
                stage; True for the newest in ``output_dir`` that verifies; "auto" for that one, or
                a fresh start where there is none; False starts afresh; None does what the
                argument of the same name says.
            trial: of a hyperparameter search, for ``model_init``; or hyperparameters by name, to
                be used in place of the arguments in this training.
            ignore_keys_for_eval: ``ignore_keys`` of evaluations during this training.
            **kwargs: ``model_path``, the old name of ``resume_from_checkpoint``.

        Returns:
            ``TrainOutput(global_step, training_loss, metrics)``.

        Raises:
            DataError: no training data, or an empty one.
            TrainingError: the loss became NaN (see the ``nan_loss`` argument).
            CheckpointError: nothing to resume from, or a save failed (see ``save_failure``).
            Preempted: a signal ended the run, which has been saved if it had come to its first step
                (see ``preemption``). It is a ``SystemExit``.
        """
        resume_from_checkpoint = old_resume(resume_from_checkpoint, kwargs)
        self._refuse_misfits()  # a method may have been put in the place of another since
        self._check_generation_config()
        self.ignore_keys_for_eval = ignore_keys_for_eval
        self._take_up_trial(trial)
        with self._watching_ranks("the preparation of training"):
            if self.model_init is not None:
                self._renew_model(trial)
            watch = self._watch_signals()
            self.preempted = False
            with watch.watching():
                with held_lock(self.output_lock, takes=self.args.should_save):
                    output = self._train(resume_from_checkpoint)
                end = self._preempted_exit(watch)
                if end is not None:
                    note_ending(end.status)
        if end is not None:
            raise end
        return output

    @property
    def tokenizer(self) -> ProcessingClass:
        """Return ``processing_class``, whose old name this is."""
        return self.processing_class

    # --- behind the edge ------------------------------------------------------------------------

    def _train(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        """Train once, with this run's output folder locked; leave a model that can be used."""
        args = self.args
        self.checkpoints.begin(args, is_read=self.events.read_checkpoints())
        self._memory.start("train")
        done = False
        try:
            with training_features(self.model, args):
                self.fitted = None
                reader = reader_for(args, self.resolved)
                begin = find_start(args, resume_from_checkpoint, self.ranks, reader)
                found = None if begin is None else begin.state.train_batch_size
                if args.auto_find_batch_size and found:
                    self.fitted = found_before(args, self._resolve(None), found)
                    self.resolved = self._resolve(None)
                loop = self._prepare_training(begin)
                self.is_in_train = True
                started = time.time()
                with self._watches.following(loop):
                    self._run(loop)
                self.preempted, self._has_saved_for_signal = loop.preempted, loop.can_go_on
                self.checkpoints.wait()
                keep_folder(self.output_lock, takes=args.should_save)
                self.checkpoints.report_missing()
                if self.preempted:
                    step, before = self.state.global_step, loop.steps_before
                    self.checkpoints.check_saved(step, steps_before=before)
                else:
                    self._finish_publishing()
                output = self._finish_training(loop, started)
            done = True
            return output
        except TrainingError:
            if self.state.global_step:  # what was logged until then shows what went wrong
                try:
                    self.save_state()
                except TrainingError as error:
                    logger.error("%s", error)
            raise
        finally:
            self.is_in_train = False
            self._engines.settle(done=done)
            self._memory.stop("train")
            if self.hp_search_backend is None:
                self._leave_trial()  # a search evaluates with its arguments first
            self.checkpoints.close()

    def _run(self, loop: TrainLoop) -> None:
        """Run the loop; with ``auto_find_batch_size`` go on where memory runs out."""
        if not self.args.auto_find_batch_size:
            loop.run()
            return
        run_with_recovery(
            loop,
            self.model,
            self.ranks,
            Rebuilding(
                self.checkpoints.pause,
                self.close,
                partial(self._rebuild, max_steps=loop.settings.max_steps),
            ),
            micro_batch=self.resolved.micro_batch_size,
            accumulation=self.resolved.accumulation,
            timeout_seconds=self.args.ddp_timeout,
        )

    def _refuse_misfits(
        self, unnamed: tuple[object, ...] = (), functions: Functions | None = None
    ) -> None:
        """Refuse overrides and functions that nothing calls, or that cannot be called as they are.

        Older overrides that can be called without the arguments they do not know will be.

        Args:
            unnamed: arguments of the constructor beyond those that all releases have in one order.
            functions: what was passed to the constructor; None where that has been looked at.

        Raises:
            ConfigError: listing all of it.
        """
        problems = ignored_overrides(type(self), unnamed)
        metrics = self.compute_metrics if functions is None else functions.compute_metrics
        wants_predictions = metrics is not None and not self.args.prediction_loss_only
        served, misfits = serve_overrides(self._overridden(), wants_predictions=wants_predictions)
        for name, override in served.items():
            setattr(self, name, override)
        problems += misfits
        problems += [] if functions is None else misfits_of(functions)
        raise_problems(problems)
