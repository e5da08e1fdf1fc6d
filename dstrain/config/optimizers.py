"""Optimizers: the implementation that runs and its options, or the reasons why none can run.

The table of all optimizers is in ``README.md`` (``python -m dstrain.config.table``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Final

from dstrain.arguments.optimizer import split_optim_args
from dstrain.config import schema
from dstrain.config.optimizer_table import OPTIMIZERS, Build, Optimizer
from dstrain.config.schema.entry import Key
from dstrain.config.schema.optimizer_keys import OPTIMIZER_PARAMS
from dstrain.core.errors import Problem, nearest

BY_NAME: Final[Mapping[str, Optimizer]] = {row.name: row for row in OPTIMIZERS}
# Type in a DeepSpeed config, in lower case -> its optimizer.
BY_TYPE: Final[Mapping[str, Optimizer]] = {
    **{
        build.type.lower(): row
        for row in reversed(OPTIMIZERS)
        for build in (*row.builds, *filter(None, [row.offload]))
        if build.type
    },
    # DeepSpeed's "Adam" decays weights as AdamW does, unless adam_w_mode is false.
    "adam": BY_NAME["adamw_torch"],
}
# DeepSpeed's list (runtime/zero/utils.py): other optimizers need zero_allow_untested_optimizer.
TESTED: Final = frozenset(
    ["torch.optim.Adam", "torch.optim.AdamW", "torch.optim.Adagrad",
     "deepspeed.ops.adam.FusedAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam",
     "deepspeed.ops.adagrad.DeepSpeedCPUAdagrad", "deepspeed.ops.lion.DeepSpeedCPULion",
     "deepspeed.ops.lion.FusedLion",
     "deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam"]
)  # fmt: skip
# Optimizers whose states DeepSpeed swaps to disk: fp32 tensors of the size of the parameter.
SWAPPABLE: Final = frozenset(
    ["deepspeed.ops.adam.DeepSpeedCPUAdam", "deepspeed.ops.adagrad.DeepSpeedCPUAdagrad",
     "deepspeed.ops.lion.DeepSpeedCPULion"]
)  # fmt: skip
# Names that the planner takes and the table does not have.
_STATE_BYTES: Final[Mapping[str, float]] = {"adamw": 8, "sgd_momentum": 4}
_ARGUMENTS: Final[Mapping[str, str]] = {
    "lr": "learning_rate", "betas": "adam_beta1 and adam_beta2", "beta1": "adam_beta1",
    "beta2": "adam_beta2", "eps": "adam_epsilon", "weight_decay": "weight_decay",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Setting in which an optimizer runs: stage, offload, device.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        offload: "none", "cpu" or "nvme".
        device: torch device type.
        packages: optional packages that can be imported; None if that is not known.
    """

    stage: int
    offload: str = "none"
    device: str = "cuda"
    packages: Set[str] | None = None

    def __str__(self) -> str:
        """Return the setting in words, for errors."""
        return f"stage {self.stage}, optimizer offload {self.offload}, device {self.device}"


def find(optim: str, kind: str | None) -> Optimizer | None:
    """Return the optimizer for argument ``optim`` and type ``kind`` of the DeepSpeed config.

    It is the optimizer of the type. If several have that type and ``optim`` is one of them, it is
    the optimizer of ``optim``. None for a type that the table does not have.
    """
    row = BY_NAME[optim]
    return row if kind is None or stands_for(kind, optim) else BY_TYPE.get(kind.lower())


def stands_for(kind: str, optim: str) -> bool:
    """Tell whether the optimizer of ``optim`` has this type, or class, in a DeepSpeed config."""
    row = BY_NAME[optim]
    types = {build.type.lower() for build in (*row.builds, row.offload) if build and build.type}
    types |= {"adam"} if "adamw" in types else set()
    ours = {row.name, *(build.cls for build in (*row.builds, row.offload) if build)}
    return kind.lower() in types or kind in ours


def argument_of(kind: str) -> str | None:
    """Return the value of ``optim`` for a type of the DeepSpeed config, or None."""
    row = BY_TYPE.get(kind.lower())
    return row.name if row is not None and row.argument else None


def build_of(row: Optimizer, setting: Setting) -> Build | None:
    """Return the implementation that runs in a setting; None if none can."""
    if row.refused or (row.whole and setting.stage > 0):
        return None
    if setting.offload != "none":
        nvme = setting.offload == "nvme" and row.offload and row.offload.cls not in SWAPPABLE
        return None if nvme else row.offload
    return next((b for b in row.builds if not b.devices or setting.device in b.devices), None)


def refusals(row: Optimizer, setting: Setting, shown: str) -> list[Problem]:
    """Return the problems that keep an optimizer from running in a setting.

    Args:
        row: the optimizer.
        setting: stage, offload and device, which the problems name.
        shown: the user's setting that asks for it, such as "optim='lamb'".
    """
    what = f"{shown} with {setting}"
    if row.refused:
        return [Problem(what, row.refused, row.instead)]
    found = []
    if row.whole and setting.stage > 0:
        found.append(Problem(what, row.whole, f"{row.instead}, or set zero_stage to 0"))
    if setting.offload != "none" and row.offload is None:
        found.append(Problem(what, row.no_offload, row.instead))
    elif setting.offload == "nvme" and row.offload and row.offload.cls not in SWAPPABLE:
        why = "DeepSpeed's swapper to disk is made for the states of its own CPU optimizers"
        found.append(Problem(what, why, "use optim='adamw_torch', or offload to the cpu"))
    elif setting.offload == "none" and build_of(row, setting) is None and not found:
        devices = " and ".join(device for build in row.builds for device in build.devices)
        found.append(Problem(what, f"it runs on {devices} only", row.instead))
    missing = row.package and setting.packages is not None and row.package not in setting.packages
    # Installing a package does not help an optimizer that cannot run.
    if missing and not found and _needs_package(row, setting):
        name = row.install or row.package
        why = f"the Python package {row.package!r} is not installed"
        found.append(Problem(what, why, f"pip install {name}, or {row.instead}"))
    return found


