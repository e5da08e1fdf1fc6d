"""Changing a model as arguments ask while it trains, and undoing that when training ends."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.adapters import inner_model
from dstrain.core.errors import ConfigError, Problem, nearest, raise_problems
from dstrain.core.log import get_logger

logger = get_logger(__name__)

# Of one feature: its name in newer transformers, and in older ones and other libraries' models.
_NAMES = ("activation", "gradient")
_OF_LAYERS = ("every_n_layers", "offload")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_features(model: torch.nn.Module, args: TrainingArguments, *, device: str) -> None:
    """Refuse features that this model or machine cannot have, before anything expensive.

    Raises:
        ConfigError: listing all of them.
    """
    problems: list[Problem] = []
    if args.gradient_checkpointing:
        problems += _checkpointing_problems(model, args, device)
    if args.neftune_noise_alpha is not None and _embeddings(model) is None:
        problems.append(
            Problem(
                f"neftune_noise_alpha={args.neftune_noise_alpha} with {type(model).__name__}",
                "the model has no get_input_embeddings to add noise to",
                "leave it out",
            )
        )
    if args.use_liger_kernel:
        problems += _liger_problems(model, device)
    if args.torch_compile:
        problems += _compile_problems(args)
    raise_problems(problems, error=ConfigError)


@contextlib.contextmanager
def training_features(model: torch.nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Change the model for the time of a training; entered before the engine is built.

    Hooks that are there first run first, so at ZeRO stage 3 ours still see a layer's parameters.
    """
    with contextlib.ExitStack() as undo:
        if args.use_liger_kernel:
            _apply_liger(model, args)
        if args.gradient_checkpointing:
            undo.enter_context(_checkpointing(model, args))
        if args.neftune_noise_alpha is not None:
            embeddings = _embeddings(model)
            assert embeddings is not None, "check_features"
            noise = _noise(args.neftune_noise_alpha)
            undo.callback(embeddings.register_forward_hook(noise).remove)
        if "underflow_overflow" in args.debug:
            undo.enter_context(_watching_for_overflow(model))
        yield


# --- recomputed activations ----------------------------------------------------------------------


def _can_checkpoint(model: object) -> bool:
    supported = getattr(inner_model(model), "supports_gradient_checkpointing", True)
    return any(hasattr(model, f"{name}_checkpointing_enable") for name in _NAMES) and bool(
        supported
    )


def _enables_checkpointing(model: object) -> tuple[str, Callable[..., Any]]:
    """Return this model's name for activation checkpointing, and the method that turns it on."""
    name = next(name for name in _NAMES if hasattr(model, f"{name}_checkpointing_enable"))
    return name, getattr(model, f"{name}_checkpointing_enable")


