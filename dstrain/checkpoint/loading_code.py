"""Calling users' loading code in a model's modules after weights were read without torch.

Weights are read into place a slice at a time, without ``load_state_dict``. A model may rely on that
call: a hook or an override may compute something from the loaded weights. Such code is called here
with the model's own ``state_dict``, which has the checkpoint's weights by then. It has its usual
effects, except on weights: these stay as they were saved.

Code of torch, transformers and other libraries of layers is not called. It converts files of older
versions, or takes a rank's share of a whole weight; in a dstrain checkpoint each tensor has its
name in the model, and is already in place.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, gather_objects
from dstrain.engine import Engine, bytes_to_gather, checksum, free_memory_bytes, gathered

logger = get_logger(__name__)

_Module = torch.nn.Module
_LIBRARIES = frozenset(
    [
        "accelerate",
        "bitsandbytes",
        "deepspeed",
        "peft",
        "torch",
        "torchao",
        "torchaudio",
        "torchvision",
        "transformers",
    ]
)


def call_loading_code(engine: Engine, ranks: Ranks) -> bool:
    """Call the loading code that users have written for modules; a collective of all ranks.

    At stage 3 the weights of a module with such code, and of its submodules, are gathered for the
    call, one such module after another, once all are known to fit on every rank. For a model
    without such code its modules are only searched.

    Returns:
        True, on all ranks, if weights were changed and must be read again.

    Raises:
        CheckpointError: such code failed, or the weights to gather do not fit into memory.
    """
    outcome = _Outcome()
    calls = list(_calls(engine.module))
    _check_room(calls, ranks)
    for call in calls:
        with gathered(call.part.parameters(), checks=False):
            outcome.note(call)
    with all_or_none():
        if outcome.failures:
            raise CheckpointError(*outcome.failures)
    changed = sorted({name for theirs in gather_objects(outcome.changed) for name in theirs})
    if changed and ranks.is_main:
        logger.warning(
            "loading code of the model changes %d weights (%s): they are left as they were saved, "
            "as the run went on with these",
            len(changed),
            ", ".join(changed[:3]),
        )
    if outcome.is_any:
        engine.buffers.note_values()  # so that these writes do not count as changes by training
    return bool(changed)


def _check_room(calls: Sequence[_Call], ranks: Ranks) -> None:
    """Check that the weights to gather fit on every rank; a collective if any are partitioned.

    Raises:
        CheckpointError: they do not fit; the message, alike on all ranks, names the code that needs
            them.
    """
    sizes = [bytes_to_gather(call.part) for call in calls]
    most = max(sizes, default=0)
    if not most:
        return
    free = min(gather_objects(free_memory_bytes(ranks)))
    if most <= free:
        return
    call = calls[sizes.index(most)]
    raise CheckpointError(
        Problem(
            f"{call.name} of {_shown(call.path)} needs the weights whole when they are loaded",
            f"they take {most / 1e9:.1f} GB on every rank, and one has {free / 1e9:.1f} GB free",
            "put the code on the smaller module that it is about, remove it, or resume at a stage "
            "below 3",
        )
    )


@dataclass(frozen=True)
class _Call:
    """Pending call of a module's loading code.

    Attributes:
        path: path of the module in the model.
        part: the module; its weights are gathered for the call.
        name: name of the code, for messages.
        run: function that makes the call.
    """

    path: str
    part: _Module
    name: str
    run: Callable[[], object]


@dataclass
class _Outcome:
    """Results of the calls made on this rank.

    Attributes:
        failures: an error for each call that failed.
        changed: names of the weights that calls have changed.
        is_any: whether anything was called.
    """

    failures: list[Problem] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    is_any: bool = False

    def note(self, call: _Call) -> None:
        """Make a call and restore changed parameter objects; keep a failure as a problem.

        A failure is not raised here, as other ranks may wait in a gather.
        """
        self.is_any = True
        path, part = call.path, call.part
        before = _weights(part)
        try:
            call.run()
        except Exception as error:  # user code may raise anything
            self.failures.append(
                Problem(
                    f"{call.name} of {_shown(path)} failed",
                    f"{type(error).__name__}: {error}",
                    "it is called with the state_dict of the model, as load_state_dict does: "
                    "mend it, or resume with the model that was saved",
                )
            )
        for (owner, key), (parameter, seen) in before.items():
            if owner._parameters.get(key) is not parameter:
                owner._parameters[key] = parameter  # the object that the optimizer updates
            elif _checksum_of(parameter) == seen:
                continue
            name = next(n for n, module in part.named_modules() if module is owner)
            self.changed.append(".".join(filter(None, (path, name, key))))


def _weights(part: _Module) -> dict[tuple[_Module, str], tuple[torch.nn.Parameter, int]]:
    """Return the parameters of a module and its submodules by owner and key, with checksums."""
    return {
        (owner, key): (parameter, _checksum_of(parameter))
        for owner in part.modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    }


def _checksum_of(parameter: torch.nn.Parameter) -> int:
    return int(checksum(parameter)) if parameter.numel() else 0


def _calls(module: _Module) -> Iterator[_Call]:
    """Yield the calls to make, in the order in which torch makes them."""
    load: Any = module.load_state_dict
    if _is_user_code(load):
        yield _Call("", module, "load_state_dict", lambda: load(module.state_dict()))
        return
    named = list(module.named_modules())
    for path, part in named:
        found = ["_load_from_state_dict"] if _is_user_code(part._load_from_state_dict) else []
        found += map(_name_of, _user_hooks(part._load_state_dict_pre_hooks))
        if found:
            yield _Call(path, part, found[0], functools.partial(_load_one, path, part))
    for path, part in reversed(named):  # children before their parents
        if hooks := _user_hooks(part._load_state_dict_post_hooks):
            yield _Call(
                path, part, _name_of(hooks[0]), functools.partial(_call_post_hooks, part, hooks)
            )


def _load_one(path: str, part: _Module) -> None:
    """Load a module with its own state, without its submodules, as ``load_state_dict`` would."""
    prefix = f"{path}." if path else ""
    own: Any = part.state_dict(prefix=prefix)
    state: Any = OrderedDict(own)
    metadata = getattr(own, "_metadata", {})
    state._metadata = metadata
    errors: list[str] = []
    part._load_from_state_dict(state, prefix, metadata.get(path, {}), True, [], [], errors)
    if errors:
        raise RuntimeError("; ".join(errors))


def _call_post_hooks(part: _Module, hooks: list[Callable[..., object]]) -> None:
    from torch.nn.modules.module import _IncompatibleKeys

    for hook in hooks:
        hook(part, _IncompatibleKeys([], []))


def _user_hooks(hooks: Mapping[int, Callable[..., object]]) -> list[Callable[..., object]]:
    return [hook for hook in hooks.values() if _is_user_code(hook)]


def _is_user_code(code: Callable[..., object]) -> bool:
    """Tell whether a hook or method is defined outside the libraries listed above."""
    home = getattr(_unwrapped(code), "__module__", None) or ""
    return home.split(".")[0] not in _LIBRARIES


def _unwrapped(code: Any) -> Any:
    """Return the function inside wrappers of torch and ``functools.partial``."""
    from torch.nn.modules.module import _WrappedHook

    while isinstance(code, (_WrappedHook, functools.partial)):
        code = code.hook if isinstance(code, _WrappedHook) else code.func
    return code


def _name_of(hook: Callable[..., object]) -> str:
    inner = _unwrapped(hook)
    return f"the hook {getattr(inner, '__qualname__', type(inner).__name__)}"


def _shown(path: str) -> str:
    return f"the module {path or '(the model)'}"
