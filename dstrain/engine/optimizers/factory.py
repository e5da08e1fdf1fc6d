"""Optimizers: the ones that dstrain builds, the user's own, and what DeepSpeed does to them."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from dstrain.config import ResolvedConfig
from dstrain.config.optimizer_table import OPTIMIZERS, Optimizer
from dstrain.core.errors import ConfigError, Problem, nearest, raise_problems
from dstrain.engine import ops

_TORCH_MUON = Optimizer(
    "torch.optim.Muon",
    whole="it orthogonalises whole matrices; ZeRO stages 1 to 3 give the optimizer flat slices of "
    "many parameters joined together",
    instead="use optim='muon', DeepSpeed's own, which gathers them",
)
_SLICES = (
    "ZeRO gives it flat slices of many parameters joined together: a rule that treats each element "
    "alone is the same there, one that looks at a whole tensor is another"
)

Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def optimizer_class(resolved: ResolvedConfig) -> tuple[type[Any], dict[str, Any]]:
    """Return the class that the config resolves to, and what it takes beside the groups.

    For what DeepSpeed builds by name as well, so that it can be built by hand.

    Raises:
        ConfigError: the class cannot be imported, or does not take one of the parameters.
    """
    build = resolved.optimizer
    assert build is not None, "a user's own optimizer has no class in the config"
    if build.type == "Muon":
        why = "DeepSpeed builds it itself, from groups that it splits into matrices and others"
        raise ConfigError(
            Problem("Muon as an object", why, "override nothing, and set optim='muon'")
        )
    cls = _import(build.cls)
    given = {
        name: getattr(torch, value) if name.endswith("_dtype") else value
        for name, value in resolved.optimizer_parameters().items()
    }
    if build.type:
        given = _without_switches(build.cls, given)
    taken = inspect.signature(cls.__init__).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    raise_problems(
        [
            Problem(
                f"{name}={value!r} for {build.cls}",
                f"the installed version takes {', '.join(list(taken)[2:])}",
                _suggest(name, list(taken)),
            )
            for name, value in given.items()
            if name not in taken and not anything
        ],
        error=ConfigError,
    )
    return cls, given


def optimizer_factory(resolved: ResolvedConfig) -> Factory | None:
    """Return a function from groups to optimizer, or None where DeepSpeed builds it by name."""
    build = resolved.optimizer
    if build is None or (build.type and build.cls != "torch.optim.Adagrad"):
        return None
    cls, given = optimizer_class(resolved)

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(groups, **given)
        make_adagrad_lazy(optimizer)
        return optimizer

    return make


def build_ops(resolved: ResolvedConfig) -> None:
    """Compile what the optimizer needs before the engine is built; says so where it takes long.

    Raises:
        ConfigError: an op does not compile, or the accelerator has none.
    """
    from deepspeed.git_version_info import installed_ops

    ops.build_ops([name for name in ops_of(resolved) if not installed_ops.get(name, False)])


def ops_of(resolved: ResolvedConfig) -> list[str]:
    """Return the names of DeepSpeed's compiled ops that the optimizer of a run needs."""
    build, values = resolved.optimizer, resolved.values
    if build is None:
        return []
    place = values.get("zero_optimization.offload_optimizer.device", "none")
    names = [build.op] if build.op else []
    torch_adam = values.get("optimizer.params.torch_adam")
    if torch_adam is not None:  # a config of the user's may ask for the other one
        names = [] if torch_adam else ["fused_adam" if place == "none" else "cpu_adam"]
    return [*names, "async_io"] if place == "nvme" else names


def check_user_optimizer(optimizer: Any, scheduler: Any, resolved: ResolvedConfig) -> None:
    """Refuse a user's own optimizer or schedule that could not run as given.

    Raises:
        ConfigError: no optimizer at all, one that ZeRO makes another, or a schedule of another one.
    """
    problems = []
    stage, offload = resolved.stage, resolved.optimizer_offload
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        why = "DeepSpeed takes a torch.optim.Optimizer"
        problems.append(Problem(f"optimizer of type {type(optimizer).__name__}", why))
    rows = [row for row in map(_row_of, type(optimizer).__mro__) if row is not None]
    row = rows[0] if rows else None
    what = f"your own {type(optimizer).__name__} with stage {stage}, optimizer offload {offload}"
    if row is not None and row.refused:
        problems.append(Problem(what, row.refused, row.instead))
    if row is not None and row.whole and stage > 0:
        problems.append(Problem(what, row.whole, f"{row.instead}, or set zero_stage to 0"))
    if row is not None and row.offload is None and offload != "none" and not problems:
        problems.append(Problem(what, row.no_offload, row.instead))
    steered = getattr(scheduler, "optimizer", None)
    if steered is not None and steered is not optimizer:
        problems.append(
            Problem(
                f"a schedule of type {type(scheduler).__name__} was passed",
                f"it steers a {type(steered).__name__} that is not the optimizer of this run",
                "pass the optimizer that it was made with, or override create_scheduler, which "
                "is given the optimizer",
            )
        )
    raise_problems(problems, error=ConfigError)


