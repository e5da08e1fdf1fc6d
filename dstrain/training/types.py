"""Names for values that users and libraries hand in, whatever their class is."""

from __future__ import annotations

from typing import Any, TypeAlias

Batch: TypeAlias = Any
"""What a data collator returned: a mapping of names to tensors, a tensor, or a tuple of them."""

Dataset: TypeAlias = Any
"""A map-style dataset or a stream; for evaluation also several by name, or such a name."""

Loader: TypeAlias = Any
"""An iterable of batches: ours, torch's ``DataLoader``, or one of the user's."""

Nested: TypeAlias = Any
"""A tensor, or lists, tuples and mappings of tensors; None where there is none."""

Optimizer: TypeAlias = Any
"""An optimizer of torch, or DeepSpeed's wrapper of one; None before training."""

Scheduler: TypeAlias = Any
"""A learning-rate schedule with ``step`` and ``state_dict``; None before training."""

ProcessingClass: TypeAlias = Any
"""A tokenizer, processor, image processor or feature extractor; None without one."""

Trial: TypeAlias = Any
"""A trial of a search backend, or hyperparameters by name; None outside of a search."""

PlainState: TypeAlias = dict[str, Any]
"""Plain values by name, as a checkpoint holds them."""
