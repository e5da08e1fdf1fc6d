"""Removal of the attributes and hooks that DeepSpeed leaves on a module.

DeepSpeed's engine sets attributes and hooks on parameters and modules. Its ``destroy`` (0.19.8)
removes only a few of them. The rest would keep the engine's memory from being freed, break copying
and pickling, and let the next engine of the same module use the buffers of the previous one. The
cost of each function grows with the number of modules and parameters; only ``make_whole`` copies
values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from dstrain.engine.zero.parameters import full_numel, gathered, is_partitioned

# Parameters are gathered in groups, since each gather costs a latency.
_GATHER_BYTES = 256 * 2**20

# Attributes that an engine sets, by the file of DeepSpeed that sets them.
_OF_PARAMETERS = (
    # mixed_precision_linkage.py, bf16_optimizer.py
    "_dp_group", "_hp_mapping", "_hp_grad", "_index_in_param_group",
    "get_full_hp_param", "get_full_hp_grad", "set_full_hp_param", "set_full_hp_grad",
    "load_hp_checkpoint_state",
    # stage_1_and_2.py, stage3.py, parameter_offload.py
    "grad_accum", "param_idx_in_group", "cpu_data", "_zero_optimizer", "_z3_optimizer", "group_id",
    "ds_z3_leaf_module",
    # torch_autocast.py, deepspeed/__init__.py
    "comm_dtype", "use_muon",
)  # fmt: skip
_OF_MODULES = (
    # parameter_offload.py, partition_parameters.py
    "_external_params", "all_parameters", "ds_external_parameters", "_original_parameters",
    "applied_pre_backward_ref_cnt", "ds_grads_remaining", "ds_id", "ds_inflight_param_registry",
    "ds_recompute_parameters", "ds_model_granularity", "pre_bwd_fn", "post_bwd_fn",
)  # fmt: skip
# Attributes of a partitioned parameter, besides all that begin with "ds_".
_OF_PARTITIONED = (
    "is_external_param", "nvme_swapper", "all_gather", "all_gather_coalesced", "partition",
    "reduce_gradients_at_owner", "partition_gradients", "aligned_size", "padding_size",
    "partition_numel", "convert_to_zero_parameters", "item",
)  # fmt: skip
_LEAF = "_z3_leaf"
# Dicts in which torch keeps the hooks of a module, with the dicts that mark some of their keys.
_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_backward_pre_hooks": (),
    "_backward_hooks": (),
}


def marked_leaves(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that are marked for stage 3 to gather with all of their submodules."""
    return [m for m in module.modules() if _LEAF in vars(m)]


def detach_engine(module: torch.nn.Module, *, leaves: Iterable[torch.nn.Module]) -> None:
    """Remove hooks, attributes and gradients of an engine from its module.

    Partitioned parameters are then as zero.Init makes them: partitioned on every rank, even where a
    forward or backward pass was interrupted while they were gathered.

    Args:
        module: module of the engine.
        leaves: modules that were marked as leaves before the engine was built, and stay marked.
    """
    kept = set(map(id, leaves))
    for part in module.modules():
        attributes = vars(part)
        for name, key_sets in _HOOKS.items():
            for key in _remove_hooks(attributes[name]):
                for key_set in key_sets:
                    attributes[key_set].pop(key, None)
        if "_original_parameters" in attributes:
            # Back to a plain dict. Copies items, since a look-up in DeepSpeed's dict may gather.
            plain = type(attributes["_original_parameters"])
            attributes["_parameters"] = plain(part._parameters.items())
        _remove_attributes(attributes, _OF_MODULES if id(part) in kept else (*_OF_MODULES, _LEAF))
    parameter: Any
    for parameter in module.parameters():
        _remove_attributes(vars(parameter), _OF_PARAMETERS)
        _remove_hooks(parameter._post_accumulate_grad_hooks or {})
        parameter.grad = None
        if is_partitioned(parameter):
            _release(parameter)


def _remove_hooks(hooks: dict[int, Any]) -> list[int]:
    """Remove the hooks whose functions DeepSpeed defines, and return their keys."""
    found = [k for k, hook in hooks.items() if _module_of(hook).startswith("deepspeed.")]
    for key in found:
        del hooks[key]
    return found


def _module_of(hook: Any) -> str:
    """Return the name of the Python module that defines a hook, or ""."""
    return str(getattr(hook, "__module__", None) or "")


class _KeepsNothing(dict[int, Any]):
    """A dict that stays empty."""

    def __setitem__(self, key: int, value: Any) -> None:
        """Ignore the entry."""


class _Outside(torch.nn.Module):
    """A stand-in for the first entry of DeepSpeed's list of running modules.

    That entry is the model, which DeepSpeed would keep for the rest of the process.
    """

    def __init__(self) -> None:
        """Make a module on which DeepSpeed can register no external parameters."""
        super().__init__()
        self._external_params = _KeepsNothing()


def forget_running_modules(module: torch.nn.Module) -> None:
    """Remove a module and its submodules from DeepSpeed's process-wide list of running modules.

    The list would keep them from being freed.
    """
    offload: Any = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is None:
        return
    parts = set(map(id, module.modules()))
    left = [m for m in offload.FWD_MODULE_STACK if id(m) not in parts]
    offload.FWD_MODULE_STACK[:] = left or [_Outside()]


def _release(parameter: Any) -> None:
    """Discard the gathered values of a partitioned parameter, without copying them anywhere."""
    parameter.ds_active_sub_modules.clear()
    parameter.ds_persist = False
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    parameter.ds_status = type(parameter.ds_status).NOT_AVAILABLE


def make_whole(module: torch.nn.Module, device: str) -> None:
    """Turn partitioned parameters into ordinary ones, whole on every rank; a collective.

    No engine may exist on the module. Needs memory for the whole model on ``device``, and for one
    group of gathered parameters on the accelerator.

    Args:
        module: a module whose parameters may be partitioned.
        device: where to put parameters and buffers.
    """
    for group in _groups([p for p in module.parameters() if is_partitioned(p)]):
        with gathered(group):
            values = [parameter.detach().to(device, copy=True) for parameter in group]
        for parameter, value in zip(group, values, strict=True):
            attributes = vars(parameter)
            added = [name for name in attributes if name.startswith("ds_")]
            _remove_attributes(attributes, (*_OF_PARTITIONED, *added))
            parameter.data = value
    module.to(device)


def _groups(parameters: list[torch.nn.Parameter]) -> Iterable[list[torch.nn.Parameter]]:
    """Yield lists of successive parameters, each of at most ``_GATHER_BYTES`` or one parameter."""
    group: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        needed = full_numel(parameter) * parameter.element_size()
        if group and size + needed > _GATHER_BYTES:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += needed
    if group:
        yield group


def _remove_attributes(attributes: dict[str, Any], names: Iterable[str]) -> None:
    """Remove those attributes that exist."""
    for name in names:
        attributes.pop(name, None)
