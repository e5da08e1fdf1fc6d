"""Counting samples, tokens, parameters and floating-point operations of a run."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch

from dstrain.core.log import get_logger
from dstrain.core.ranks import sum_over_ranks
from dstrain.data import num_samples
from dstrain.engine import device_name, full_numel, is_partitioned
from dstrain.trainer.base import TrainerBase
from dstrain.training.types import Batch, Loader

logger = get_logger(__name__)


class CountHooks(TrainerBase):
    """Has the counting methods of transformers' Trainer, for partitioned parameters too.

    Attributes:
        current_flos: operations of this rank that ``state.total_flos`` does not have yet.
    """

    current_flos: float = 0.0

    def floating_point_ops(self, inputs: Batch) -> int | float:
        """Estimate the floating-point operations of a micro-batch (forward and backward).

        Six per token and parameter outside of embeddings (two forward, four backward; the
        approximation of https://arxiv.org/abs/2001.08361, section 2.1). A model with a method of
        this name is asked instead; of other plain modules nothing is known, so 0.
        """
        own = getattr(self.model, "floating_point_ops", None)
        if own is not None:
            return own(inputs)
        name = getattr(self.model, "main_input_name", "input_ids")
        if not isinstance(inputs, Mapping) or not hasattr(self.model, "num_parameters"):
            return 0
        tokens = inputs.get(name)
        if not isinstance(tokens, torch.Tensor):
            return 0
        if self._counted is None or self._counted[0] is not self.model:
            self._counted = self.model, count_parameters(self.model, exclude_embeddings=True)
        return 6 * tokens.numel() * self._counted[1]

    def count_flos(self, inputs: Batch) -> None:
        """Add the operations of a micro-batch; no rank waits for another."""
        self.current_flos += float(self.floating_point_ops(inputs))

    def store_flos(self) -> None:
        """Bring ``state.total_flos`` up to date, over all ranks; a collective."""
        counted = torch.tensor(self.current_flos, dtype=torch.float64, device=device_name())
        self.state.total_flos += float(sum_over_ranks(counted))
        self.current_flos = 0.0

    def get_num_trainable_parameters(self) -> int:
        """Count the elements of all parameters with gradients, whole where they are partitioned."""
        return count_parameters(self.model, only_trainable=True)

    def num_examples(self, dataloader: Loader) -> int:
        """Count a loader's samples over all ranks; estimate them where its dataset has no length.

        Raises:
            TypeError: neither the dataset nor the loader has a length.
        """
        found = num_samples(dataloader)
        if found is not None:
            return found
        return len(dataloader) * self.resolved.micro_batch_size

    @staticmethod
    def num_tokens(train_dl: Iterable[object], max_steps: int | None = None) -> int:
        """Count the elements of ``input_ids`` that a loader of this rank gives, padding included.

        The loader is read to its end; training counts as it goes and never needs this.

        Args:
            train_dl: gives mappings.
            max_steps: take those of the first batch that many times, instead of reading on.
        """
        tokens = 0
        for batch in train_dl:
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                logger.warning(
                    "the loader's batches have no input_ids: there are no tokens to count"
                )
                return tokens
            if max_steps is not None:
                return batch["input_ids"].numel() * max_steps
            tokens += batch["input_ids"].numel()
        return tokens


def count_parameters(
    module: torch.nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Count the elements of a module's parameters: shared ones once, partitioned ones whole."""
    embeddings = {
        id(part.weight)
        for part in module.modules()
        if exclude_embeddings and isinstance(part, torch.nn.Embedding)
    }
    return sum(
        full_numel(p)
        for p in module.parameters()
        if (p.requires_grad or not only_trainable) and id(p) not in embeddings
    )


def count_whole_parameters(module: torch.nn.Module) -> None:
    """Let ``num_parameters`` of a partitioned transformers model count whole parameters.

    Trackers write its result down; transformers' own counts what this rank holds of them: nothing.
    """
    if hasattr(module, "num_parameters") and any(is_partitioned(p) for p in module.parameters()):
        module.num_parameters = functools.partial(count_parameters, module)  # type: ignore[assignment]
