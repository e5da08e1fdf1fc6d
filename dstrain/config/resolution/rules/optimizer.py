"""Rules of the optimizer: its implementation and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstrain.config import optimizers
from dstrain.config.optimizer_table import Build, Optimizer
from dstrain.config.resolution.rules.rule import Binding, Derivation, Derived, View, same
from dstrain.core.errors import Problem


def setting_of(view: View) -> optimizers.Setting:
    """Return the setting in which the optimizer runs."""
    return optimizers.Setting(
        view.stage, view.offload_optimizer, view.facts.device, view.facts.packages
    )


def row_of(view: View) -> Optimizer | None:
    """Return the optimizer of the type in the config, or else of argument ``optim``."""
    kind = view.config.get("optimizer", {}).get("type")
    return optimizers.find(view.optim, kind if isinstance(kind, str) and kind != "auto" else None)


def _build(view: View) -> Build | None:
    row = row_of(view)
    return None if row is None else optimizers.build_of(row, setting_of(view))


def _optimizer_type(view: View) -> Derived | None:
    row, build = row_of(view), _build(view)
    assert row is not None
    if build is None:
        return Derived(row.name, f"optim={view.optim!r}")  # refused after all rules
    name = build.cls.rsplit(".", 1)[1]
    if view.offloads_optimizer:
        return Derived(build.type or build.cls, f"optim={view.optim!r} with offload runs {name}")
    how = f"optim={view.optim!r}" if build.type else f"optim={view.optim!r}, built by dstrain"
    return Derived(build.type or build.cls, how)


def _argument(kind: Any) -> tuple[Any, ...]:
    """Return the value of ``optim`` for a type in the config, or None, as a tuple."""
    return (optimizers.argument_of(str(kind)),)


def _takes(view: View, name: str) -> bool:
    row = row_of(view)
    return row is None or name in row.hyper


def _betas(view: View) -> Derived | None:
    row = row_of(view)
    if row is None or "betas" not in row.hyper:
        return None
    betas = [view.adam_beta1, view.adam_beta2]
    if "beta3" in row.options:
        options, _ = optimizers.options_of(row, _build(view), view.optim_args, "")
        third = options.get("beta3", 0.9999)
        return Derived([*betas, third], f"adam_beta1, adam_beta2, and beta3={third} of optim_args")
    return Derived(betas)


def _eps(view: View) -> Derived | None:
    row = row_of(view)
    if row is not None and "eps" in row.hyper:
        return Derived(view.adam_epsilon)
    return _option("eps")(view)  # for other optimizers eps has another meaning and another default


def _weight_decay(view: View) -> Derived | None:
    return Derived(view.weight_decay) if _takes(view, "weight_decay") else None


def _constant(name: str) -> Callable[[View], Derived | None]:
    """Return a rule for a parameter that is always passed to the implementation."""

    def derive(view: View) -> Derived | None:
        build = _build(view)
        if build is None or name not in build.params:
            return None
        if name == "fused" and not view.config["optimizer"].get("params", {}).get("torch_adam"):
            return None  # DeepSpeed's kernel has no such parameter
        how = f"optim={view.optim!r}"
        if view.offloads_optimizer:
            how = f"offloaded: {build.cls.rsplit('.', 1)[1]}"
        return Derived(build.params[name], how)

    return derive


def _option(name: str) -> Callable[[View], Derived | None]:
    """Return a rule for a parameter from ``optim_args``."""

    def derive(view: View) -> Derived | None:
        row = row_of(view)
        if row is None or not view.optim_args or name == "beta3":
            return None
        options, _ = optimizers.options_of(row, _build(view), view.optim_args, "")
        return Derived(options[name], "argument optim_args") if name in options else None

    return derive


def _allow_untested(view: View) -> Derived | None:
    """Return True for an optimizer that DeepSpeed runs under ZeRO only with this key."""
    if view.stage == 0:
        return None
    if view.facts.user_optimizer:
        return Derived(True, "your own optimizer")
    build = _build(view)
    kind = str(view.config.get("optimizer", {}).get("type", ""))
    if (build is None and not kind) or (build is not None and build.cls in optimizers.TESTED):
        return None
    name = build.cls.rsplit(".", 1)[1] if build is not None else kind
    return Derived(True, f"DeepSpeed asks for it before ZeRO runs {name}")


def _force_cpu_optimizer(view: View) -> Derived | None:
    """Return False for an offloaded optimizer that DeepSpeed does not build by name."""
    if not view.offloads_optimizer:
        return None
    if view.facts.user_optimizer:
        return Derived(False, "your own optimizer runs as given, on the host")
    build = _build(view)
    if build is None or build.type:
        return None  # DeepSpeed accepts every optimizer that it builds by name
    return Derived(False, f"{build.cls.rsplit('.', 1)[1]} runs on the host")


def _reduce_scatter(view: View) -> Derived | None:
    row = row_of(view)
    if view.facts.user_optimizer or row is None or row.name != "muon" or view.stage != 3:
        return None
    return Derived(False, "Muon needs whole gradients, which stage 3 then reduces on every rank")


def chosen_optimizer(
    view: View, explicit: Mapping[str, Any], changed: frozenset[str], label: str
) -> tuple[Build | None, list[Problem], list[str]]:
    """Return the implementation that runs, problems, and warnings.

    Args:
        view: the config after all rules.
        explicit: values in the user's config, by dotted path.
        changed: names of arguments that are not at their default.
        label: name of the user's config in messages.
    """
    row, setting = row_of(view), setting_of(view)
    if row is None:
        return None, [], []
    kind = explicit.get("optimizer.type")
    shown = f"optim={view.optim!r}" if kind is None else f"optimizer.type={kind!r} in {label}"
    problems = optimizers.refusals(row, setting, shown)
    build = optimizers.build_of(row, setting)
    problems += optimizers.options_of(row, build, view.optim_args, shown)[1]
    warnings = []
    if kind is None:
        known = optimizers.parameters_of(row)
        for path, value in explicit.items():
            name = path.removeprefix("optimizer.params.")
            if path != name and name not in known:
                why = f"{shown} has no such parameter"
                problems.append(Problem(f"{path}={value!r} in {label}", why, "remove it"))
    if "weight_decay" not in row.hyper and view.weight_decay:
        what = f"weight_decay={view.weight_decay} with {shown}"
        problems.append(Problem(what, "it decays no weights", "leave weight_decay at 0"))
    betas = [name for name in ("adam_beta1", "adam_beta2") if name in changed]
    if betas and "betas" not in row.hyper:
        warnings.append(f"{' and '.join(betas)} without effect: {shown} has no betas")
    if row.warning and setting.stage >= row.warns_from and not problems:
        warnings.append(f"{shown} with {setting}: {row.warning}")
    if row.name == "muon":
        problems += _muon_problems(view, explicit, f"{shown} with {setting}", label)
    return build, problems, warnings


def _muon_problems(
    view: View, explicit: Mapping[str, Any], shown: str, label: str
) -> list[Problem]:
    """Return problems of settings with which DeepSpeed's Muon does not run."""
    problems = []
    if view.stage == 3 and explicit.get("zero_optimization.reduce_scatter"):
        problems.append(
            Problem(
                f"zero_optimization.reduce_scatter=True in {label}, for {shown}",
                "at stage 3 DeepSpeed's Muon needs whole gradients on every rank",
                "set it to false, or remove it",
            )
        )
    return problems


