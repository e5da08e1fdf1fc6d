"""Ordering of gradients before DeepSpeed's reduce buckets: the same on all ranks, none missing.

ZeRO puts gradients into its reduce buckets in the order in which the backward pass computes them,
and adds up the buckets of all ranks. A rank whose micro-batch does not use a parameter (a head
without labels, an expert without tokens, a layer that LayerDrop skips, a batch without images), or
whose backward pass reaches parameters in another order, fills its buckets differently: gradients of
one parameter are then added to those of another. And where DeepSpeed accumulates gradients itself
(CPU offload, stage 3), a parameter without a gradient in the last micro-batch before a step, or in
all of them, keeps the gradient of the previous step.

Here every gradient waits until all gradients before it in a fixed order are in the buckets. For a
gradient that the backward pass will not compute, zeros are put in, as torch's
DistributedDataParallel and DeepSpeed at stage 0 do. So every backward pass fills the buckets alike
on all ranks, without communication.

The order is that of the main rank's first backward pass, which it sends to the other ranks once. In
a model that uses all its parameters no gradient waits, and buckets are filled as without this
module.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dstrain.core.errors import Problem, TrainingError
from dstrain.core.ranks import broadcast_object
from dstrain.engine.stepping.gradient_arrival import gradient_arrival_order

# Attributes of DeepSpeed 0.19.8's ZeRO optimizers that this file uses, by stage.
_OF_BOTH = (
    "reduce_ready_partitions_and_remove_grads",  # one gradient into its bucket
    "overlapping_partition_gradients_reduce_epilogue",  # the last bucket, at the end of a pass
    "is_gradient_accumulation_boundary",
    "_coalesce_grad_reduction",
)
_OF_STAGES_1_AND_2 = (
    *_OF_BOTH,
    "bit16_groups",
    "partition_gradients",
    "overlap_comm",
    "setup_buckets",
    "get_gradient_for_reduction",
    "use_grad_accum_attribute",
    "gradient_accumulation_dtype",
)
_OF_STAGE_3 = (*_OF_BOTH, "fp16_groups", "leaf_parameters")


def gradient_sequence(optimizer: Any, module: torch.nn.Module) -> GradientSequence | None:
    """Return the ordering for a ZeRO optimizer; None for others, which fill in zeros themselves.

    Raises:
        TrainingError: this DeepSpeed lacks attributes that the sequence needs.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _OfStages1And2(optimizer, module)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _OfStage3(optimizer, module)
    return None


