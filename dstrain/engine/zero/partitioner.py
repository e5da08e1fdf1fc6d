"""Partitioning of whole parameters, of which each rank keeps its share as ZeRO-3 trains them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from dstrain.engine.zero.parameters import full_numel, full_shape, is_partitioned


class Partitioner:
    """Partitions whole parameters by the rules of a DeepSpeed config.

    A share lies where the config wants it (device, host, disk) and has the format that the engine
    trains in, as if the parameter had been built under ``deepspeed.zero.Init``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Prepare for ``config``, a resolved one of stage 3; the process group must be up."""
        import deepspeed

        # An empty module stands for the one that is loaded: what DeepSpeed does once per model
        # (its linear function that keeps no gathered weights) is done for it as well. Formats and
        # devices of new tensors are left to dstrain: DeepSpeed would also round buffers, which its
        # engine leaves alone, and its constructors do not take all arguments of torch's.
        self._init: Any = deepspeed.zero.Init(
            module=torch.nn.Module(), config_dict_or_path=dict(config), tensor_overrides=[]
        )
        self._convert = self._init._convert_to_deepspeed_param
        self._init._convert_to_deepspeed_param = self._mark

    @property
    def device(self) -> torch.device:
        """Return the device on which this rank computes."""
        device: torch.device = self._init.local_device
        return device

    @property
    def next_number(self) -> int:
        """Return the number of the next parameter; DeepSpeed compares them between ranks."""
        number: int = type(self._init).param_id
        return number

    @next_number.setter
    def next_number(self, number: int) -> None:
        """Set the number of the next parameter, above those of all parameters so far."""
        type(self._init).param_id = number

    def split(self, parameter: torch.nn.Parameter) -> None:
        """Keep this rank's share of a parameter whose values are alike on all ranks.

        No rank waits for another. Of values that are mapped from a file, only the share is read
        (hpZ: two shares).
        """
        if is_partitioned(parameter):
            return
        with torch.no_grad():
            self._mark(parameter)
            parameter.partition()  # type: ignore[attr-defined]
            # The parameter is empty now; on the device, as after every later use.
            parameter.data = parameter.data.to(self.device)

    def split_like_main_rank(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Keep this rank's shares of the main rank's values, one at a time; a collective."""
        for parameter in parameters:
            if not is_partitioned(parameter):
                self.send_from_main(parameter)
                self.split(parameter)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Partition the parameters of each module that is constructed inside; a collective.

        They have the values with which the main rank has constructed them.
        """
        with self.device, self._init:
            yield

    def _mark(self, parameter: torch.nn.Parameter) -> None:
        """Make DeepSpeed know a whole parameter, in the format that the engine trains in."""
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(self._init.dtype)
        self._convert(parameter)

    def send_from_main(self, tensor: torch.Tensor) -> None:
        """Give a tensor the main rank's values, on this rank's device; a collective."""
        import torch.distributed as dist

        with torch.no_grad():
            tensor.data = tensor.data.to(self.device).contiguous()
            dist.broadcast(tensor.data, 0)


@contextlib.contextmanager
def building_whole_models() -> Iterator[None]:
    """Let transformers build and load whole models in the block although stage 3 is registered."""
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

    For code that reads the shapes of all weights but no values of these: the values are NaN.
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
    """Give a partitioned parameter its whole shape, with a single number in memory."""
    number = float("nan") if parameter.is_floating_point() else 0
    one = torch.full((), number, dtype=parameter.dtype, device=parameter.device)
    parameter.data = one.expand(full_shape(parameter))
