"""Keys that DeepSpeed 0.19.8 accepts but that do not work as documented in a run of dstrain.

DeepSpeed accepts them without a message. Some are for parts of DeepSpeed that dstrain does not use,
such as its data loader, so that nothing reads them. Others would break a property of dstrain, such
as the mean over the global batch. Keys of the second kind are refused, and so are keys without
effect that a user sets for their effect; keys that are harmless without effect give a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.config.resolution.tree import has
from dstrain.core.errors import Problem

_LOADER = "it is for DeepSpeed's own data loader, and dstrain loads the data itself"

# key, the refused value, the reason, the remedy
_REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    (
        # engine.py: gradient_average
        "gradient_allreduce_op",
        "sum",
        "gradients would be added up over the ranks: the loss is the mean over the global batch, "
        "and each step would be as many times as large as there are ranks",
        "remove it; where that is meant, set learning_rate",
    ),
    (
        # engine.py: backward, is_gradient_accumulation_boundary
        "managed_gradient_accumulation",
        False,
        "the engine counts micro-batches, as gradient_accumulation_steps says, and refuses to be "
        "told of a short last window without it",
        "remove it",
    ),
    # engine.py: deepspeed_io, called for training_data alone
    ("dataloader_drop_last", True, _LOADER, "set the argument dataloader_drop_last"),
    (
        "data_efficiency.data_sampling.enabled",
        True,
        _LOADER,
        "remove it; the order is that of the dataset, or of get_train_dataloader",
    ),
    (
        # __init__.py: initialize builds a DeepSpeedHybridEngine
        "hybrid_engine.enabled",
        True,
        "it replaces the engine by one that also generates, for a training loop of its own",
        "remove it",
    ),
    (
        # engine.py: _configure_expert_parallel
        "expert_parallel.enabled",
        True,
        "ranks would hold different experts, and models and checkpoints are written as if all had "
        "the same",
        "remove it; ZeRO stage 3 partitions experts too",
    ),
    (
        # engine.py: _autotuning_exit
        "autotuning.enabled",
        True,
        "DeepSpeed would end the process after a few steps, with nothing saved",
        "remove it; `dstrain plan` shows which stage and offload fit",
    ),
)
# engine.py: deepcompile is a mode of engine.compile, which torch_compile calls
_DEEPCOMPILE = (
    "it says how the model is compiled, and nothing compiles it",
    "set torch_compile, or remove it",
)
_OTHER_LAYOUT = "dstrain writes and reads checkpoints itself"
_NO_EFFECT = {
    "pipeline": "only a PipelineModule reads it",
    "disable_allgather": "DeepSpeed itself no longer reads it",
}
_OF_CHECKPOINTS = (
    "checkpoint",
    "datastates_ckpt",
    "zero_optimization.elastic_checkpoint",
    "zero_optimization.load_from_fp32_weights",
    "zero_optimization.pipeline_loading_checkpoint",
)


def find_unread(
    values: Mapping[str, Any], arguments: Mapping[str, Any], label: str
) -> tuple[list[Problem], list[str]]:
    """Return problems and warnings of these keys in a filled config.

    Args:
        values: leaf values by dotted path.
        arguments: values of arguments, after adoption.
        label: name of the user's config in messages.
    """
    return list(_problems(values, arguments, label)), list(_warnings(values, arguments))


def as_rows() -> list[tuple[str, str, str]]:
    """Return rows for the table of keys: key with value, "refused" or "no effect", reason."""
    rows = [
        (f"`{key}`: `{str(asking).lower()}`", "refused", f"{why}; {remedy}")
        for key, asking, why, remedy in _REFUSED
    ]
    rows.append(("`compile.deepcompile` without `torch_compile`", "refused", _DEEPCOMPILE[0]))
    rows += [(f"`{key}`", "no effect", why) for key, why in _NO_EFFECT.items()]
    return rows + [(f"`{key}`", "no effect", _OTHER_LAYOUT) for key in _OF_CHECKPOINTS]


def _problems(
    values: Mapping[str, Any], arguments: Mapping[str, Any], label: str
) -> Iterator[Problem]:
    for key, asking, why, remedy in _REFUSED:
        value = values.get(key)
        value = value.lower() if isinstance(value, str) else value
        if value == asking and value is not None:
            yield Problem(f"{key}={values[key]!r} in {label}", why, remedy)
    if values.get("compile.deepcompile") and not arguments.get("torch_compile"):
        yield Problem(f"compile.deepcompile=True in {label}", *_DEEPCOMPILE)


def _warnings(values: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[str]:
    unread = dict(_NO_EFFECT)
    if arguments.get("checkpoint_format", "dstrain") == "dstrain":
        unread |= dict.fromkeys(_OF_CHECKPOINTS, _OTHER_LAYOUT)
    for key, why in unread.items():
        if has(values, key):
            yield f"{key} has no effect: {why}"