def _needs_package(row: Optimizer, setting: Setting) -> bool:
    build = build_of(row, setting)
    return build is not None and build.cls.split(".")[0] == row.package


def known_options(row: Optimizer, build: Build | None) -> Mapping[str, Key]:
    """Return the options that ``optim_args`` may set for an implementation."""
    return row.options if build is None or build.options is None else build.options


def options_of(
    row: Optimizer, build: Build | None, given: str | None, shown: str
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the options in ``optim_args``, converted to their types, and their problems.

    Args:
        row: the optimizer.
        build: its implementation that runs.
        given: value of ``optim_args``, "name=value,name=value".
        shown: the user's setting that asks for the optimizer.
    """
    try:
        texts = split_optim_args(given)
    except ValueError:
        return {}, []  # reported by the arguments
    values: dict[str, Any] = {}
    problems = []
    options = known_options(row, build)
    name_of = "" if build is None else f" ({build.cls.rsplit('.', 1)[1]})"
    for name, text in texts.items():
        what = f"{name}={text} in optim_args, for {shown}{name_of}"
        if name in _ARGUMENTS and name not in options:
            own = _ARGUMENTS[name]
            problems.append(Problem(what, f"argument {own} sets it", f"set {own}"))
        elif name not in options:
            close = nearest(name, set(options))
            known = ", ".join(options) or "none"
            remedy = f"did you mean {close!r}?" if close else "leave it out"
            problems.append(Problem(what, f"it has no such option; it has {known}", remedy))
        else:
            value, wrong = schema.read_text(text, options[name])
            if wrong:
                problems.append(Problem(what, wrong))
            else:
                values[name] = value
    return values, problems


def parameters_of(row: Optimizer) -> set[str]:
    """Return the names of all parameters of an optimizer that a config may set."""
    kinds = {build.type.lower() for build in (*row.builds, row.offload) if build}
    listed = {
        name for kind in kinds & OPTIMIZER_PARAMS.keys() for name in OPTIMIZER_PARAMS[kind].keys
    }
    builds = [build for build in (*row.builds, row.offload) if build]
    listed |= {name for build in builds for name in (*build.params, *(build.options or ()))}
    return listed | {"lr", *row.hyper, *row.options}


def constant_names() -> list[str]:
    """Return the names of parameters that are always passed to some implementation."""
    builds = [b for row in OPTIMIZERS for b in (*row.builds, row.offload) if b is not None]
    return list(dict.fromkeys(name for build in builds for name in build.params))


def option_names() -> list[str]:
    """Return the names of all options of all optimizers."""
    builds = [b for row in OPTIMIZERS for b in (*row.builds, row.offload) if b is not None]
    more = [name for build in builds for name in build.options or ()]
    return list(dict.fromkeys([*(name for row in OPTIMIZERS for name in row.options), *more]))


def packages() -> list[str]:
    """Return the names of the optional packages."""
    return list(dict.fromkeys(row.package for row in OPTIMIZERS if row.package))


def planned_names() -> list[str]:
    """Return the names of optimizers whose states the planner can count."""
    return [*_STATE_BYTES, *(row.name for row in OPTIMIZERS if not row.refused and row.argument)]


def state_bytes(name: str, *, stage: int, offload: str = "none", device: str = "cuda") -> float:
    """Return the bytes of optimizer state per parameter, without the fp32 master weights."""
    if name in _STATE_BYTES:
        return _STATE_BYTES[name]
    row = BY_NAME[name]
    if name == "adafactor" and stage == 0:
        return 0  # a row and a column for each matrix
    build = build_of(row, Setting(stage, offload, device))
    special = build.state_bytes if build is not None else None
    return row.state_bytes if special is None else special


def is_torch_adam(name: str) -> bool:
    """Tell whether an optimizer runs torch's unfused AdamW step, which needs temporaries."""
    builds = BY_NAME[name].builds if name in BY_NAME else ()
    unfused = [b for b in builds if b.cls.startswith("torch.") and not b.params.get("fused")]
    return name == "adamw" or bool(unfused and "betas" in BY_NAME[name].hyper)


def as_markdown() -> str:
    """Return the table of optimizers in Markdown."""
    head = "| `optim` | on the accelerator | offloaded to the cpu | bytes of state | remarks |"
    return "\n".join([head, "|---|---|---|---|---|", *_lines()]) + "\n"


def _lines() -> Iterator[str]:
    for row in OPTIMIZERS:
        if not row.argument:
            continue
        on_device = ", ".join(
            f"`{b.cls.rsplit('.', 1)[1]}`" + (f" ({', '.join(b.devices)})" if b.devices else "")
            for b in row.builds
        )
        host = f"`{row.offload.cls.rsplit('.', 1)[1]}`" if row.offload else "refused"
        remarks = [f"package {row.install or row.package}"] if row.package else []
        remarks += [f"stage 0 only: {row.whole}"] if row.whole else []
        remarks += [text for text in (row.note, row.warning) if text]
        if row.refused:
            yield f"| `{row.name}` | refused | refused | | {row.refused}; {row.instead} |"
        else:
            size = f"{row.state_bytes:g}"
            yield f"| `{row.name}` | {on_device} | {host} | {size} | {'; '.join(remarks)} |"
