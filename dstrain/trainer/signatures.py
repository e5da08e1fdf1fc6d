"""Signatures of overrides and of functions that users pass: older ones served, others refused.

Releases of transformers have added arguments to methods that subclasses override. An override that
was written before such an argument is called without it; one that cannot be called at all is an
error when the Trainer is made, not in the first step, evaluation or save.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.core.errors import ConfigError, Problem

# What calls tell an override so that it may do better; without it, it does what it always did.
_HINTS = frozenset({"num_items_in_batch", "start_time", "_internal_call", "trial", "optimizer"})
_NO_DEFAULT = inspect.Parameter.empty
_OUTPUTS = "return_outputs"


@dataclass(frozen=True)
class Call:
    """Describes a call: the number of arguments by position, and the names of the others."""

    positional: int = 0
    named: tuple[str, ...] = ()

    def fits(self, signature: inspect.Signature) -> bool:
        """Tell whether a callable of this signature takes the call."""
        try:
            signature.bind(*[None] * self.positional, **dict.fromkeys(self.named))
        except TypeError:
            return False
        return True


_LOOP = ("description", "prediction_loss_only", "ignore_keys", "metric_key_prefix")
# Method -> how this package calls it.
METHODS: dict[str, tuple[Call, ...]] = {
    "training_step": (Call(3),),
    "compute_loss": (Call(2, ("num_items_in_batch",)), Call(2, (_OUTPUTS, "num_items_in_batch"))),
    "prediction_step": (Call(3, ("ignore_keys",)),),
    "prediction_loop": (Call(1, _LOOP),),
    "evaluation_loop": (Call(5),),
    "evaluate": (Call(), Call(0, ("ignore_keys",)), Call(3)),
    "log": (Call(1),),
    "save_model": (Call(0, ("_internal_call",)), Call(1, ("_internal_call",))),
    "save_state": (Call(),),
    "create_optimizer": (Call(),),
    "create_scheduler": (Call(1), Call(2)),
    "create_optimizer_and_scheduler": (Call(1),),
    "get_optimizer_cls_and_kwargs": (Call(2),),
    "get_decay_parameter_names": (Call(1),),
    "get_train_dataloader": (Call(),),
    "get_eval_dataloader": (Call(1),),
    "get_test_dataloader": (Call(1),),
    "num_examples": (Call(1),),
    "get_num_trainable_parameters": (Call(),),
    "floating_point_ops": (Call(1),),
    "count_flos": (Call(1),),
    "store_flos": (Call(),),
    "derived_metrics": (Call(2),),
    "call_model_init": (Call(1),),
    "compute_loss_context_manager": (Call(),),
    "autocast_smart_context_manager": (Call(),),
    "_prepare_inputs": (Call(1),),
    "init_hf_repo": (Call(),),
}
_EVENT = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader",
          "eval_dataloader")  # fmt: skip
_EVENTS_WITH = {"on_log": ("logs",), "on_evaluate": ("metrics",), "on_predict": ("metrics",)}


class Served:
    """Calls an override with those arguments that it takes."""

    def __init__(self, name: str, override: Callable[..., object], base: inspect.Signature) -> None:
        """Compare an override's signature with the one that callers know.

        Args:
            name: the method's name.
            override: the user's function.
            base: the signature that callers know.
        """
        self.override = override
        self._name, self._base = name, base
        signature = inspect.signature(override)
        self._leading = sum(p.default is _NO_DEFAULT for p in _plain(base))
        self._taken = {p.name for p in _plain(signature)} - {
            p.name for p in _plain(signature)[: self._leading]
        }
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        defaults = {p.name: p.default for p in _plain(base) if p.default is not _NO_DEFAULT}
        required = [p for p in _plain(signature)[self._leading :] if p.default is _NO_DEFAULT]
        self._defaults = {p.name: defaults[p.name] for p in required if p.name in defaults}

    def knows(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Tell whether a call fits the method that was overridden."""
        try:
            self._base.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def reduced(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """Choose the arguments for the override, by position and by name, and those left out.

        Args:
            args: by position, of a call that ``knows`` knows.
            kwargs: by name.
        """
        given = self._base.bind(*args, **kwargs).arguments
        positional: list[Any] = []
        named, left_out = dict(self._defaults), {}
        for parameter in self._base.parameters.values():
            if parameter.name not in given:
                continue
            value = given[parameter.name]
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= value
            elif parameter.default is _NO_DEFAULT:
                positional.append(value)
            elif self._takes_any or parameter.name in self._taken:
                named[parameter.name] = value
            elif parameter.name not in _HINTS and value is not parameter.default:
                left_out[parameter.name] = value
        return positional, named, left_out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the override.

        Raises:
            ConfigError: it cannot be told something that it must know.
        """
        if not self.knows(args, kwargs):  # by its own class, with arguments of its own
            return self.override(*args, **kwargs)
        positional, named, left_out = self.reduced(args, kwargs)
        if left_out:
            raise ConfigError(
                Problem(
                    f"{self._name} is called with {_shown(left_out)}",
                    f"the override takes only {inspect.signature(self.override)}",
                    f"write it as def {self._name}{self._base}",
                )
            )
        return self.override(*positional, **named)


class ServedLoss(Served):
    """A ``compute_loss`` that cannot be asked for the model's outputs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the override's loss; outputs, where asked for, raise an error when used."""
        if not self.knows(args, kwargs):
            return self.override(*args, **kwargs)
        positional, named, left_out = self.reduced(args, kwargs)
        wanted = left_out.pop(_OUTPUTS, False)
        loss = self.override(*positional, **named)
        return (loss, _NoOutputs()) if wanted else loss


class _NoOutputs:
    """Stands in place of outputs that are not known; any use of it is an error."""

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(_WITHOUT_OUTPUTS)


_WITHOUT_OUTPUTS = Problem(
    "predictions are wanted, and compute_loss takes no return_outputs",
    "so nobody gets to know the outputs of the model, of which predictions are made",
    "write it as def compute_loss(self, model, inputs, return_outputs=False, **kwargs), and return "
    "(loss, outputs) when return_outputs is true",
)


@dataclass(frozen=True)
class Functions:
    """Holds the functions and classes that a user passes to a Trainer.

    Attributes:
        compute_loss_func: (outputs, labels, num_items_in_batch) -> loss.
        compute_metrics: prediction -> metrics.
        preprocess_logits_for_metrics: (logits, labels) -> logits.
        data_collator: list of samples -> batch.
        callbacks: classes or instances.
        optimizer_cls_and_kwargs: class of an optimizer, and what it is called with.
    """

    compute_loss_func: Callable[..., Any] | None = None
    compute_metrics: Callable[..., Any] | None = None
    preprocess_logits_for_metrics: Callable[..., Any] | None = None
    data_collator: Callable[..., Any] | None = None
    callbacks: Iterable[Any] = ()
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Overridden:
    """Describes a method of a Trainer that a user has replaced.

    Attributes:
        name: the method's name.
        override: the user's method, bound.
        base: dstrain's method, bound.
        title: class and name, for messages.
    """

    name: str
    override: Callable[..., Any]
    base: Callable[..., Any]
    title: str


def serve_overrides(
    overridden: Iterable[Overridden], *, wants_predictions: bool
) -> tuple[dict[str, Served], list[Problem]]:
    """Find out how older overrides can be called, and which cannot.

    Args:
        overridden: the methods that a user has replaced.
        wants_predictions: whether evaluations need the outputs of ``compute_loss``.

    Returns:
        by name, what is to be called in place of an override; and the problems of those that cannot
        be called.
    """
    to_call: dict[str, Served] = {}
    problems = []
    for method in overridden:
        if isinstance(method.override, Served):
            continue
        known = inspect.signature(method.base)
        served, problem = _serve(
            method.title, method.name, method.override, known, METHODS[method.name]
        )
        if problem is not None:
            problems.append(problem)
        elif served is not None:
            to_call[method.name] = served
        if isinstance(served, ServedLoss) and wants_predictions:
            problems.append(_WITHOUT_OUTPUTS)
    return to_call, problems


def serve_loss_function(function: Callable[..., object] | None) -> Callable[..., Any] | None:
    """Return a ``compute_loss_func`` that may be called with ``num_items_in_batch``."""
    if function is None or not callable(function):  # which ``misfits_of`` refuses
        return function
    base = inspect.signature(_loss_function)
    served, _ = _serve("", "compute_loss_func", function, base, _LOSS_CALLS)
    return function if served is None else served


def misfits_of(functions: Functions) -> list[Problem]:
    """List the problems of a user's functions that cannot be called as this package does."""
    problems = []
    for name, base, calls in (
        ("compute_loss_func", _loss_function, _LOSS_CALLS),
        ("compute_metrics", _metrics, (Call(1),)),
        ("preprocess_logits_for_metrics", _preprocess, (Call(2),)),
        ("data_collator", _collate, (Call(1),)),
    ):
        function = getattr(functions, name)
        if function is not None and not callable(function):
            problems.append(
                Problem(
                    f"{name}={function!r}",
                    f"it is a {type(function).__name__}, which cannot be called",
                    f"pass a function of {inspect.signature(base)}",
                )
            )
        elif function is not None:
            _, problem = _serve(name, name, function, inspect.signature(base), calls)
            problems += [] if problem is None else [problem]
    for callback in functions.callbacks:
        problems += callback_misfits(callback)
    return problems + _optimizer_misfits(functions.optimizer_cls_and_kwargs)


def callback_misfits(callback: object) -> list[Problem]:
    """List the problems of a callback's methods that cannot take what events pass."""
    cls = callback if isinstance(callback, type) else type(callback)
    problems = []
    for name in sorted(n for n in dir(cls) if n.startswith("on_")):
        method, extra = getattr(cls, name), _EVENTS_WITH.get(name, ())
        signature = _signature(method)
        if signature is None or Call(4, (*_EVENT, *extra)).fits(signature):
            continue
        named = "".join(f"{what}=None, " for what in extra)
        problems.append(
            Problem(
                f"{cls.__name__}.{name}{signature} cannot be called",
                f"it is passed args, state and control, and by name {', '.join(_EVENT + extra)}",
                f"write it as def {name}(self, args, state, control, {named}**kwargs)",
            )
        )
    return problems


def _serve(
    title: str,
    name: str,
    override: Callable[..., object],
    base: inspect.Signature,
    calls: tuple[Call, ...],
) -> tuple[Served | None, Problem | None]:
    """Wrap an older override (None: it takes all calls as it is), or say what is wrong."""
    signature = _signature(override)
    if signature is None or all(call.fits(signature) for call in calls):
        return None, None
    lacks_outputs = name == "compute_loss" and _OUTPUTS not in signature.parameters
    served = (ServedLoss if lacks_outputs else Served)(name, override, base)
    for call in calls:
        positional, named, _ = served.reduced((None,) * call.positional, dict.fromkeys(call.named))
        if not Call(len(positional), tuple(named)).fits(signature):
            return None, Problem(
                f"{title}{signature} cannot be called",
                f"it is called as {name}{base}",
                f"write it as def {name}{base}, or with **kwargs",
            )
    return served, None


def is_ours(cls: type) -> bool:
    """Tell whether a class is of this package."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _optimizer_misfits(cls_and_kwargs: tuple[object, dict[str, object]] | None) -> list[Problem]:
    if cls_and_kwargs is None:
        return []
    import torch

    cls, kwargs = cls_and_kwargs
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        return []  # a factory, which is called without arguments
    signature = _signature(cls)
    named = tuple(name for name in kwargs if name != "params")
    if signature is None or Call(1, named).fits(signature):
        return []
    return [
        Problem(
            f"optimizer_cls_and_kwargs: {cls.__name__} cannot be called with {', '.join(named)}",
            f"it takes {signature}",
            "pass what it takes",
        )
    ]


def _signature(function: Callable[..., object]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of a function in C that does not say
        return None


def _plain(signature: inspect.Signature) -> list[inspect.Parameter]:
    """List the parameters that are neither ``*args`` nor ``**kwargs``."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in signature.parameters.values() if p.kind not in several]


def _shown(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


# Signatures of functions that a user passes.


def _loss_function(outputs: object, labels: object, num_items_in_batch: object = None) -> Any: ...


def _metrics(prediction: object) -> Any: ...


def _preprocess(logits: object, labels: object) -> Any: ...


def _collate(samples: object) -> Any: ...


_LOSS_CALLS = (Call(2, ("num_items_in_batch",)),)
