"""The public ``Trainer``: the edge where users meet the rooms behind it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import CheckpointWriter, RunLock, check_there, held_by_one
from dstrain.config import ResolvedConfig
from dstrain.core.adapters import inner_model
from dstrain.core.errors import ConfigError, DataError, Problem, TrainingError
from dstrain.core.files import writing
from dstrain.core.launcher import note_saved
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none, barrier, require_equal, sum_over_ranks
from dstrain.core.seeds import seed_everything, seed_rank
from dstrain.core.stop import PREEMPTED, Preempted
from dstrain.data import InputFormats, takes_target_count
from dstrain.engine import (
    Engine,
    MetricSchedule,
    check_versions,
    device_name,
    device_type,
    main_ranks_buffers,
)
from dstrain.models import check_writable, guard_partitioned, save_model, unsaved_remark
from dstrain.reporting.memory import MemoryMetrics
from dstrain.trainer import build, compat, saving
from dstrain.trainer.adapter_hooks import AdapterHooks
from dstrain.trainer.attributes import OtherAttributes
from dstrain.trainer.best import BestModel
from dstrain.trainer.cache import KeyValueCache
from dstrain.trainer.counting import CountHooks, count_whole_parameters
from dstrain.trainer.engines import EngineKeeper, check_parts, make_ordinary
from dstrain.trainer.evaluating import EvaluationHooks
from dstrain.trainer.events import Events
from dstrain.trainer.features import check_features, training_features
from dstrain.trainer.fitting import (
    begin_with_found,
    check_fitting,
    fitted_arguments,
    run_fitting,
)
from dstrain.trainer.generation import changing, check_generation_config
from dstrain.trainer.loop import TrainLoop
from dstrain.trainer.loss_terms import LossTerms
from dstrain.trainer.model_init import check_source, check_whole, fresh_model, num_arguments
from dstrain.trainer.old_names import old_resume, one_name
from dstrain.trainer.optimizer_hooks import OptimizerHooks, OwnObjects
from dstrain.trainer.overrides import refuse_misfits, warn_of_own_saves
from dstrain.trainer.plan import MicroStep, RunPlan
from dstrain.trainer.position import Position
from dstrain.trainer.preemption import Preemption
from dstrain.trainer.processors import align_special_tokens, processor_writer
from dstrain.trainer.publishing import HubHooks
from dstrain.trainer.reports import ReportHooks
from dstrain.trainer.search import SearchHooks
from dstrain.trainer.separation import flattened, mixes_sequences
from dstrain.trainer.signatures import Functions, serve_loss_function
from dstrain.trainer.smoothing import LabelSmoothing
from dstrain.trainer.stepping import StepHooks
from dstrain.trainer.watches import RankWatches, watched

logger = get_logger(__name__)


class Trainer(
    StepHooks,
    EvaluationHooks,
    OptimizerHooks,
    AdapterHooks,
    ReportHooks,
    CountHooks,
    SearchHooks,
    HubHooks,
    OtherAttributes,
):
    """Trains and evaluates a model with DeepSpeed; the surface of transformers' Trainer.

    Attributes:
        model: the core model, always.
        model_wrapped: what runs forward passes: the DeepSpeed engine while it is on the model.
        args: the user's arguments.
        state: transformers' ``TrainerState``.
        control: transformers' ``TrainerControl``.
        optimizer: the optimizer in use, or None before training.
        lr_scheduler: the schedule in use, or None before training.
        is_in_train: whether ``train`` is running.
        is_model_parallel: False: a model is not spread over devices layer by layer here.
        model_accepts_loss_kwargs: whether ``forward`` is given ``num_items_in_batch``.
        place_model_on_device: False: the engine places the model.
        fitted: what ``auto_find_batch_size`` found in the training that runs or ran last, as
            (micro-batch, accumulation) in the units of the arguments; None where those fit.
        preempted: whether a signal ended the last ``train`` early (``preemption``).
        sequence_length: tokens of one sample, where a subclass knows them (None: unknown); for
            ``zero_stage="auto"``, which else keeps a share of the memory for activations.
    """

    state: Any
    control: Any
    sequence_length: int | None = None
    is_model_parallel = False
    place_model_on_device = False

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., torch.nn.Module] | None = None,
        *unnamed: Any,
        tokenizer: Any = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        """Start the ranks and check what can be checked before anything expensive.

        Args:
            model: a ``PreTrainedModel``, or any module that returns a loss, a tuple that begins
                with one, or a ``ModelOutput``.
            args: defaults to ``TrainingArguments("tmp_trainer")``.
            data_collator: list of samples -> batch.
            train_dataset: map-style dataset or stream.
            eval_dataset: likewise.
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
        with self._watches.over(
            "the construction of the trainer", step=0, timeout_seconds=self.args.ddp_timeout
        ):
            check_versions()  # where the group was there already
            functions = Functions(
                compute_loss_func=compute_loss_func,
                # One that is called with batches takes another argument: ``_check_evaluation``.
                compute_metrics=None if self.args.batch_eval_metrics else compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                data_collator=data_collator,
                callbacks=callbacks or (),
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
            refuse_misfits(self, unnamed, functions)
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
                    check_there(self.args.resume_from_checkpoint, Path(self.args.output_dir))
            seed_everything(self.args.seed)
            self.model_init = model_init
            self.model = self._fresh_model(None) if model is None else model
            self.compute_loss_func = serve_loss_function(compute_loss_func)
            self.train_dataset = train_dataset
            self.eval_dataset = eval_dataset
            self.processing_class = processing_class
            self.compute_metrics = compute_metrics
            self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
            self.data_collator = data_collator or build.default_collator(processing_class)
            self.optimizer, self.lr_scheduler = optimizers
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
            self._own = OwnObjects(self, *optimizers)
            self._note_model()
            check_features(self.model, self.args, device=device_type())
            self.fitted: tuple[int, int] | None = None
            # Before the model is touched: a config that cannot be used must not cost a model load.
            self.resolved: ResolvedConfig = self._resolve(None)
            check_parts(self.model, self.resolved)
            saving.check_hooks(self.model, self.args, self.resolved)
            build.check_formats_of(self.model, self.resolved, self.ranks)
            check_fitting(self.args, self.resolved)
            build.check_passed(self.args, optimizers, optimizer_cls_and_kwargs, self.resolved)
            self._check_evaluation()
            self.is_in_train = self.preempted = self._said_unsaved = False
            self._engines = EngineKeeper(self.close, patience_seconds=self.args.ddp_timeout)
            self._micro_step = MicroStep()
            self._writer: CheckpointWriter | None = None
            self._lock: RunLock | None = None
            self.missing_checkpoints: tuple[int, ...] = ()
            self.last_save_failed = False
            self.events = Events(self, callbacks)
            self.best = BestModel(self)
            self._begin_publishing()
            self.events("on_init_end")
            self._memory.stop("init")

    # --- what a user calls ----------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train for ``num_train_epochs`` or ``max_steps``; may be called again.

        Args:
            resume_from_checkpoint: a checkpoint's folder, written at any number of ranks and ZeRO
                stage; True for the newest in ``output_dir`` that verifies; "auto" likewise, or a
                fresh start where there is none; False starts afresh; None does what the argument of
                the same name says.
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
            Preempted: a signal ended the run, which has been saved (see ``preemption``). It is a
                ``SystemExit``.
        """
        resume_from_checkpoint = old_resume(resume_from_checkpoint, kwargs)
        refuse_misfits(self)  # a method may have been put in the place of another since
        self._check_generation_config()
        self.ignore_keys_for_eval = ignore_keys_for_eval
        self._take_up_trial(trial)
        with self._watching_ranks("the preparation of training"):
            if self.model_init is not None:
                self._renew_model(trial)
            watch = Preemption(self.ranks, watches=self.args.preemption != "ignore")
            self.preempted, self._preemption = False, watch
            with watch.watching():
                output = self._train(resume_from_checkpoint)
                ends = self.preempted and self.args.preemption == "exit"
                if ends:
                    note_saved(PREEMPTED)
        if ends:
            raise Preempted(f"{watch.cause}: training has ended early and is saved")
        return output

    def _train(self, resume_from_checkpoint: str | bool | None) -> Any:
        with held_by_one(self.output_lock, takes=self.args.should_save):
            return self._train_alone(resume_from_checkpoint)

    def _train_alone(self, resume_from_checkpoint: str | bool | None) -> Any:
        self._writer = saving.make_writer(self)
        self._memory.start("train")
        self.missing_checkpoints, self.last_save_failed = (), False
        done = False
        try:
            with training_features(self.model, self.args):
                self.fitted = None
                start = saving.find_start(self, resume_from_checkpoint)
                begin_with_found(self, start)
                loop = self._prepare_training(start)
                self.is_in_train = True
                started = time.time()
                with self._watches.following(loop):
                    if self.args.auto_find_batch_size:
                        run_fitting(self, loop)
                    else:
                        loop.run()
                self.preempted = loop.preempted
                if self._writer is not None:
                    self._writer.wait()
                saving.keep_folder(self.output_lock, takes=self.args.should_save)
                self.missing_checkpoints, self.last_save_failed = saving.report_missing(
                    self._writer, self.ranks
                )
                if self.preempted:
                    saving.check_saved(self, self._writer, loop.steps_before)
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
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    @watched("saving the model")
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete Hugging Face folder at every ZeRO stage; all ranks must call it.

        Args:
            output_dir: instead of the run's own.
            _internal_call: do not upload it, whatever ``push_to_hub`` says.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not self._said_unsaved and (remark := unsaved_remark(self.model)) is not None:
            self._said_unsaved = True
            if self.ranks.is_main:
                logger.warning("%s", remark)
        with main_ranks_buffers(self.model):
            save_model(self.model, folder, self.ranks, on_each_node=self.args.save_on_each_node)
        write = processor_writer(self.processing_class, self.data_collator)
        with all_or_none():
            if self.args.should_save and write is not None:
                with writing(folder):
                    write(folder)
        if self.args.push_to_hub and not _internal_call:
            if folder != Path(self.args.output_dir):
                self.save_model(_internal_call=True)  # what is uploaded is the run's own folder
            self._publish_saved()

    def close(self, *, whole: bool | str = False) -> None:
        """Tear down the engine and free its memory; the model keeps its weights.

        ``train`` and ``evaluate`` work afterwards, with a new engine. An optimizer of the user's
        own has the model's parameters again, without state. At ZeRO stage 3 the model stays
        partitioned, which ordinary torch code cannot use.

        Args:
            whole: at stage 3 put the weights together, on every rank and its device, or on the
                device of this name, such as "cpu"; all ranks must call it then. They must fit.
        """
        self.optimizer, self.lr_scheduler = self._own.optimizer, self._own.scheduler
        self.events.hold(None)
        self._engines.close()
        self._own.give_back()
        self._release_eval_loaders()
        if whole:
            make_ordinary(self.model, whole if isinstance(whole, str) else None)

    @property
    def model_wrapped(self) -> Any:
        """Return the DeepSpeed engine while it is on the model, else the model."""
        engine = self._engines.training
        return self.model if engine is None or engine.rests else engine.model

    @property
    def deepspeed(self) -> Any:
        """Return the DeepSpeed engine of the training that runs or ran last, or None."""
        engine = self._engines.training
        return None if engine is None else engine.model

    @property
    def tokenizer(self) -> Any:
        """Return ``processing_class``, whose old name this is."""
        return self.processing_class

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
        """Make a new model by ``model_init``, which may take the trial of a search."""
        assert self.model_init is not None
        return self.model_init(trial) if num_arguments(self.model_init) else self.model_init()

    def propagate_args_to_deepspeed(self, auto_find_batch_size: bool = False) -> None:
        """Resolve the DeepSpeed config again, after a change of ``args``; training does so itself.

        Args:
            auto_find_batch_size: for drop-in use.
        """
        self.resolved = self._resolve(None)

    # --- what a subclass overrides --------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Make this rank's training loader.

        Raises:
            DataError: there is no training data, or it is empty.
        """
        if self.train_dataset is None:
            raise DataError(
                Problem("train() without train_dataset", "", "pass train_dataset to the Trainer")
            )
        return self._loader(self.train_dataset, train=True)

    # --- behind the edge ------------------------------------------------------------------------

    @property
    def output_lock(self) -> RunLock:
        """Return the lock of this run on its output folder."""
        folder, on_each_node = Path(self.args.output_dir), self.args.save_on_each_node
        self._lock = saving.lock_on(folder, self._lock, on_each_node=on_each_node)
        return self._lock

    def check_state(self) -> None:
        """Check, after the first step, that its optimizer's state can be saved; a collective."""
        engine = self._engines.training
        assert engine is not None
        saving.check_state(self, engine)

    def save_in_training(self, position: Position) -> None:
        """Save a checkpoint because a callback asked for it."""
        engine = self._engines.training
        assert engine is not None
        if self._writer is None:  # a callback's wish, with save_strategy="no"
            self._writer = saving.make_writer(self, wanted=True)
        assert self._writer is not None
        saving.save(self, engine, self._writer, position)
        self.events("on_save")

    def event(self, name: str, **kwargs: Any) -> Any:
        """Tell callbacks of an event; return the control object."""
        return self.events(name, **kwargs)

    def _fresh_model(self, trial: Any) -> torch.nn.Module:
        return fresh_model(self.call_model_init, self.args, trial)

    def _renew_model(self, trial: Any) -> None:
        """Replace the model by a new one; release the old one and all that holds its parameters."""
        self.close()
        self.model = self.optimizer = self.lr_scheduler = self._counted = None
        self._own = OwnObjects(self, None, None)
        self.events.hold(None)  # nothing holds the old one when the new one takes memory
        self.model = self._fresh_model(trial)
        self._note_model()

    def _note_model(self) -> None:
        """Find out what the trainer must know about its model."""
        check_whole(self.model)
        guard_partitioned(self.model, patience_seconds=self.args.ddp_timeout)
        self._check_generation_config()
        self.model_accepts_loss_kwargs = takes_target_count(self.model)
        self._smoothing = LabelSmoothing.of(self.model, self.args)
        self._terms = None
        own_loss = (
            self.compute_loss_func is None and type(self).compute_loss is Trainer.compute_loss
        )
        if own_loss and self._smoothing is None:
            self._terms = LossTerms.of(self.model)
        self.targets = build.targets_of(
            self.model,
            self.args,
            rule=None if self._terms is None else self._terms.rule(),
            own_loss=own_loss,
            is_told=self.compute_loss_func is not None or self.model_accepts_loss_kwargs,
        )
        self._formats = InputFormats(self.model, self.targets.labels)

    def _check_generation_config(self) -> None:
        if getattr(self.args, "generation_config", None) is None:  # which takes its place
            check_generation_config(self.model)

    def _prepare_training(self, start: saving.Start | None) -> TrainLoop:
        """Prepare everything before the first step: loader, config, engine, state."""
        assert self._preemption is not None
        self._align_special_tokens()
        self._own.notice()
        self.resolved = self._resolve(None)  # arguments may have changed since the last time
        with all_or_none():
            loader = self.get_train_dataloader()
        saving.check_shares(loader, self.ranks, start)
        # Accumulation may come from the user's DeepSpeed config, so it is read after resolving.
        max_steps, per_epoch = build.training_steps(loader, self.args, self.resolved.accumulation)
        require_equal("the length of the training data", (max_steps, per_epoch), DataError)
        if start is not None and self.args.max_steps <= 0:
            batch = self.resolved.global_batch_size
            max_steps = saving.steps_in_all(
                start, max_steps=max_steps, per_epoch=per_epoch, batch=batch
            )
        self.resolved = self._resolve(max_steps)
        check_parts(self.model, self.resolved)
        saving.check_hooks(self.model, self.args, self.resolved)
        with all_or_none():
            if self.ranks.is_main:
                build.record_resolved_config(self.resolved, self.args)
        if self.ranks.is_main:
            for warning in self.resolved.warnings:
                logger.warning("%s", warning)
            warn_of_own_saves(self)
            self._announce(loader, max_steps=max_steps)
        self.close()  # an engine of an earlier run must be gone before the new one takes memory
        engine = self._engines.train(lambda: self._build_engine(max_steps))
        self.optimizer, self.lr_scheduler = engine.optimizer, engine.scheduler
        count_whole_parameters(self.model)
        self._warn_of_mixing(engine.model)
        self.events.begin_run(loader, max_steps=max_steps, steps_per_epoch=per_epoch)
        self.best = BestModel(self)
        seed_rank(self.args.seed, step=0, rank=self.ranks.rank)
        resumption = None if start is None else saving.resume(self, engine, start)
        plan = RunPlan(
            max_steps=max_steps,
            steps_per_epoch=per_epoch,
            accumulation=self.resolved.accumulation,
            nan_loss=self.args.nan_loss,
            filter_bad=self.args.logging_nan_inf_filter,
            eval_on_start=self.args.eval_on_start,
            saves=self._writer is not None or self.args.preemption != "ignore",
            empty_cache_steps=self.args.torch_empty_cache_steps or 0,
            num_epochs=saving.num_epochs(self.args),
            log_every=int(self.state.logging_steps) if self.args.logging_strategy == "steps" else 0,
        )
        return TrainLoop(
            plan=plan,
            engine=engine,
            loader=loader,
            targets=self.targets,
            ranks=self.ranks,
            hooks=self,
            state=self.state,
            control=self.control,
            micro_step=self._micro_step,
            preemption=self._preemption,
            cache=KeyValueCache(self.model, used=self.args.use_cache),
            count_tokens=build.token_count(self.model, self.args, self.processing_class),
            resumption=resumption,
        )

    def _align_special_tokens(self) -> None:
        """Give the model its tokenizer's special tokens, at which generation then stops."""
        generation = getattr(self.model, "generation_config", None)
        with contextlib.nullcontext() if generation is None else changing(generation):
            changed = align_special_tokens(self.model, self.processing_class)
        if changed and self.ranks.is_main:
            logger.warning(
                "the model's special tokens were not those of the tokenizer; now they are, and are "
                "saved so: %s",
                ", ".join(f"{name}={token}" for name, token in changed.items()),
            )

    def _warn_of_mixing(self, model: Any) -> None:
        """Warn where padding-free batches go to a model that cannot keep sequences apart."""
        batch_of = flattened(self.data_collator)
        if batch_of is None:
            return
        mixes = mixes_sequences(model, self.model, batch_of, self._prepare_inputs)
        if mixes and self.ranks.is_main:
            logger.warning(
                "%s lets the sequences that %s puts into one row see each other: it does not heed "
                "their position_ids. To train on each alone, use a collator that pads",
                type(inner_model(self.model)).__name__,
                type(self.data_collator).__name__,
            )

    def _resolve(self, max_steps: int | None) -> ResolvedConfig:
        return build.resolve_config(
            fitted_arguments(self.args, self.fitted),
            self.ranks,
            module=self.model,
            sequence_length=self.sequence_length,
            num_training_steps=max_steps,
            own_optimizer=self._own.has_optimizer,
            own_scheduler=self._own.has_scheduler,
        )

    def _build_engine(self, max_steps: int) -> Engine:
        optimizer, scheduler = self._own.for_run(max_steps)
        return build.training_engine(
            self.model,
            self.resolved,
            optimizer=optimizer,
            scheduler=scheduler,
            decay_names=self.get_decay_parameter_names,
        )

    def _finish_training(self, loop: TrainLoop, started: float) -> Any:
        """Log final metrics and tell callbacks; speeds are of this run, not of one resumed from."""
        steps = loop.progress.step
        done = loop.steps_before
        own_samples = torch.tensor(loop.own_samples, device=device_name())
        metrics = compat.speed_metrics(
            "train",
            started,
            num_samples=int(sum_over_ranks(own_samples)),
            num_steps=steps - done,
            num_tokens=self.state.num_input_tokens_seen - loop.tokens_before,
        )
        metrics["total_flos"] = self.state.total_flos
        metrics["train_loss"] = loop.loss_sum / max(1, steps)
        if self.resolved.precision == "fp16" or loop.skipped_steps:
            metrics["train_skipped_steps"] = loop.skipped_steps
        if self.missing_checkpoints:
            metrics["missing_checkpoints"] = len(self.missing_checkpoints)
        metrics |= self._memory.stop("train")
        self.log(metrics)
        if self.args.load_best_model_at_end and not self.preempted:
            self.best.load(loop.engine, failed=self._writer.failed if self._writer else ())
        self.events("on_train_end")
        if self.preempted:
            self.save_state()
            barrier()  # the launcher ends all ranks once one has ended
        return compat.TrainOutput(steps, metrics["train_loss"], metrics)

    def _follow_metric(self, metrics: dict[str, float]) -> None:
        """Tell a schedule that follows a metric what an evaluation during training has found.

        Raises:
            ConfigError: the evaluation has no such metric.
        """
        if not isinstance(self.lr_scheduler, MetricSchedule) or self.state.global_step == 0:
            return
        name = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
        if name not in metrics:
            raise ConfigError(
                Problem(
                    f"metric_for_best_model={self.args.metric_for_best_model!r}",
                    f"the schedule follows it, and the evaluation has {', '.join(metrics)}",
                    "name one of these",
                )
            )
        self.lr_scheduler.step(metrics[name])

    def _loader(self, dataset: Any, *, train: bool) -> Any:
        description = "training" if train else "evaluation"
        lengths = build.lengths_of(dataset, self.args, self.processing_class) if train else None
        dataset, collate = build.prepare_dataset(
            dataset, self.data_collator, self.model, self.args, description=description
        )
        return build.make_loader(
            dataset, collate, self.resolved, self.args, self.ranks, train=train, lengths=lengths
        )
