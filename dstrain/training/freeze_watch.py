"""Tells when a callback freezes or unfreezes parameters too late for the optimizer to follow."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dstrain.core.log import get_logger

logger = get_logger(__name__)

_SHOWN = 3
LOOKS_AFTER = frozenset({"on_train_begin", "on_epoch_begin", "on_epoch_end", "on_log"})
"""Events after which ``FreezeWatch.look`` is called."""


class FreezeWatch:
    """Compares which parameters need gradients with what the optimizer was built for.

    The optimizer of an engine is built for the parameters that need gradients then. A look is one
    pass over the parameters, some ten nanoseconds each, after the events of an epoch and of a log;
    nothing is done between.
    """

    def __init__(
        self, module: torch.nn.Module, group_of: Callable[[torch.nn.Parameter], object]
    ) -> None:
        """Note which parameters are trained.

        Args:
            module: the model, whose engine has been built.
            group_of: the optimizer's group that a parameter is in, or None.
        """
        self._group_of = group_of
        self._begun = [(name, p, p.requires_grad) for name, p in module.named_parameters()]
        self._told: set[bool] = set()

    def look(self) -> None:
        """Warn, once of each kind, of parameters that were frozen or unfrozen since."""
        changed = [(name, p) for name, p, before in self._begun if p.requires_grad != before]
        if not changed:
            return
        for unfrozen in {True, False} - self._told:
            names = [
                name
                for name, p in changed
                if p.requires_grad is unfrozen and (self._group_of(p) is None) is unfrozen
            ]
            if not names:
                continue
            self._told.add(unfrozen)
            more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
            logger.warning(
                "%d parameters %s during training (%s%s): %s",
                len(names),
                "were unfrozen" if unfrozen else "were frozen",
                ", ".join(names[:_SHOWN]),
                more,
                _UNFROZEN if unfrozen else _FROZEN,
            )


_UNFROZEN = (
    "nothing updates them, since the optimizer was built for those that needed gradients when "
    "train() began; unfreeze them before, or call train() again"
)
_FROZEN = (
    "the optimizer still holds them, and at ZeRO stages 1 to 3 momenta and weight decay still move "
    "them; freeze them before train() begins"
)