def slices_remark(optimizer: Any, resolved: ResolvedConfig) -> str:
    """Say what a user's own optimizer does differently on flat slices, by what its class tells."""
    row = None if optimizer is None else _row_of(type(optimizer))
    if optimizer is None or resolved.stage == 0 or (row is not None and not row.warning):
        return ""
    what = f"your own {type(optimizer).__name__} at ZeRO stage {resolved.stage}"
    return f"{what}: {_SLICES if row is None else row.warning}"


def make_adagrad_lazy(optimizer: Any) -> None:
    """Let torch's Adagrad make its state where it first needs it, before the engine is built.

    It makes state in its constructor, for the parameters that it is given; DeepSpeed then gives it
    other tensors.
    """
    if isinstance(optimizer, torch.optim.Adagrad):
        optimizer.state = cast(Any, _AdagradState(optimizer))


@contextlib.contextmanager
def without_adagrad_replacement() -> Iterator[None]:
    """Keep DeepSpeed from putting another optimizer in the place of torch's Adagrad.

    ``initialize_optimizer_states`` of the ZeRO stages makes a new ``torch.optim.Adagrad`` of the
    flat tensors, with one group: the schedule would steer the old one, the weight decay of the
    groups would be lost, and stage 3 would not find its second group. It does so because
    Adagrad makes its state at once, which ``make_adagrad_lazy`` has mended; inside this block
    DeepSpeed finds no Adagrad.
    """
    real = torch.optim.Adagrad
    torch.optim.Adagrad = _NoAdagrad  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.optim.Adagrad = real  # type: ignore[misc]


def group_of(engine_optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, Any] | None:
    """Return the parameter group that updates a model's parameter, whatever slices groups hold."""
    groups: list[dict[str, Any]] = engine_optimizer.param_groups
    lists = getattr(engine_optimizer, "bit16_groups", None)  # stages 1 and 2
    index = None
    if lists is None:
        lists = getattr(engine_optimizer, "fp16_groups", None)  # stage 3, stage 0 in 16 bits
        index = getattr(engine_optimizer, "sub_group_to_group_id", None)
    if lists is None:
        lists = getattr(engine_optimizer, "bf16_groups", None)
    if lists is None:
        lists = [group["params"] for group in groups]
    for i, parameters in enumerate(lists):
        if any(p is parameter for p in parameters):
            return groups[i if index is None else index[i]]
    return None


class _NoAdagrad:
    """A stand-in for Adagrad's class while DeepSpeed asks whether an optimizer is one."""


class _AdagradState(dict[Any, Any]):
    """Adagrad's state, made for a tensor when it is first asked for (torch/optim/adagrad.py)."""

    def __init__(self, optimizer: torch.optim.Adagrad) -> None:
        super().__init__()
        self._optimizer = optimizer

    def __missing__(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        start = self._optimizer.defaults["initial_accumulator_value"]
        value = complex(start, start) if torch.is_complex(tensor) else start
        self[tensor] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "sum": torch.full_like(tensor, value, memory_format=torch.preserve_format),
        }
        return self[tensor]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _import(path: str) -> type[Any]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            Problem(f"{path} cannot be imported", str(error), f"install {module.split('.')[0]}")
        ) from error


def _without_switches(cls: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return parameters of DeepSpeed's config under the names that the constructor itself takes."""
    given = dict(given)
    given.pop("torch_adam", None)
    decoupled = given.pop("adam_w_mode", None)
    if decoupled is not None and cls.endswith("DeepSpeedCPUAdam"):
        given["adamw_mode"] = decoupled
    elif decoupled is not None and cls.endswith("FusedAdam"):
        given["adam_w_mode"] = decoupled
    return given


def _suggest(name: str, known: list[str]) -> str:
    close = nearest(name, known)
    return f"did you mean {close}?" if close else "leave it out"


def _row_of(cls: type[Any]) -> Optimizer | None:
    """Return the table's row of a class, or None; torch's classes live in modules of their own."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__.startswith("torch.optim."):
        path = f"torch.optim.{cls.__name__}"
    if path == "torch.optim.Muon":
        return _TORCH_MUON
    for row in OPTIMIZERS:
        if any(b is not None and b.cls == path for b in (*row.builds, row.offload)):
            return row
    return None
