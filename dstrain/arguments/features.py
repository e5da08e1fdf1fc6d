"""Arguments about computation of the model: memory, compilation, kernels, noise, loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from dstrain.arguments.choice import Choice
from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import alias, implemented, refused
from dstrain.core.errors import Problem

# Older name in transformers -> newer name.
_OLD_TO_NEW = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
TWINS = _OLD_TO_NEW | {new: old for old, new in _OLD_TO_NEW.items()}


@dataclass
class FeatureArguments:
    """Changes to the model, its loss and its memory."""

    gradient_checkpointing: bool = arg(
        False,
        "Recompute activations in the backward pass instead of keeping them.",
        treatment=implemented("the model's own, while it trains; the cache of keys is off then"),
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = arg(
        None,
        'Arguments of the recomputation, such as {"use_reentrant": true}; none is not reentrant. '
        "`every_n_layers` recomputes only every so many layers, and `offload` keeps what is left "
        "in host memory.",
        treatment=implemented(),
    )
    activation_checkpointing: bool | None = arg(
        None,
        "The name of gradient_checkpointing in newer transformers; none is what that says.",
        treatment=implemented("both names always read the same", own=True),
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = arg(
        None,
        "The name of gradient_checkpointing_kwargs in newer transformers.",
        treatment=implemented("both names always read the same", own=True),
    )
    use_cache: bool = arg(
        False,
        "Let the model fill its cache of keys and values in training, as some methods of PEFT "
        "need it.",
        treatment=implemented(
            "off otherwise, in forward passes of training and evaluation; `config.use_cache` stays "
            "what it was",
            own=True,
        ),
    )
    torch_compile: bool = arg(
        False,
        "Compile the model with torch.compile.",
        treatment=implemented("the engine of a training, with DeepSpeed's hooks; saved names stay"),
    )
    torch_compile_backend: str | None = arg(
        None,
        "Backend of torch.compile; setting it turns torch_compile on.",
        treatment=implemented("inductor unless said otherwise"),
    )
    torch_compile_mode: str | None = arg(
        None,
        "Mode of torch.compile; setting it turns torch_compile on.",
        treatment=implemented("of inductor, which alone has modes"),
    )
    torchdynamo: str | None = arg(
        None, "Old name of torch_compile_backend.", treatment=alias("torch_compile_backend")
    )
    use_liger_kernel: bool | None = arg(
        False,
        "Replace layers of the model by Liger kernels.",
        treatment=implemented("needs the package liger-kernel and a GPU, and says so elsewhere"),
    )
    liger_kernel_config: dict[str, Any] | str | None = arg(
        None,
        'Liger kernels to use, such as {"rope": true, "swiglu": false}; none is Liger\'s choice '
        "for the model.",
        treatment=implemented("with `use_liger_kernel`", own=True),
    )
    neftune_noise_alpha: float | None = arg(
        None,
        "Strength of NEFTune's noise on the embeddings.",
        treatment=implemented("in training alone"),
    )
    label_smoothing_factor: float = arg(
        0.0,
        "Share of the target's probability spread over all labels.",
        treatment=implemented(
            "in training and in the loss of an evaluation; off, with a warning, for multi-label "
            "classification"
        ),
    )
    average_tokens_across_devices: bool | None = arg(
        False,
        "Weight the loss by the targets of all ranks and micro-batches.",
        treatment=implemented(
            "in any case: the loss is the mean over all targets of the global batch"
        ),
    )
    torch_empty_cache_steps: int | None = arg(
        None,
        "Optimizer steps after which the accelerator's memory cache is emptied; none never does.",
        treatment=implemented(),
    )
    tp_size: int | None = arg(
        0,
        "Ranks that share each layer (tensor parallelism).",
        treatment=refused(
            "the checkpoints, the data order and the loss of dstrain take every rank for one of "
            "data parallelism, where ZeRO partitions the model",
            "set zero_stage to 3, or leave it out",
            accepts=lambda value: value <= 1,
        ),
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the object and keep the order of keyword arguments, for ``_changed_in_a_copy``."""
        self = super().__new__(cls)
        # Only values of checked arguments, which a copy has, are a ``Choice``.
        if any(isinstance(value, Choice) for value in kwargs.values()):
            vars(self)["_given"] = tuple(kwargs)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, and its second name if it has one.

        Setting ``torch_compile`` to False clears the settings of torch.compile.
        """
        super().__setattr__(name, value)
        if "_twins_agree" not in vars(self):
            return
        if name in TWINS:
            super().__setattr__(TWINS[name], value)
        if name == "torch_compile" and value is False:
            self._forget_compiler(())

    def _changed_in_a_copy(self) -> tuple[str, ...]:
        """Return the names that ``dataclasses.replace`` has changed; () if this object is no copy.

        ``replace`` passes the changed names first, then all other fields in order of declaration.
        """
        given = vars(self).pop("_given", ())
        order = {f.name: n for n, f in enumerate(dataclasses.fields(self)) if f.init}
        if not order.keys() <= set(given):
            return ()
        start = len(given) - 1
        while start > 0 and order[given[start - 1]] < order[given[start]]:
            start -= 1
        return given[:start]

    def _forget_compiler(self, changed: tuple[str, ...]) -> None:
        """Clear settings that turn torch.compile on, except for those in ``changed``."""
        for name in ("torch_compile_backend", "torch_compile_mode"):
            if name not in changed:
                vars(self)[name] = None

    def _join_twins(self) -> None:
        """Give both names of a field one value; the newer name wins, as in transformers.

        In a copy by ``dataclasses.replace`` the changed name wins, since its second name has the
        value from before. The newer name stays None if the feature is off.
        """
        changed = self._changed_in_a_copy()
        if "torch_compile" in changed and self.torch_compile is False:
            self._forget_compiler(changed)
        for old, new in _OLD_TO_NEW.items():
            value, newer = getattr(self, old), getattr(self, new)
            is_told_none = new in changed and getattr(type(self), old) is None
            if (newer is None and not is_told_none) or (old in changed and new not in changed):
                vars(self)[new] = value or None
            else:
                vars(self)[old] = newer
        vars(self)["_twins_agree"] = True

    def _read_cache_steps(self) -> Problem | None:
        """Return the problem of a number of steps that is no integer; conversion would round it."""
        steps: Any = self.torch_empty_cache_steps
        is_none = isinstance(steps, str) and steps.strip().lower() == "none"
        if not isinstance(steps, float) and not is_none:
            return None
        self.torch_empty_cache_steps = None
        return Problem(
            f"torch_empty_cache_steps={steps!r} ({type(steps).__name__})",
            "a whole number of steps above 0 is needed",
            "leave it out to keep the memory cache",
        )

    def _feature_problems(self) -> list[Problem]:
        problems = []
        if self.neftune_noise_alpha is not None and self.neftune_noise_alpha < 0:
            problems.append(
                Problem(f"neftune_noise_alpha={self.neftune_noise_alpha}", "0 or more is needed")
            )
        if not 0 <= self.label_smoothing_factor <= 1:
            problems.append(
                Problem(
                    f"label_smoothing_factor={self.label_smoothing_factor}",
                    "a share between 0 and 1 is needed",
                )
            )
        if self.torch_empty_cache_steps is not None and self.torch_empty_cache_steps < 1:
            problems.append(
                Problem(
                    f"torch_empty_cache_steps={self.torch_empty_cache_steps}",
                    "a whole number of steps above 0 is needed",
                )
            )
        return problems
