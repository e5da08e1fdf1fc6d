"""What a ``Trainer`` does with the adapters of a PEFT model beyond training and saving them."""

from __future__ import annotations

from typing import Any

import torch

from dstrain.models import merge_adapters, without_adapters
from dstrain.trainer.optimizer_hooks import OwnObjects


class AdapterHooks:
    """``peft``'s merging, at every ZeRO stage."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    events: Any
    close: Any
    _note_model: Any
    _own: Any
    _counted: Any

    def merge_and_unload(self) -> torch.nn.Module:
        """Merge a PEFT model's active adapters into its weights; all ranks must call it.

        As ``peft``'s method of this name, which cannot work on a partitioned model. The trainer
        goes on with the plain model that is returned: ``save_model`` then writes all of it, at
        every stage, and ``evaluate`` evaluates it. A rank holds one layer whole at a time.

        Raises:
            ModelError: the trainer's model has no adapter that could be merged.
        """
        trainer: Any = self
        model: Any = self.model
        merge_adapters(model)  # while there is an engine: it may hold what is offloaded
        self.close()
        self.model = self.optimizer = self.lr_scheduler = self._counted = None
        self._own = OwnObjects(trainer, None, None)  # those before are of the adapter's parameters
        self.model = without_adapters(model)
        self.events.hold(None)
        self._note_model()
        merged: torch.nn.Module = self.model
        return merged
