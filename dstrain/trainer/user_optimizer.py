"""Optimizer and schedule of the user's own: passed, set on the trainer, or made by an override."""

from __future__ import annotations

import torch

from dstrain.training.types import Optimizer


class UserOptimizer:
    """Keeps a user's optimizer and schedule over several trainings.

    Attributes:
        optimizer: None where the config's runs, or the user's code makes one for each training.
        scheduler: None where the config's runs, or the user's code makes one for each training.
    """

    def __init__(self, optimizer: object = None, scheduler: object = None) -> None:
        """Keep what was passed to the constructor of a trainer."""
        self.optimizer: Optimizer = None
        self.scheduler = scheduler
        self._parameters: list[list[torch.nn.Parameter]] = []
        self._keep(optimizer)

    def notice(self, optimizer: object, scheduler: object, *, used: tuple[object, object]) -> None:
        """Keep an optimizer or a schedule that a script has set on the trainer since.

        Args:
            optimizer: the trainer's at present.
            scheduler: the trainer's at present.
            used: optimizer and schedule of the engine that ran last, which are no user's.
        """
        if optimizer not in (None, used[0], self.optimizer):
            self._keep(optimizer)
        if scheduler not in (None, used[1], self.scheduler):
            self.scheduler = scheduler

    def restore_parameters(self) -> None:
        """Give the user's optimizer the model's parameters again, without state.

        DeepSpeed puts flat tensors in their place, which are of no use without its engine.
        """
        if self.optimizer is None:
            return
        self.optimizer.state.clear()
        for group, params in zip(self.optimizer.param_groups, self._parameters, strict=True):
            group["params"] = params

    def _keep(self, optimizer: object) -> None:
        self.optimizer = optimizer
        groups = getattr(optimizer, "param_groups", ())
        self._parameters = [list(group["params"]) for group in groups]
