"""Partitioning of whole parameters as ZeRO stage 3 trains them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from dstrain.engine.zero.parameters import full_numel, full_shape, is_partitioned
from dstrain.engine.zero.swap_folders import SwapFolder, read_once


class Partitioner:
    """Partitions whole parameters by the rules of a DeepSpeed config.

    A partition is placed where the config says (device, host, disk) and has the format that the
    engine trains in, as if the parameter had been built under ``deepspeed.zero.Init``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Prepare to partition parameters; the process group must be up.

        Args:
            config: DeepSpeed's, resolved, with stage 3.
        """
        import deepspeed

        # With an empty module zero.Init does what it does once per model (it replaces torch's
        # linear function), and partitions nothing. Without overrides dstrain chooses formats and
        # devices of new tensors: DeepSpeed would also round buffers, which its engine leaves alone,
        # and its tensor constructors do not take all arguments of torch's.
        config = dict(config)
        folder = SwapFolder(config, "offload_param")
        self._init: Any = deepspeed.zero.Init(
            module=torch.nn.Module(), config_dict_or_path=config, tensor_overrides=[]
        )
        folder.remove_with(self._init.param_swapper)
        read_once(self._init.param_swapper)
        self._convert = self._init._convert_to_deepspeed_param
        self._init._convert_to_deepspeed_param = self._mark

    @property
    def device(self) -> torch.device:
        """Return the device on which this rank computes."""
        device: torch.device = self._init.local_device
        return device

    @property
    def next_number(self) -> int:
        """Return the ``ds_id`` of the next parameter; DeepSpeed compares these between ranks."""
        number: int = type(self._init).param_id
        return number

    @next_number.setter
    def next_number(self, number: int) -> None:
        """Set the ``ds_id`` of the next parameter; it must be above all that are in use."""
        type(self._init).param_id = number

    def split(self, parameter: torch.nn.Parameter) -> None:
        """Partition a parameter whose values are the same on all ranks, keeping this rank's part.

        No rank waits for another. Of values that are mapped from a file, only the partition is
        read (with hpZ, two partitions).
        """
        if is_partitioned(parameter):
            return
        with torch.no_grad():
            self._mark(parameter)
            parameter.partition()  # type: ignore[attr-defined]
            # The empty tensor that is left belongs on the device, as after every later use.
            parameter.data = parameter.data.to(self.device)

    def split_like_main_rank(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Partition the main rank's values of parameters, one after another; a collective."""
        for parameter in parameters:
            if not is_partitioned(parameter):
                self.send_from_main(parameter)
                self.split(parameter)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Partition the parameters of each module that is constructed inside; a collective.

        All ranks take the values that the main rank's constructors have set.
        """
        with self.device, self._init:
            yield

    def _mark(self, parameter: torch.nn.Parameter) -> None:
        """Add DeepSpeed's attributes to a whole parameter, cast to the format of the training."""
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(self._init.dtype)
        self._convert(parameter)

    def send_from_main(self, tensor: torch.Tensor) -> None:
        """Set a tensor to the main rank's values, on this rank's device; a collective."""
        import torch.distributed as dist

        with torch.no_grad():
            tensor.data = tensor.data.to(self.device).contiguous()
            dist.broadcast(tensor.data, 0)


@contextlib.contextmanager
def building_whole_models() -> Iterator[None]:
    """Suspend the registration of stage 3 in the block: transformers builds whole models there."""
    from dstrain.engine import compat

    registered = compat.registered_config()
    compat.register_config(None)
    try:
        yield
    finally:
        compat.register_config(registered)


@contextlib.contextmanager
def with_full_shapes(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Let partitioned parameters have their whole shape inside, without memory for the values.

    For code that reads the shapes of weights and not their values, which are NaN (0 for integers).
    """
    empty = [p for p in parameters if is_partitioned(p) and p.numel() != full_numel(p)]
    for parameter in empty:
        fill_with_placeholder(parameter)
    try:
        yield
    finally:
        for parameter in empty:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def is_whole(parameter: Any) -> bool:
    """Tell whether this rank has all values of a parameter at this moment."""
    return not is_partitioned(parameter) or parameter.ds_status.name == "AVAILABLE"


def fill_with_placeholder(parameter: torch.nn.Parameter) -> None:
    """Give a partitioned parameter its whole shape, expanded from a single NaN (0 for integers)."""
    number = float("nan") if parameter.is_floating_point() else 0
    one = torch.full((), number, dtype=parameter.dtype, device=parameter.device)
    parameter.data = one.expand(full_shape(parameter))