class GradientSequence(abc.ABC):
    """Passes gradients from the hooks of a ZeRO optimizer to its buckets in a fixed order.

    Costs one look-up and one comparison per gradient. A gradient that waits stays in its parameter,
    where torch's backward pass has put it.

    Attributes:
        before_end: called at the end of every backward pass, before the remaining gradients are
            put into buckets.
    """

    def __init__(self, optimizer: Any, module: torch.nn.Module, names: tuple[str, ...]) -> None:
        """Replace the two functions of ``optimizer`` that fill and empty buckets.

        Args:
            optimizer: DeepSpeed's ZeRO optimizer.
            module: the model; defines the order in which parameters are registered.
            names: attributes of the optimizer that must exist.
        """
        _check(optimizer, names)
        self._optimizer = optimizer
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._put_into_bucket = optimizer.reduce_ready_partitions_and_remove_grads
        self._end_pass = optimizer.overlapping_partition_gradients_reduce_epilogue
        optimizer.reduce_ready_partitions_and_remove_grads = self._take
        optimizer.overlapping_partition_gradients_reduce_epilogue = self._end
        self.before_end: Callable[[], None] = _do_nothing
        self._has_order = self._has_ended_once = False
        self._graph: int | None = None  # of the backward pass that runs
        self._is_nested = False  # whether a backward pass has run backward passes inside of it
        self._zeros_put: set[int] = set()
        self._streams: dict[int, Any] = {}
        given = self._bucket_arguments()
        registered = [id(p) for p in module.parameters() if id(p) in given]
        others = [key for key in given if key not in self._names]
        self._set_order([given[key] for key in (*registered, *others)])

    def close(self) -> None:
        """Restore DeepSpeed's functions."""
        replaced = vars(self._optimizer)
        replaced.pop("reduce_ready_partitions_and_remove_grads", None)
        replaced.pop("overlapping_partition_gradients_reduce_epilogue", None)

    @contextlib.contextmanager
    def backward(self, loss: torch.Tensor) -> Iterator[None]:
        """Prepare for the backward pass of ``loss``, which the caller runs inside the block.

        The first call is a collective of all ranks, which agrees on the order.
        """
        if not self._has_order:
            self._adopt_main_order(loss)
        if not loss.requires_grad:  # DeepSpeed raises an error
            yield
            return
        handle = loss.register_hook(self._begin)
        try:
            yield
        finally:
            handle.remove()
            self._graph = None

    # --- different at each stage -----------------------------------------------------------------

    @abc.abstractmethod
    def _bucket_arguments(self) -> dict[int, tuple[Any, ...]]:
        """Return by ``id`` of parameter the arguments that DeepSpeed's bucket function takes."""

    @abc.abstractmethod
    def _uses_buckets(self) -> bool:
        """Tell whether the gradients of this micro-batch are put into buckets."""

    @abc.abstractmethod
    def _set_zeros(self, parameter: Any) -> None:
        """Set a parameter's gradient to zeros, unless it has one that is not reduced yet."""

    def _arrives_late(self, parameter: Any) -> bool:
        """Tell whether DeepSpeed's hook gets a parameter's gradient later than it is computed."""
        return False

    # --- order -----------------------------------------------------------------------------------

    def _set_order(self, members: list[tuple[Any, ...]]) -> None:
        """Set the order; each member is the arguments of DeepSpeed's function for a parameter."""
        self._members = members
        self._position = {id(member[0]): n for n, member in enumerate(members)}
        self._here = bytearray(len(members))
        self._next = 0

    def _adopt_main_order(self, loss: torch.Tensor) -> None:
        """Adopt the order of the main rank's backward pass; a collective, a number per parameter.

        Keeps the order of registration if gradients have come already, from a backward pass inside
        of the forward pass.
        """
        import torch.distributed as dist

        self._has_order = True
        order: list[int] = []
        if not dist.is_initialized() or dist.get_rank() == 0:
            order = gradient_arrival_order(loss, [member[0] for member in self._members])
        order = broadcast_object(order)
        if self._next or any(self._here):
            return
        self._set_order([self._members[index] for index in order])

    # --- a backward pass -------------------------------------------------------------------------

    def _begin(self, _: torch.Tensor) -> None:
        """Record the running backward pass, at its first gradient."""
        self._graph = torch._C._current_graph_task_id()

    def _take(self, parameter: Any, *group: int) -> None:
        """Put a gradient and those that wait for it into buckets, or let it wait for others."""
        if not self._uses_buckets():
            self._put_into_bucket(parameter, *group)
            return
        if not getattr(parameter, "ds_grad_is_ready", True):
            return  # computed in tiles: only the call for the last tile has the whole gradient
        position = self._position[id(parameter)]
        if position < self._next:
            self._refuse_late(position)
            # Twice in one pass: DeepSpeed raises its error.
            self._put_into_bucket(parameter, *group)
            return
        self._here[position] = 1
        if self._graph is not None and torch._C._current_graph_task_id() != self._graph:
            self._is_nested = True
        if position == self._next:
            self._put_all_that_came()
            return
        self._record_stream(position)
        while self._next < position and self._is_unused(self._next):
            self._zeros_put.add(self._next)
            self._put_position(self._next)
            self._next += 1
            self._put_all_that_came()

    def _put_all_that_came(self) -> None:
        """Put gradients into buckets up to the first that has not come."""
        here, size = self._here, len(self._members)
        while self._next < size and here[self._next]:
            self._put_position(self._next)
            self._next += 1

    def _end(self) -> None:
        """Put the remaining gradients into buckets, zeros where none has come, and end the pass."""
        self.before_end()
        with torch.no_grad():
            for position in range(self._next, len(self._members)):
                self._put_position(position)
        self._here[:] = bytes(len(self._members))
        self._next = 0
        self._zeros_put.clear()
        self._has_ended_once = True
        self._end_pass()

    def _put_position(self, position: int) -> None:
        """Put the gradient at a position of the order into a bucket, zeros where none has come."""
        member = self._members[position]
        if not self._here[position]:
            self._set_zeros(member[0])
        stream = self._streams.pop(position, None)
        if stream is not None:
            _wait_for(stream, member[0])
        self._put_into_bucket(*member)

    def _is_unused(self, position: int) -> bool:
        """Tell whether the running pass will certainly compute no gradient for a parameter.

        torch can tell for the running graph, but not for the graphs of re-entrant checkpoints,
        which are built during the pass. If there are any, as the first pass shows, this returns
        False, and missing gradients are found at the end of the pass.
        """
        if not self._has_ended_once or self._is_nested or self._graph is None:
            return False
        if torch._C._current_graph_task_id() != self._graph:
            return False
        parameter = self._members[position][0]
        if self._arrives_late(parameter):
            return False
        if not parameter.requires_grad:  # frozen since the engine was built
            return True
        with torch.enable_grad():
            node = torch.autograd.graph._get_grad_fn_or_grad_acc(parameter)
        return not torch._C._will_engine_execute_node(node)

    def _refuse_late(self, position: int) -> None:
        """Check that the gradient at a position was not replaced by zeros earlier in the pass.

        Raises:
            TrainingError: zeros are in a bucket already.
        """
        if position not in self._zeros_put:
            return
        name = self._names.get(id(self._members[position][0]), "a parameter outside the model")
        raise TrainingError(
            Problem(
                f"the gradient of {name} came from a backward pass inside the backward pass",
                "the passes before had none such (re-entrant checkpointing was turned on during "
                "training, or this part of the model alone uses it): it was taken for unused",
                'pass gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        )

    def _record_stream(self, position: int) -> None:
        """Record the stream on which a gradient that must wait is computed."""
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().resolves_data_dependency():
            self._streams[position] = get_accelerator().current_stream()


class _OfStages1And2(GradientSequence):
    """A ``GradientSequence`` for DeepSpeed's optimizer of stages 1 and 2."""

    def __init__(self, optimizer: Any, module: torch.nn.Module) -> None:
        super().__init__(optimizer, module, _OF_STAGES_1_AND_2)
        if not optimizer.partition_gradients and not optimizer.overlap_comm:
            # DeepSpeed itself fills buckets group by group, after the last micro-batch.
            self._set_order(list(self._bucket_arguments().values()))
            self._has_order = True

    def _bucket_arguments(self) -> dict[int, tuple[Any, ...]]:
        groups = enumerate(self._optimizer.bit16_groups)
        return {id(p): (p, i) for i, group in groups for p in group if p.requires_grad}

    def _uses_buckets(self) -> bool:
        """Tell whether gradients are put into buckets: at stage 1 only in the last micro-batch."""
        optimizer = self._optimizer
        return optimizer.partition_gradients or optimizer.is_gradient_accumulation_boundary()

    def _set_zeros(self, parameter: Any) -> None:
        optimizer = self._optimizer
        if optimizer.get_gradient_for_reduction(parameter) is not None:
            return  # it has the gradient of an earlier micro-batch
        optimizer.setup_buckets()
        layout = torch.contiguous_format
        if optimizer.use_grad_accum_attribute:
            parameter.grad_accum = torch.zeros_like(
                parameter, dtype=optimizer.gradient_accumulation_dtype, memory_format=layout
            )
        else:
            parameter.grad = torch.zeros_like(parameter, memory_format=layout)


class _OfStage3(GradientSequence):
    """A ``GradientSequence`` for DeepSpeed's optimizer of stage 3."""

    def __init__(self, optimizer: Any, module: torch.nn.Module) -> None:
        super().__init__(optimizer, module, _OF_STAGE_3)

    def _bucket_arguments(self) -> dict[int, tuple[Any, ...]]:
        return {
            id(p): (p,)
            for group in self._optimizer.fp16_groups
            for p in group
            if p.requires_grad or hasattr(p, "ds_z3_leaf_module")
        }

    def _uses_buckets(self) -> bool:
        return not self._optimizer._coalesce_grad_reduction

    def _set_zeros(self, parameter: Any) -> None:
        if parameter.grad is not None:
            return
        # The gradient must have the shape of the whole parameter. If only a partition is in memory,
        # that is set through .data, since torch compares shapes when .grad is set.
        parameter.grad = torch.zeros_like(parameter)
        if parameter.shape != parameter.ds_shape:
            parameter.grad.data = parameter.grad.new_zeros(parameter.ds_shape)

    def _arrives_late(self, parameter: Any) -> bool:
        """Tell whether a parameter is in a leaf module, whose gradients DeepSpeed gets together."""
        return hasattr(parameter, "ds_z3_leaf_module")


def _do_nothing() -> None:
    """Do nothing; the default of ``before_end``."""


def _wait_for(stream: Any, parameter: Any) -> None:
    """Make the current stream wait for the stream that computed a parameter's gradient."""
    from deepspeed.accelerator import get_accelerator

    present = get_accelerator().current_stream()
    if present == stream:
        return
    present.wait_stream(stream)
    for gradient in (parameter.grad, getattr(parameter, "grad_accum", None)):
        if gradient is not None:
            gradient.record_stream(present)


def _check(optimizer: Any, names: tuple[str, ...]) -> None:
    """Check that DeepSpeed and torch have the attributes that a ``GradientSequence`` uses."""
    missing = [name for name in names if not hasattr(optimizer, name)]
    if not hasattr(torch._C, "_will_engine_execute_node"):
        missing.append("torch._C._will_engine_execute_node")
    if not missing:
        return
    import deepspeed

    raise TrainingError(
        Problem(
            f"deepspeed {deepspeed.__version__} with torch {torch.__version__} lacks "
            f"{', '.join(missing)}",
            "without them, parameters that not all ranks use would be given wrong gradients",
            "install the versions that dstrain's pyproject.toml asks for",
        )
    )
