"""Detection of ranks that run modules in different orders at stage 3, which would hang.

At ZeRO stage 3 every module gathers its weights from all ranks before it runs, in the forward pass
and again in the backward pass. If a rank skips a module (an expert without tokens, a layer that
LayerDrop leaves out, a head whose result the loss does not use), its next gather is matched with
that of another module on the other ranks: weights are mixed up where sizes agree, and ranks wait
for ever where they do not.

DeepSpeed records the order of modules in a first pass and follows it afterwards. While it records,
ranks compare module by module before each gather. Afterwards a rank compares only when it leaves
the recorded order, so an ordinary step costs no communication.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Any

import torch

from dstrain.core.errors import ModelError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import broadcast_object, gather_objects, is_distributed

logger = get_logger(__name__)

# Private attributes of DeepSpeed 0.19.8's PartitionedParameterCoordinator.
_STEP = "_PartitionedParameterCoordinator__step_id"
_ORDER = "_PartitionedParameterCoordinator__submodule_order"
_END_OF_FORWARD, _END_OF_BACKWARD, _FIRST_MODULE = 0, 1, 2
# Gathers keep ranks together, so a rank can be behind by little more than reading its data.
_REMIND_SECONDS, _PATIENCE_SECONDS = 10.0, 60.0
# Number of comparisons by the store after which ranks stop comparing: the order varies, but on all
# ranks alike.
_MOST_CHANGES = 16


class ModuleOrderWatch:
    """Checks that all ranks run the modules of a partitioned model in the same order."""

    def __init__(self, optimizer: Any, module: torch.nn.Module, *, patience_seconds: float) -> None:
        """Begin to watch; a collective of all ranks.

        Args:
            optimizer: DeepSpeed's optimizer for stage 3, or the object that it uses instead in an
                engine that only runs forward.
            module: the model.
            patience_seconds: timeout of collectives. A rank that leaves the recorded order waits
                half as long, and at most a minute, for the other ranks to leave it too.
        """
        import torch.distributed as dist

        self._module = module
        self._coordinator: Any = None
        if not is_distributed():
            return
        self._patience = min(patience_seconds / 2, _PATIENCE_SECONDS)
        offload = getattr(optimizer, "parameter_offload", optimizer)
        coordinator = self._coordinator = offload.get_param_coordinator()
        _check(coordinator)
        self._follow, self._fetch = coordinator.trace_prologue, coordinator.fetch_sub_module
        coordinator.trace_prologue = self._before
        coordinator.fetch_sub_module = self._fetched
        names = [name for name, _ in module.named_modules()]
        self._names = ["", "", *names]
        self._code = {id(m): n for n, m in enumerate(module.modules(), _FIRST_MODULE)}
        self._hook = module.register_forward_hook(self._end_of_forward)
        self._group = dist.new_group(backend="gloo")
        self._store: Any = dist.PrefixStore(
            f"dstrain-lockstep-{broadcast_object(uuid.uuid4().hex)}",
            dist.distributed_c10d._get_default_store(),
        )
        self._changes = 0
        self._has_raised = False

    def close(self) -> None:
        """Stop watching, and restore DeepSpeed's functions; no rank waits for another."""
        import torch.distributed as dist

        if self._coordinator is None:
            return
        if not self._has_raised:  # else other ranks may still be in an exchange with this one
            with contextlib.suppress(ValueError):  # all groups have been destroyed
                dist.destroy_process_group(self._group)
        self._hook.remove()
        for name in ("trace_prologue", "fetch_sub_module"):
            vars(self._coordinator).pop(name, None)
        self._coordinator = None

    def end_of_backward(self) -> None:
        """Compare ranks at the end of a backward pass, before its last gradients are reduced."""
        coordinator = self._coordinator
        if coordinator is None:
            return
        if not coordinator.is_complete_trace():
            self._compare(_END_OF_BACKWARD)
        elif getattr(coordinator, _STEP) < len(getattr(coordinator, _ORDER)):
            self._compare_by_store(_END_OF_BACKWARD)

    def explain(self, error: BaseException) -> None:
        """Raise an error that names the cause if another rank has left the order of modules.

        Args:
            error: an error of a collective, perhaps a consequence.

        Raises:
            ModelError: naming that rank and its module.
        """
        if self._coordinator is None or not isinstance(error, RuntimeError):
            return
        try:
            has_left = self._store.check(["left"])
        except RuntimeError:  # the rank that holds the store has gone
            return
        if has_left:
            rank, code = self._store.get("left").decode().split()
            raise self._differs({int(rank): int(code)}) from error

    # --- what DeepSpeed calls --------------------------------------------------------------------

    def _before(self, module: torch.nn.Module) -> None:
        """Call ``trace_prologue``, as DeepSpeed does before a gather, and compare ranks."""
        coordinator = self._coordinator
        was_complete = coordinator.is_complete_trace()
        self._follow(module)
        if was_complete:
            if not coordinator.is_complete_trace():
                self._compare_by_store(self._code.get(id(module), -1))
            return
        self._compare(self._code.get(id(module), -1))

    def _fetched(self, module: torch.nn.Module, forward: bool) -> None:
        """Gather the weights of a module by DeepSpeed's function, and explain its errors."""
        try:
            self._fetch(module, forward=forward)
        except RuntimeError as error:
            self.explain(error)
            raise

    def _end_of_forward(self, *_: object) -> None:
        """Compare ranks at the end of a forward pass, while the order is being recorded."""
        if not self._coordinator.is_complete_trace():
            self._compare(_END_OF_FORWARD)

    # --- comparing -------------------------------------------------------------------------------

    def _compare(self, code: int) -> None:
        """Compare the modules at which ranks are, while the order is recorded; a collective.

        Args:
            code: the number of this rank's module or event.

        Raises:
            ModelError: ranks are at different modules.
        """
        import torch.distributed as dist

        if self._changes > _MOST_CHANGES:
            return
        extremes = torch.tensor([code, -code])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        highest, lowest = extremes.tolist()
        if highest == -lowest:
            return
        raise self._differs(dict(enumerate(gather_objects(code, group=self._group))))

    def _compare_by_store(self, code: int) -> None:
        """Compare the modules at which ranks are by the store, since not all ranks may come here.

        Args:
            code: the number of this rank's module or event.

        Raises:
            ModelError: ranks are at different modules, or a rank does not come in time.
        """
        import torch.distributed as dist

        self._changes += 1
        if self._changes > _MOST_CHANGES:
            return
        number, rank, world_size = self._changes, dist.get_rank(), dist.get_world_size()
        keys = [f"{number}-{other}" for other in range(world_size)]
        self._store.set(keys[rank], str(code))
        started, pause, reminded = time.monotonic(), 0.0005, False
        while not self._store.check(keys):
            waited = time.monotonic() - started
            if waited > self._patience:
                self._store.set("left", f"{rank} {code}")
                raise self._differs({rank: code})
            if waited > _REMIND_SECONDS and not reminded:
                reminded = True
                logger.warning(
                    "rank %d has come to %s, unlike in the steps before, and waits for other ranks",
                    rank,
                    self._where(code),
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        codes = {other: int(self._store.get(key)) for other, key in enumerate(keys)}
        if len(set(codes.values())) > 1:
            raise self._differs(codes)

    def _differs(self, codes: dict[int, int]) -> ModelError:
        """Return the error for ranks that are at different modules, given by rank."""
        self._has_raised = True
        first = min(codes)
        other = next((rank for rank in codes if codes[rank] != codes[first]), None)
        what = f"rank {first} came to {self._where(codes[first])}"
        if other is None:
            what += ", and other ranks did not"
        else:
            what += f", rank {other} to {self._where(codes[other])}"
        return ModelError(
            Problem(
                what,
                "at ZeRO stage 3 all ranks must run the same modules in the same order, forward "
                "and backward: each gathers its weights from all of them",
                f"{self._remedy({codes[rank] for rank in codes})}; or train at stage 2, where "
                "ranks may differ (zero_stage=2)",
            )
        )

    def _where(self, code: int) -> str:
        """Describe the module or event of a number."""
        if code == _END_OF_FORWARD:
            return "the end of the forward pass"
        if code == _END_OF_BACKWARD:
            return "the end of the backward pass"
        if code < 0:
            return "a module outside the model"
        name = self._names[code]
        kind = type(self._module.get_submodule(name)).__name__
        return f"{name} ({kind})" if name else f"the model itself ({kind})"

    def _remedy(self, codes: set[int]) -> str:
        """Suggest to gather the smallest module that contains all modules at which ranks are."""
        names = [self._names[code].split(".") for code in codes if code >= _FIRST_MODULE]
        common: list[str] = []
        for parts in zip(*names, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        if len(names) == 1:
            common = common[:-1]
        holders = (torch.nn.ModuleList, torch.nn.ModuleDict)
        while common and isinstance(self._module.get_submodule(".".join(common)), holders):
            common.pop()
        if not common:
            return (
                "put what not every batch uses into a module of its own, which all ranks run with "
                "their batch, and name its class in leaf_modules"
            )
        name = ".".join(common)
        kind = type(self._module.get_submodule(name)).__name__
        return (
            f'if all ranks run {name}, let it be gathered whole: leaf_modules=["{kind}"] (config '
            "key zero_optimization.leaf_module)"
        )


def _check(coordinator: Any) -> None:
    """Check that the installed DeepSpeed has the attributes that ``ModuleOrderWatch`` uses."""
    names = ("trace_prologue", "fetch_sub_module", "is_complete_trace", _STEP, _ORDER)
    missing = [name for name in names if not hasattr(coordinator, name)]
    if missing:
        import deepspeed

        raise ModelError(
            Problem(
                f"deepspeed {deepspeed.__version__} lacks {', '.join(missing)}",
                "without them, ranks that run different modules at stage 3 would wait for ever",
                "install the version that dstrain's pyproject.toml asks for",
            )
        )