RULES: tuple[Binding | Derivation, ...] = (
    Binding("optimizer.type", ("optim",), _optimizer_type, adopt=_argument),
    Binding("optimizer.params.lr", ("learning_rate",), same("learning_rate")),
    Binding(
        "optimizer.params.betas",
        ("adam_beta1", "adam_beta2"),
        _betas,
        adopt=lambda value: tuple(value),
    ),
    Binding("optimizer.params.eps", ("adam_epsilon",), _eps),
    Binding("optimizer.params.weight_decay", ("weight_decay",), _weight_decay),
    *(
        Derivation(
            f"optimizer.params.{name}",
            "what the chosen implementation needs",
            ("optim", "offload_optimizer"),
            _constant(name),
            # Without adam_w_mode DeepSpeed's Adam is AdamW, also for optim="adam".
            conflicts=name == "adam_w_mode",
        )
        for name in optimizers.constant_names()
    ),
    *(
        Derivation(
            f"optimizer.params.{name}",
            "as optim_args says, where the optimizer has such an option",
            ("optim_args",),
            _option(name),
            conflicts=True,
        )
        for name in optimizers.option_names()
        if name not in ("eps", *optimizers.constant_names())
    ),
    Derivation(
        "zero_force_ds_cpu_optimizer",
        "false for an optimizer that DeepSpeed does not build, under offload",
        ("offload_optimizer",),
        _force_cpu_optimizer,
    ),
    Derivation(
        "zero_allow_untested_optimizer",
        "true for optimizers that DeepSpeed has no ZeRO test of",
        ("optim",),
        _allow_untested,
    ),
    Derivation(
        "zero_optimization.reduce_scatter",
        "false for Muon at stage 3",
        ("optim",),
        _reduce_scatter,
    ),
)