def _checkpointing_kwargs(args: TrainingArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``gradient_checkpointing_kwargs`` into those for torch and those for the model."""
    given = args.gradient_checkpointing_kwargs
    assert not isinstance(given, str), "parsed on construction"
    kwargs = dict(given or {})
    return kwargs, {name: kwargs.pop(name) for name in _OF_LAYERS if name in kwargs}


def _checkpointing_problems(model: object, args: TrainingArguments, device: str) -> list[Problem]:
    what = type(inner_model(model)).__name__
    if not _can_checkpoint(model):
        return [
            Problem(
                f"gradient_checkpointing=True with {what}",
                "the model has no gradient_checkpointing_enable (activation_checkpointing_enable "
                "in newer transformers), or does not support it",
                "call torch.utils.checkpoint in its forward, or leave it out",
            )
        ]
    _, more = _checkpointing_kwargs(args)
    if more.get("offload") and device == "cpu":
        return [
            Problem(
                "gradient_checkpointing_kwargs['offload'] on the CPU",
                "activations are in host memory there",
                "leave it out",
            )
        ]
    enable = _enables_checkpointing(model)[1]
    taken = inspect.signature(enable).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken):
        return []
    return [
        Problem(
            f"gradient_checkpointing_kwargs[{name!r}] with {what}",
            f"its {enable.__name__} does not take it",
            "leave it out",
        )
        for name in more.keys() - {p.name for p in taken}
    ]


@contextlib.contextmanager
def _checkpointing(model: object, args: TrainingArguments) -> Iterator[None]:
    """Recompute layers in backward.

    Without ``use_reentrant`` transformers takes torch's variant that also works where no input of
    a layer needs a gradient (frozen embeddings, as with LoRA).
    """
    kwargs, more = _checkpointing_kwargs(args)
    inner = inner_model(model)  # the second name is the old one, which warns where there are both
    was_on = getattr(inner, "is_activation_checkpointing", None)
    was_on = getattr(inner, "is_gradient_checkpointing", False) if was_on is None else was_on
    had_hooks = bool(getattr(inner, "_require_grads_hooks", None))
    name, enable = _enables_checkpointing(model)
    enable(**{f"{name}_checkpointing_kwargs": kwargs or None}, **more)
    with contextlib.ExitStack() as undo:
        if not was_on:
            undo.callback(getattr(model, f"{name}_checkpointing_disable"))
        if not had_hooks and hasattr(inner, "disable_input_require_grads"):
            # transformers leaves these on the embeddings: local functions, which cannot be pickled.
            undo.callback(inner.disable_input_require_grads)
        embeddings = _embeddings(model)
        if kwargs.get("use_reentrant") and embeddings is not None:
            frozen = not any(p.requires_grad for p in embeddings.parameters())
            if frozen:
                needs_grad = embeddings.register_forward_hook(lambda m, i, o: o.requires_grad_())
                undo.callback(needs_grad.remove)
        yield


# --- noise on embeddings -------------------------------------------------------------------------


def _embeddings(model: object) -> torch.nn.Module | None:
    find = getattr(inner_model(model), "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        return None if find is None else find()
    return None


def _noise(alpha: float) -> Callable[..., torch.Tensor | None]:
    """Return a hook that adds NEFTune's uniform noise of alpha / sqrt(length x width).

    arXiv 2310.05914, algorithm 1.
    """

    def add(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        bound = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-bound, bound)

    return add


# --- kernels and compilation ---------------------------------------------------------------------


def _liger_problems(model: torch.nn.Module, device: str) -> list[Problem]:
    from transformers import PreTrainedModel

    problems = []
    if find_spec("liger_kernel") is None:
        problems.append(
            Problem(
                "use_liger_kernel=True",
                "the package liger-kernel is not installed",
                "pip install liger-kernel, or leave it out",
            )
        )
    if device == "cpu":
        problems.append(
            Problem(
                "use_liger_kernel=True on the CPU",
                "Liger's kernels are written in Triton, for GPUs",
                "leave it out",
            )
        )
    if not isinstance(inner_model(model), PreTrainedModel):
        problems.append(
            Problem(
                f"use_liger_kernel=True with {type(model).__name__}",
                "Liger knows the layers of transformers' models only",
                "leave it out",
            )
        )
    return problems


def _apply_liger(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Replace layers by Liger's; they stay, since they compute the same."""
    from dstrain.training import compat

    config = args.liger_kernel_config
    assert not isinstance(config, str), "parsed on construction"
    compat.apply_liger_kernel(model, config or None)


def _compile_problems(args: TrainingArguments) -> list[Problem]:
    import torch._dynamo

    problems = []
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend not in backends:
        close = nearest(str(backend), set(backends))
        problems.append(
            Problem(
                f"torch_compile_backend={backend!r}",
                f"this torch has {', '.join(sorted(backends))}",
                f"did you mean {close!r}?" if close else "",
            )
        )
    if mode is not None and mode not in _MODES:
        problems.append(Problem(f"torch_compile_mode={mode!r}", f"expected {', '.join(_MODES)}"))
    if mode is not None and backend != "inductor":
        problems.append(
            Problem(
                f"torch_compile_mode={mode!r} with torch_compile_backend={backend!r}",
                "only inductor has modes",
                "leave one of them out",
            )
        )
    return problems


# --- finding overflow ----------------------------------------------------------------------------


@contextlib.contextmanager
def _watching_for_overflow(model: torch.nn.Module) -> Iterator[None]:
    """Search every layer's weights, inputs and outputs in the block for NaN and infinity."""
    from dstrain.training import compat

    before = {module: set(module._forward_hooks) for module in model.modules()}
    compat.DebugUnderflowOverflow(model)
    try:
        yield
    finally:
        for module, hooks in before.items():
            for key in set(module._forward_hooks) - hooks:
                hook = module._forward_hooks[key]
                if isinstance(getattr(hook, "__self__", None), compat.DebugUnderflowOverflow):
                    del module._forward_hooks[key]
