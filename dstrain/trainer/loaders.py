"""Making this rank's loaders, and checking loaders that a user has made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dstrain.arguments import TrainingArguments
from dstrain.config import ResolvedConfig
from dstrain.config.resolution.batch import eval_micro_batch
from dstrain.core.adapters import inner_model
from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks
from dstrain.data import (
    Collator,
    LoaderOptions,
    TokenCount,
    Topology,
    build_loader,
    detect_split,
    forward_columns,
    is_dstrain_loader,
    keep_columns,
    label_columns,
    micro_steps,
    sample_lengths,
)
from dstrain.engine import (
    device_type,
)
from dstrain.training.types import Dataset, Loader

logger = get_logger(__name__)


def default_collator(processing_class: object) -> Collator:
    """Return a collator that pads to the longest sample; without a tokenizer, one that stacks."""
    from transformers import (
        DataCollatorWithPadding,
        PreTrainedTokenizerBase,
        SequenceFeatureExtractor,
        default_data_collator,
    )

    if isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        padding: Collator = DataCollatorWithPadding(processing_class)  # type: ignore[arg-type]
        return padding
    stacking: Collator = default_data_collator
    return stacking


def prepare_dataset(
    dataset: object,
    collate: Collator,
    module: torch.nn.Module,
    args: TrainingArguments,
    *,
    description: str,
) -> tuple[Dataset, Collator]:
    """Return the dataset and collator without the columns that the model does not take."""
    known = forward_columns(module) if args.remove_unused_columns else None
    if known is None:
        return dataset, collate
    keep = {*known, *label_columns(module, args.label_names), "label", "label_ids"}
    return keep_columns(dataset, collate, sorted(keep), description=description)


def lengths_of(
    dataset: object, args: TrainingArguments, processing_class: object
) -> Sequence[int] | torch.Tensor | None:
    """Return the lengths of the training samples where their order needs them, else None."""
    if args.sampling not in ("group_by_length", "batch_rebalance"):
        return None
    names = getattr(processing_class, "model_input_names", None) or ["input_ids"]
    return sample_lengths(
        dataset, column=args.length_column_name, main_input=names[0], what=_sampling_of(args)
    )


def _sampling_of(args: TrainingArguments) -> str:
    """Return the argument that orders training samples, as the user wrote it."""
    if args.group_by_length:
        return "group_by_length=True"
    return f"train_sampling_strategy={args.train_sampling_strategy!r}"


def token_count(
    module: torch.nn.Module, args: TrainingArguments, processing_class: object
) -> TokenCount:
    """Return the function that counts the input tokens of a batch for this model."""
    return TokenCount(
        getattr(inner_model(module), "main_input_name", "input_ids"),
        padding=args.counts_tokens != "non_padding",
        pad_token_id=getattr(processing_class, "pad_token_id", None),
    )


def make_loader(
    dataset: object,
    collate: Collator,
    resolved: ResolvedConfig,
    args: TrainingArguments,
    ranks: Ranks,
    *,
    train: bool,
    lengths: Sequence[int] | torch.Tensor | None = None,
) -> Loader:
    """Make this rank's loader for training (shuffled) or evaluation (in order, nothing dropped)."""
    micro_batch = resolved.micro_batch_size if train else eval_micro_batch(args, ranks.world_size)
    seed = args.seed if args.data_seed is None else args.data_seed
    return build_loader(
        dataset,
        Topology(micro_batch, ranks.world_size, ranks.rank),
        collate,
        LoaderOptions(
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and device_type() != "cpu",
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            drop_last=args.dataloader_drop_last and train,
            dispatch=args.dispatches_batches,
            rebalance=(
                resolved.accumulation if train and args.sampling == "batch_rebalance" else None
            ),
        ),
        seed=seed,
        shuffle=train and args.sampling != "sequential",
        lengths=lengths,
    )


def training_steps(
    loader: object, args: TrainingArguments, accumulation: int
) -> tuple[int, int | None]:
    """Count the optimizer steps of the whole run, and of one epoch (None for a stream).

    Raises:
        DataError: no micro-batch in an epoch, or a stream without max_steps.
    """
    per_epoch = micro_steps(loader)
    if per_epoch == 0:
        raise DataError(
            Problem(
                "the training data gives no batch",
                "dataloader_drop_last drops what does not fill one micro-batch on every rank",
                "add data, use a smaller per_device_train_batch_size, or drop nothing",
            )
        )
    windows = None if per_epoch is None else math.ceil(per_epoch / accumulation)
    if args.max_steps > 0:
        return args.max_steps, windows
    if windows is None:
        raise DataError(
            Problem(
                "the training data is a stream, whose length is not known",
                "the learning-rate schedule needs the number of steps",
                "set max_steps",
            )
        )
    return math.ceil(args.num_train_epochs * windows), windows


def check_shared_out(
    loader: object, ranks: Ranks, *, method: str, epoch: int = 0, known_whole: bool = False
) -> None:
    """Check that every sample is on exactly one rank; a collective of all ranks.

    Args:
        loader: the loader that the method returned.
        ranks: rank and world size of this process.
        method: name of the method that made it, for messages.
        epoch: the epoch that will be read first.
        known_whole: whether a checkpoint of several ranks says that all read one stream.

    Raises:
        DataError: more than one rank, and a loader that neither dstrain made nor a sampler with
            ``num_replicas`` shares out; or data that is not the same on all ranks, and cannot be
            used as it is.
    """
    if is_dstrain_loader(loader):
        what = "the training data" if "train" in method else "the evaluation data"
        detect_split(loader, what=what, epoch=epoch, known_whole=known_whole)
        return
    parts = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    inner = getattr(parts[2], "sampler", None)
    shared = any(hasattr(part, "num_replicas") for part in (*parts, inner))
    if ranks.world_size == 1 or shared:
        return
    raise DataError(
        Problem(
            f"{method} returned a loader of its own on {ranks.world_size} ranks",
            "its samples are not shared out, so every rank would read all of them",
            "give it a torch.utils.data.DistributedSampler, or pass the dataset and let dstrain "
            "build the loader",
        )
    )
