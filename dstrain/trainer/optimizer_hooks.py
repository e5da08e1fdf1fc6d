"""Methods of a ``Trainer`` that make its optimizer and schedule, or tell about them."""

from __future__ import annotations

from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError, Problem
from dstrain.engine import decay_parameter_names, parameter_groups
from dstrain.trainer import build
from dstrain.trainer.base import TrainerBase
from dstrain.trainer.user_optimizer import UserOptimizer
from dstrain.training.types import Optimizer, Scheduler

_MAKERS = ("create_optimizer_and_scheduler", "create_optimizer", "get_optimizer_cls_and_kwargs")


class OptimizerHooks(TrainerBase):
    """Has the methods of transformers' Trainer about optimizer and schedule.

    Without an override DeepSpeed builds the optimizer that the config names. An override, an object
    or ``optimizer_cls_and_kwargs`` of the user's runs as given, or is refused; never replaced.
    """

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """Build the optimizer as an object, unless there is one; sets and returns ``optimizer``.

        Called in training only where it, ``create_optimizer_and_scheduler`` or
        ``get_optimizer_cls_and_kwargs`` is overridden, or ``optimizer_cls_and_kwargs`` was passed.
        At ZeRO stage 3 parameters may already be partitioned and then report the shape (0,).
        """
        if self.optimizer is None:
            module = self.model if model is None else model
            if self.optimizer_cls_and_kwargs is not None:
                cls, kwargs = self.optimizer_cls_and_kwargs
            else:
                cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, module)
            kwargs = dict(kwargs)
            if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
                # transformers takes a factory too: made without arguments, called with the model.
                self.optimizer = cls()(module, **kwargs)
                return self.optimizer
            groups = kwargs.pop("params", None)
            if groups is None:
                groups = parameter_groups(
                    module,
                    weight_decay=self.resolved.weight_decay,
                    decay_names=self.get_decay_parameter_names,
                )
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer = None) -> Scheduler:
        """Make the learning-rate schedule of ``optimizer``; the engine steps it."""
        if self.lr_scheduler is None:
            steered = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = build.scheduler_factory(self.args, num_training_steps)(steered)
        return self.lr_scheduler

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Set ``optimizer`` and ``lr_scheduler``; called in training where it is overridden."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: torch.nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the class that ``args.optim`` resolves to, and what its constructor takes.

        With optimizer offload that is the implementation for host cores. A collective of all ranks.
        """
        return build.optimizer_of(args)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of the parameters that weight decay applies to."""
        return decay_parameter_names(model)

    def get_learning_rates(self) -> list[float]:
        """Return the learning rate of each parameter group.

        Raises:
            ValueError: there is no optimizer yet.
        """
        return [float(group["lr"]) for group in self._set_up_optimizer().param_groups]

    def get_optimizer_group(self, param: torch.nn.Parameter | None = None) -> Any:
        """Return the group that updates ``param``, None if frozen; without ``param``, all groups.

        Under ZeRO the groups hold flat slices; the parameter is one of the model's all the same.

        Raises:
            ValueError: there is no optimizer yet.
        """
        optimizer = self._set_up_optimizer()
        if param is None:
            return [group["params"] for group in optimizer.param_groups]
        if self._engines.training is not None:
            return self._engines.training.group_of(param)
        groups = optimizer.param_groups
        return next((g for g in groups if any(p is param for p in g["params"])), None)

    def _set_up_optimizer(self) -> Optimizer:
        if self.optimizer is None:
            raise ValueError("Trainer optimizer is None, it is made when training starts.")
        return self.optimizer

    # --- behind the edge --------------------------------------------------------------------------

    @property
    def _makes_optimizer(self) -> bool:
        """Tell whether the user's code makes an optimizer for every training."""
        given = self.optimizer_cls_and_kwargs is not None
        return given or any(self._overrides(name) for name in _MAKERS)

    @property
    def _has_user_optimizer(self) -> bool:
        """Tell whether the optimizer is the user's own, and not the config's."""
        return self._user.optimizer is not None or self._makes_optimizer

    @property
    def _has_user_scheduler(self) -> bool:
        """Tell whether the schedule is the user's own, and not the config's."""
        return self._user.scheduler is not None or any(
            self._overrides(name) for name in ("create_scheduler", "create_optimizer_and_scheduler")
        )

    def _notice_user_optimizer(self) -> None:
        """Keep an optimizer or schedule that a script has set or made since the last training."""
        engine = self._engines.training
        used = (None, None) if engine is None else (engine.optimizer, engine.scheduler)
        self._user.notice(self.optimizer, self.lr_scheduler, used=used)

    def _forget_optimizer(self) -> None:
        """Drop optimizer and schedule, which hold the parameters of a model that is released."""
        self.optimizer = self.lr_scheduler = None
        self._user = UserOptimizer()

    def _optimizer_for_run(self, num_training_steps: int) -> tuple[Optimizer, Scheduler]:
        """Return the user's optimizer (None: the config's) and schedule, or the schedule's maker.

        Raises:
            ConfigError: an override made no optimizer.
        """
        self._user.restore_parameters()
        if self._overrides("create_optimizer_and_scheduler"):
            self.create_optimizer_and_scheduler(num_training_steps)
        elif self._makes_optimizer and self._user.optimizer is None:
            built = self.create_optimizer()
            self.optimizer = built if self.optimizer is None else self.optimizer
        if self._has_user_optimizer and self.optimizer is None:
            raise ConfigError(
                Problem(
                    f"{type(self).__name__} overrides the making of its optimizer",
                    "afterwards self.optimizer is None, and nothing was returned",
                    "set self.optimizer in it, or return the optimizer",
                )
            )

        def schedule(basic: Optimizer) -> Scheduler:
            before = self.optimizer, self.lr_scheduler
            self.optimizer = basic  # an override may read it
            made = self.create_scheduler(num_training_steps, basic)
            made = self.lr_scheduler if made is None else made
            self.optimizer, self.lr_scheduler = before
            return made

        made = self.lr_scheduler
        return self.optimizer, schedule if made is None else made
