"""Training engine: DeepSpeed's engine with dstrain's corrections and additions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import Problem, TrainingError
from dstrain.engine import live_engines
from dstrain.engine.buffers import Buffers
from dstrain.engine.construction import SchedulerFactory, build_deepspeed_engine, check_model
from dstrain.engine.optimizers import group_of
from dstrain.engine.state import TrainingState
from dstrain.engine.stepping import (
    GradientClipping,
    ModuleOrderWatch,
    TrainingPasses,
    gradient_sequence,
    no_second_gradient,
    stage_zero_correction,
)
from dstrain.engine.weight_watch import WeightChanges, watching_partitioned_reads
from dstrain.engine.zero import (
    ForwardRegistration,
    MemoryEfficientLinear,
    detach_engine,
    forget_running_modules,
    is_partitioned,
    keep_persistent_changes,
    marked_leaves,
    process_settings,
    undo_patches,
)


@dataclass(frozen=True)
class StepOutcome:
    """Result of an optimizer step.

    Attributes:
        applied: False if gradients were not finite; weights, optimizer and schedule are then
            unchanged.
        grad_norm: global gradient norm before clipping, a device tensor or a float; None if it was
            not asked for and DeepSpeed has not computed it anyway.
    """

    applied: bool
    grad_norm: torch.Tensor | float | None


class Engine:
    """A DeepSpeed engine that trains ``module``.

    The caller runs ``engine.model(**inputs)`` and ``backward(loss, last=...)`` per micro-batch,
    then ``step()``. The caller also weights the losses of micro-batches; DeepSpeed only averages
    gradients over ranks.

    A module has one engine at a time: building another one destroys the previous one.

    Attributes:
        changes: copies weights that the user's code changes into the master weights; None where the
            optimizer updates the model's weights directly.
        in_use: whether a training is running, so that the engine must not be destroyed.
        is_released: whether the engine has removed its hooks and attributes from the module; its
            state can still be read then.
        owner: returns the owner's function that closes the engine in good order, or None once the
            owner has been garbage-collected; None if the engine has no owner.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        resolved: ResolvedConfig,
        *,
        groups: list[dict[str, Any]] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: SchedulerFactory | Any | None = None,
        trains: bool = True,
    ) -> None:
        """Build the engine; at stage 3 this partitions a module that is whole.

        Args:
            module: the model, whole or already partitioned by zero.Init.
            resolved: the config, which must not change afterwards.
            groups: parameter groups for the optimizer of the config.
            optimizer: an optimizer that the user has built, instead of ``groups``.
            scheduler: a scheduler that the user has built, or a function that makes one from the
                optimizer; None uses the scheduler of the config, if any.
            trains: False for an engine that only runs forward, without an optimizer.
        """
        check_model(module, resolved, trains=trains)
        live_engines.hand_over_module(module)
        self.module = module
        self.resolved = resolved
        self._leaves = marked_leaves(module)
        self._linear: MemoryEfficientLinear | None = None
        self._registration: ForwardRegistration | None = None
        self.changes: WeightChanges | None = None
        self._module_order: ModuleOrderWatch | None = None
        try:
            self._engine, self.optimizer, self.scheduler = build_deepspeed_engine(
                module,
                resolved,
                groups=groups,
                optimizer=optimizer,
                scheduler=scheduler,
                trains=trains,
            )
        except BaseException:
            self._detach()
            raise
        self._clipping = GradientClipping(self._engine, module, resolved, trains=trains)
        self._stage_zero = stage_zero_correction(self.optimizer) if trains else None
        self._sequence = gradient_sequence(self.optimizer, module) if trains else None
        self._passes = TrainingPasses(self._engine, module)
        buffers = Buffers(module, sends=resolved.broadcasts_buffers) if trains else None
        self._state = None if buffers is None else self._make_state(buffers)
        self._linear = MemoryEfficientLinear(resolved)
        if resolved.stage == 3:
            self._registration = ForwardRegistration(module, resolved)
            self._module_order = ModuleOrderWatch(
                self.optimizer, module, patience_seconds=resolved.timeout_seconds
            )
            if self._sequence is not None:
                self._sequence.before_end = self._module_order.end_of_backward
        self._compiled_by: dict[str, Any] | None = None
        self.in_use = self.is_released = self._has_computed = False
        self.owner: Callable[[], Callable[[], None] | None] | None = None
        # Keeps this object alive as long as DeepSpeed's engine, which the hooks reference.
        self._engine.__dict__["engine_of_dstrain"] = self
        # In fp32 at stage 0 the optimizer updates the model's weights directly.
        if trains and (resolved.stage > 0 or resolved.precision != "fp32"):
            self.changes = WeightChanges(module, self.optimizer, stage=resolved.stage)
        live_engines.register(self)

    @property
    def model(self) -> Any:
        """Return the ``DeepSpeedEngine``, which the caller calls for a forward pass."""
        return self._engine

    @property
    def state(self) -> TrainingState:
        """Return master weights, moments, counters and schedule; the engine must train."""
        assert self._state is not None
        return self._state

    @property
    def buffers(self) -> Buffers:
        """Return the buffers of the module; the engine must train."""
        return self.state.buffers

    def _make_state(self, buffers: Buffers) -> TrainingState:
        """Return access to the state, which copies changed weights before it is read."""

        def settle_weights() -> None:
            if self.changes is not None:
                self.changes.update_master_weights()

        return TrainingState(
            self.module,
            self._engine,
            precision=self.resolved.precision,
            buffers=buffers,
            settle_weights=settle_weights,
        )

    def compile(self, backend: str, mode: str | None) -> None:
        """Compile the module's forward pass in place, which keeps the names of its parameters."""
        kwargs = {} if mode is None else {"mode": mode}
        self._compiled_by = {"backend": backend, **kwargs}
        if self.changes is not None:
            # Compiled code calls no function of torch that could be watched.
            self.changes.knows_step = True
        if self._registration is not None:  # torch would compile hooks of the module as well
            self._registration.remove()
            self._registration = ForwardRegistration(self._engine, self.resolved)
        if self._module_order is not None:
            self._module_order.close()
        self._engine.compile(backend=backend, compile_kwargs=kwargs)

    def computing_loss(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager for computing the loss of a micro-batch.

        At stage 3 the first one raises an error where the loss reads partitioned parameters.
        """
        if self._has_computed or self.resolved.stage != 3:
            return contextlib.nullcontext()
        self._has_computed = True
        return watching_partitioned_reads(self._engine, self.module)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Run the backward pass of a micro-batch.

        Args:
            loss: the loss.
            last: whether this is the last micro-batch before the optimizer step.
        """
        if self._stage_zero is not None:
            loss = self._stage_zero.scale(loss)
        self._engine.set_gradient_accumulation_boundary(last)
        order = (
            contextlib.nullcontext() if self._sequence is None else self._sequence.backward(loss)
        )
        with self._passes.training_pass(loss), order:
            try:
                self._engine.backward(loss, scale_wrt_gas=False)
            except RuntimeError as error:
                if self._module_order is not None:
                    self._module_order.explain(error)
                if self.resolved.stage == 3 and self._passes.has_graph:
                    raise no_second_gradient() from error
                raise

    def clip(self, *, want_norm: bool = False) -> None:
        """Clip gradients before ``step`` at stage 0 in fp32; otherwise DeepSpeed clips in ``step``.

        Args:
            want_norm: whether to compute the gradient norm before clipping, for ``step`` to return.
        """
        self._clipping.clip(want_norm=want_norm)

    def step(self, *, want_norm: bool = False) -> StepOutcome:
        """Send changed buffers, clip, update weights and schedule, and clear gradients.

        Args:
            want_norm: whether to return the gradient norm even if it must be computed for that.
        """
        self.buffers.send_changed()
        if self.changes is not None:
            self.changes.before_step()
        self.clip(want_norm=want_norm)
        norm: torch.Tensor | float | None = self._clipping.finish()
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        if self._stage_zero is not None:
            norm = self._stage_zero.unscaled(norm)
            self._stage_zero.after_step()
        return StepOutcome(applied=self._engine.was_step_applied(), grad_norm=norm)

    def learning_rates(self) -> list[float]:
        """Return the learning rate of each parameter group for the next step."""
        return self.state.learning_rates()

    def group_of(self, parameter: torch.nn.Parameter) -> dict[str, Any] | None:
        """Return the optimizer's parameter group of a parameter; None for a frozen one."""
        return group_of(self.optimizer, parameter)

    @property
    def is_destroyed(self) -> bool:
        """Tell whether ``destroy`` was called, after which the engine cannot be used."""
        return self._engine is None

    def release_module(self) -> None:
        """Remove the engine's hooks and attributes from the module after a training.

        Ordinary torch code can use the module then; optimizer, schedule and counters can still be
        read. Only ends the training at stage 3, where hooks must gather each layer's parameters.
        """
        self.in_use = False
        if self.is_released or self.resolved.stage == 3:
            return
        self._detach()
        if self._compiled_by is not None:
            self.module._compiled_call_impl = None  # compiled with this engine's hooks in it
            self.module.compile(**self._compiled_by)
        for name in ("forward", "backward", "step"):
            setattr(self._engine, name, _has_ended)
        self.is_released = True

    def has_interrupted_pass(self) -> bool:
        """Tell whether a forward or backward pass at stage 3 was interrupted."""
        if self.resolved.stage != 3:
            return False
        parameters: Any = self.module.parameters()
        return any(
            p.ds_active_sub_modules or p.ds_status.name == "INFLIGHT"
            for p in parameters
            if is_partitioned(p)
        )

    def hand_over(self) -> None:
        """Close the engine by its owner's function, and destroy it, to free the module."""
        close = None if self.owner is None else self.owner()
        if close is not None:
            close()
        self.destroy()

    def destroy(self) -> None:
        """Free DeepSpeed's buffers and remove its hooks; the module keeps its weights.

        A partitioned module stays partitioned and can be given to a new engine. No rank waits for
        another.
        """
        if self._engine is None:
            return
        keep_persistent_changes(self.module.parameters())
        self._engine.destroy()
        if not self.is_released:
            self._detach()
        if self._compiled_by is not None:
            self.module._compiled_call_impl = None
        # DeepSpeed's engine calls destroy() again when it is garbage-collected, which would remove
        # the hooks of the next engine.
        self._engine.destroy = _do_nothing
        del self._engine.__dict__["engine_of_dstrain"]
        live_engines.unregister(self)
        if self._sequence is not None:
            self._sequence.close()
        self._engine = None
        self._sequence = None
        self._state = None
        self.optimizer = None
        self.scheduler = None

    def _detach(self) -> None:
        """Remove DeepSpeed's hooks and attributes from the module, and reset process settings."""
        if self.changes is not None:
            self.changes.close()
        if self._registration is not None:
            self._registration.remove()
        if self._module_order is not None:
            self._module_order.close()
        if self._linear is not None:
            self._linear.close()
        undo_patches()
        detach_engine(self.module, leaves=self._leaves)
        forget_running_modules(self.module)
        process_settings.reset(self.resolved, others=live_engines.any_besides(self))


def _has_ended(*_: object, **__: object) -> None:
    """Raise an error; stands for the methods of an engine whose training has ended."""
    raise TrainingError(
        Problem(
            "forward(), backward() or step() of an engine whose training has ended",
            "its model was given back to ordinary torch code",
            "call trainer.model, or train() of the Trainer",
        )
    )


def _do_nothing() -> None:
    """Do nothing; stands for a method that must not run again."""


def inference_engine(module: torch.nn.Module, resolved: ResolvedConfig) -> Engine:
    """Return an engine without an optimizer, which runs forward passes of a partitioned module."""
    return Engine(module, resolved, trains=False)
