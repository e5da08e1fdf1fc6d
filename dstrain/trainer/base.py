"""Base of all parts of ``Trainer``: declares each shared attribute once, and tells events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.config import ResolvedConfig
from dstrain.config.resolution.running import ShownArguments
from dstrain.core.ranks import Ranks
from dstrain.data import Collator, InputFormats, LossTargets
from dstrain.reporting.memory import MemoryMetrics
from dstrain.trainer.checkpointing import RunCheckpoints
from dstrain.trainer.engines import EngineKeeper
from dstrain.trainer.events import Events
from dstrain.trainer.signatures import METHODS, Overridden, is_ours
from dstrain.trainer.user_optimizer import UserOptimizer
from dstrain.training.label_smoothing import LabelSmoothing
from dstrain.training.loss_terms import LossTerms
from dstrain.training.preemption import Preemption
from dstrain.training.types import Dataset, Nested, Optimizer, ProcessingClass, Scheduler, Trial
from dstrain.training.watches import RankWatches

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

    from dstrain.trainer.compat import TrainOutput


class TrainerBase:
    """Declares what the parts of a ``Trainer`` share; ``Trainer.__init__`` sets it.

    ``Trainer`` describes the attributes that users read. The others:

    Attributes:
        ranks: rank, local rank and world size of this process.
        events: callbacks, and how they are called.
        checkpoints: those of the training that runs or ran last.
        targets: what the loss is a mean over.
        processing_class: tokenizer or processor; saved with the model.
        data_collator: list of samples -> batch.
        train_dataset: map-style dataset or stream.
        eval_dataset: map-style dataset or stream, or a dict of several by name.
        model_init: makes the model anew for each training, or None.
        compute_loss_func: the user's (outputs, labels, num_items_in_batch) -> loss, or None.
        compute_metrics: the user's prediction -> metrics, or None.
        preprocess_logits_for_metrics: the user's (logits, labels) -> logits, or None.
        optimizer_cls_and_kwargs: class and keyword arguments of the user's own optimizer, or None.
        ignore_keys_for_eval: outputs that are no predictions, in evaluations of this training.
    """

    args: TrainingArguments
    ranks: Ranks
    model: torch.nn.Module
    resolved: ResolvedConfig
    state: TrainerState
    control: TrainerControl
    events: Events
    checkpoints: RunCheckpoints
    targets: LossTargets
    processing_class: ProcessingClass
    data_collator: Collator
    train_dataset: Dataset
    eval_dataset: Dataset
    model_init: Callable[..., torch.nn.Module | None] | None
    compute_loss_func: Callable[..., torch.Tensor] | None
    compute_metrics: Callable[..., dict[str, Any]] | None
    preprocess_logits_for_metrics: Callable[[Nested, Nested], Nested] | None
    optimizer: Optimizer
    lr_scheduler: Scheduler
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None
    ignore_keys_for_eval: list[str] | None = None
    is_in_train: bool = False
    model_accepts_loss_kwargs: bool
    fitted: tuple[int, int] | None = None
    preempted: bool = False
    sequence_length: int | None = None

    _engines: EngineKeeper
    _user: UserOptimizer
    _memory: MemoryMetrics
    _watches: RankWatches
    _shown: ShownArguments  # to callbacks
    _preemption: Preemption | None = None  # of the training that runs, or ran last
    _formats: InputFormats
    _smoothing: LabelSmoothing | None
    _counted: tuple[torch.nn.Module, int] | None = None  # elements that ``floating_point_ops`` uses
    _terms: LossTerms | None = None

    # --- what parts call, and later parts define --------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Trial = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train; see ``Trainer``."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete Hugging Face folder; see ``SaveHooks``."""
        raise NotImplementedError

    # --- events -----------------------------------------------------------------------------------

    def event(self, name: str, **kwargs: Any) -> TrainerControl:
        """Tell callbacks of an event; return what they want done.

        Args:
            name: such as "on_step_end".
            **kwargs: values that this event passes besides arguments, state and control.
        """
        engine = self._engines.training
        changes = None if engine is None or engine.is_released else engine.changes
        taking_changes = contextlib.nullcontext() if changes is None else changes.in_callbacks()
        with taking_changes, self._shown.of(self.args, self.resolved) as args:
            self.control = self.events.tell(name, args, self.state, self.control, **kwargs)
        self.events.look_for_frozen(name)
        return self.control

    def _show_objects(self, loader: object) -> None:
        """Give callbacks the model, optimizer, schedule and training loader in use.

        Args:
            loader: None where no training runs.
        """
        self.events.hold(self.model, self.optimizer, self.lr_scheduler, loader)

    # --- ranks ------------------------------------------------------------------------------------

    def is_world_process_zero(self) -> bool:
        """Tell whether this is rank 0 of all machines."""
        return self.ranks.is_main

    def is_local_process_zero(self) -> bool:
        """Tell whether this is the first rank of its machine."""
        return self.ranks.is_local_main

    def _watching_ranks(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Watch a block, so that a rank that hangs in it is named; ``what`` describes it."""
        step, timeout = self.state.global_step, self.args.ddp_timeout
        return self._watches.over(what, step=step, timeout_seconds=timeout)

    # --- overrides --------------------------------------------------------------------------------

    def _overrides(self, name: str) -> bool:
        """Tell whether a subclass, or code that set an attribute, has replaced a method of ours."""
        owner = next(part for part in type(self).__mro__ if name in vars(part))
        return not is_ours(owner) or name in vars(self)

    def _overridden(self) -> Iterator[Overridden]:
        """Yield the methods that a user has replaced, with ours, both bound."""
        cls = type(self)
        for name in METHODS:
            owners = [part for part in cls.__mro__ if name in vars(part)]
            ours = next((part for part in owners if is_ours(part)), None)
            if ours is None or (owners[0] is ours and name not in vars(self)):
                continue
            base = vars(ours)[name].__get__(self, cls)
            yield Overridden(name, getattr(self, name), base, f"{cls.__name__}.{name}")
