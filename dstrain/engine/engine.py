"""The adapter around a DeepSpeed engine: built from a resolved config, stepped, read, torn down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.engine.buffers import Buffers
from dstrain.engine.formats import check_formats
from dstrain.engine.leaf import check_leaf_modules
from dstrain.engine.metric_schedule import guarded
from dstrain.engine.optimizers import adagrad_stays, group_of, keep_adagrad, optimizer_factory
from dstrain.engine.progress_state import read_begun
from dstrain.engine.quiet import quiet
from dstrain.engine.scalars import clip_scalars_too, scalars_as_bytes
from dstrain.engine.stage_zero import repair_if_needed
from dstrain.engine.zero import ZeroThreeMark, forget_process_wide_settings, has_scalars

SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did.

    Attributes:
        applied: False when gradients were not finite; weights, optimizer and schedule then stayed.
        grad_norm: global gradient norm before clipping, a device tensor or a float; None when it
            was not asked for and is not to be had for free.
    """

    applied: bool
    grad_norm: torch.Tensor | float | None


class Engine:
    """A DeepSpeed engine that trains ``module``.

    The caller runs ``engine.model(**inputs)`` and ``backward(loss, last=...)`` per micro-batch,
    then ``step()``. Losses are already weighted: DeepSpeed averages gradients over ranks and does
    nothing else to them.
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
        """Build the engine; at stage 3 a whole module becomes partitioned here.

        Args:
            module: the model, whole or already partitioned by zero.Init.
            resolved: the config; final.
            groups: parameter groups for the optimizer of the config.
            optimizer: the user's own optimizer, instead of ``groups``.
            scheduler: a function of the basic optimizer, or the user's own scheduler; None leaves
                it to the config.
            trains: False builds no optimizer.
        """
        import deepspeed

        check_leaf_modules(module, resolved)
        check_formats(module, resolved, trains=trains)
        config = resolved.to_deepspeed()
        if "activation_checkpointing" in config:
            # DeepSpeed reads this block only when it is asked to, and not while it builds.
            deepspeed.checkpointing.configure(None, deepspeed_config=config)
        if not trains:
            config.pop("optimizer", None)
            config.pop("scheduler", None)
        factory = optimizer_factory(resolved) if trains and optimizer is None else None
        if factory is not None:
            config.pop("optimizer", None)
        if optimizer is not None:
            keep_adagrad(optimizer)
        if resolved.has_scheduler:
            scheduler = None
        scalars = has_scalars(module.parameters())
        with quiet(), adagrad_stays(), scalars_as_bytes(wanted=scalars):
            self._engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
                model=module,
                model_parameters=groups if optimizer is None else None,
                optimizer=factory if optimizer is None else optimizer,
                lr_scheduler=guarded(scheduler),
                config=config,
            )
        self.module = module
        self.resolved = resolved
        # With plain fp32 and stage 0 DeepSpeed keeps no norm, so it is computed on request.
        self._norm_by_hand = resolved.stage == 0 and resolved.precision == "fp32"
        if self._norm_by_hand and scalars:
            clip_scalars_too(self._engine)
        self._mark = ZeroThreeMark(resolved)
        self._repair = repair_if_needed(self.optimizer) if trains else None
        # What arguments said, to be told from what training makes of it.
        self.begun = read_begun(self) if trains else None
        # As DistributedDataParallel, which sends them unless it is told not to.
        sends = resolved.value("ddp_broadcast_buffers") is not False
        self._buffers = Buffers(module, sends=sends) if trains else None

    @property
    def model(self) -> Any:
        """What to call for a forward pass (``DeepSpeedEngine``)."""
        return self._engine

    @property
    def buffers(self) -> Buffers:
        """The buffers of the module; of an engine that trains."""
        assert self._buffers is not None
        return self._buffers

    def compile(self, backend: str, mode: str | None) -> None:
        """Compile the module's forward where it stands: names of its parameters stay the same."""
        kwargs = {} if mode is None else {"mode": mode}
        self._engine.compile(backend=backend, compile_kwargs=kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Back-propagate one micro-batch; ``last`` marks the end of the accumulation window."""
        if self._repair is not None:
            loss = self._repair.scale(loss)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, *, want_norm: bool = False) -> StepOutcome:
        """Clip, update weights and schedule, clear gradients; first make buffers agree."""
        self.buffers.after_micro_batches(self._engine.global_steps + 1)
        norm: torch.Tensor | float | None = None
        if want_norm and self._norm_by_hand:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        if self._repair is not None:
            norm = self._repair.unscaled(norm)
            self._repair.after_step()
        return StepOutcome(applied=self._engine.was_step_applied(), grad_norm=norm)

    def learning_rates(self) -> list[float]:
        """The learning rate of each parameter group, to be used by the next step."""
        return [float(g["lr"]) for g in self.optimizer.param_groups]

    def group_of(self, parameter: torch.nn.Parameter) -> dict[str, Any] | None:
        """The parameter group that updates a parameter of the module; None for a frozen one."""
        return group_of(self.optimizer, parameter)

    def loss_scale(self) -> float | None:
        """The current fp16 loss scale; None in other formats."""
        if self.resolved.precision != "fp16":
            return None
        return float(self.optimizer.loss_scale)

    def destroy(self) -> None:
        """Let go of DeepSpeed's buffers and hooks; the module keeps its weights.

        A partitioned module stays partitioned and can be given to a new engine.
        """
        self._engine.destroy()
        # DeepSpeed leaves these behind: they would keep the engine with its master weights alive,
        # and run at every forward pass of the module.
        for name in ("module_forward_pre_hook", "module_forward_post_hook"):
            hook = getattr(self._engine, name, None)
            if hook is not None:
                hook.remove()
        for parameter in self.module.parameters():
            parameter.__dict__.pop("_z3_optimizer", None)
        if self.module._compiled_call_impl is not None:
            self.module._compiled_call_impl = None  # compiled with this engine's hooks in it
        self._mark.close()
        forget_process_wide_settings(self.module, self.resolved)
        self._engine = None
        self._buffers = None
        self.optimizer = None
        self.scheduler = None


def inference_engine(module: torch.nn.Module, resolved: ResolvedConfig) -> Engine:
    """An engine without optimizer that can only run forward, for a partitioned module."""
    return Engine(module, resolved, trains=False)
