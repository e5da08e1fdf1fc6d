"""The table of optimizers: every name runs or is refused with a reason, and what it says is so."""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.arguments.optimizer import OPTIMIZERS as CHOICES
from dstrain.config import Facts, ResolvedConfig, optimizers, resolve
from dstrain.config.optimizer_table import OPTIMIZERS, Build
from dstrain.config.optimizers import BY_NAME, Setting
from dstrain.core.errors import ConfigError

PACKAGES = frozenset(optimizers.packages())
SETTINGS = [(0, "none")] + [(s, o) for s in (1, 2, 3) for o in ("none", "cpu")]
NAMED = [row for row in OPTIMIZERS if row.argument]
# What runs on a GPU with every package: (where there is no offload, offloaded to the cpu).
EVERYWHERE = {
    "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adam", "adamw_anyprecision",
    "nadam", "radam", "adamax", "lion", "lion_32bit", "muon", "adafactor", "adagrad", "sgd",
    "rmsprop", "adadelta", "asgd", "rprop", "ademamix", "rmsprop_bnb", "rmsprop_bnb_32bit",
}  # fmt: skip
NOT_OFFLOADED = {
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb_8bit",
}  # fmt: skip
STAGE_0_ONLY = {"stable_adamw", "grokadamw", "lamb", "adamw_torch_4bit", "adamw_torch_8bit"}


def resolved(
    config: Any = None, *, device: str = "cuda", packages: Any = PACKAGES, **arguments: Any
) -> ResolvedConfig:
    """Resolve with every optional package there, for one GPU."""
    facts = Facts(device=device, packages=packages)
    return resolve(TrainingArguments(deepspeed=config, **arguments), facts)


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    """Give the installed DeepSpeed, imported for the CPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed")


def builds(row: Any) -> list[Build]:
    """Return all implementations of an optimizer."""
    return [build for build in (*row.builds, row.offload) if build is not None]


def class_of(path: str) -> Any:
    """Import the class at a dotted path; skip the test where its package is not installed."""
    module, _, name = path.rpartition(".")
    pytest.importorskip(module.split(".")[0], reason=f"{path} is not installed")
    return getattr(importlib.import_module(module), name)


# --- every documented name -----------------------------------------------------------------------


def test_every_name_of_transformers_is_there():
    """A name that its next release adds is noticed here."""
    from transformers.training_args import OptimizerNames

    documented = {"adamw_hf", "adamw_apex_fused"}  # in the reference documents, gone since
    assert {name.value for name in OptimizerNames} | documented <= set(CHOICES)


def test_the_argument_and_the_table_have_the_same_names():
    """The argument cannot import the table, which is in a later room."""
    assert list(CHOICES) == [row.name for row in NAMED]
    assert len(CHOICES) == len(set(CHOICES))


@pytest.mark.parametrize(("stage", "offload"), SETTINGS)
@pytest.mark.parametrize("name", CHOICES)
def test_every_name_runs_or_is_refused_with_a_reason(name: str, stage: int, offload: str):
    runs = name in EVERYWHERE
    runs |= name in NOT_OFFLOADED and offload == "none"
    runs |= name in STAGE_0_ONLY and stage == 0
    runs |= name == "adamw_torch_npu_fused" and offload == "cpu"
    arguments: dict[str, Any] = {"optim": name, "zero_stage": str(stage), "max_grad_norm": 0.0}
    arguments["offload_optimizer"] = offload
    if runs:
        got = resolved(**arguments)
        assert got.optimizer is not None
        assert got.values["optimizer.type"] == (got.optimizer.type or got.optimizer.cls)
        assert got.values["optimizer.params.lr"] == 5e-5
        assert ("optimizer" in got.to_deepspeed()) == bool(got.optimizer.type)
        assert set(got.provenance) == set(got.values)
        return
    with pytest.raises(ConfigError) as caught:
        resolved(**arguments)
    first = caught.value.problems[0]
    for text in (f"optim={name!r}", f"stage {stage}", f"offload {offload}"):
        assert text in first.what
    assert first.why
    assert first.remedy


def test_disks_take_the_states_of_deepspeeds_cpu_optimizers_only():
    for row in NAMED:
        found = optimizers.refusals(row, Setting(3, "nvme", packages=PACKAGES), row.name)
        host = row.offload.cls.rsplit(".", 1)[1] if row.offload else ""
        assert bool(found) == (not host.startswith("DeepSpeedCPU")), row.name


def test_refusals_come_with_all_other_problems():
    """They depend on the stage that the user's JSON sets, so they are not errors of arguments."""
    config = {"zero_optimization": {"stage": 3}, "train_batch_size": 7}
    with pytest.raises(ConfigError) as caught:
        resolved(config, optim="lamb", optim_args="max_coef=1", learning_rate=1e-3)
    text = str(caught.value)
    for part in ("optim='lamb' with stage 3", "trust ratio", "train_batch_size=7", "'max_coeff'?"):
        assert part in text


def test_a_missing_package_is_named_before_anything_else_happens():
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        resolved(optim="adamw_8bit", packages=frozenset())
    with pytest.raises(ConfigError, match="pip install torch-optimi"):
        resolved(optim="stable_adamw", zero_stage="0", packages=frozenset())
    assert resolved(optim="adamw_8bit", packages=None).values  # `dstrain explain` elsewhere
    offloaded = resolved(
        optim="adamw_torch_npu_fused", offload_optimizer="cpu", packages=frozenset()
    )
    assert offloaded.optimizer.cls.endswith("DeepSpeedCPUAdam")  # which needs no such package


def test_the_device_decides_where_deepspeed_has_a_kernel_for_one_only():
    assert resolved(optim="lion").values["optimizer.type"] == "Lion"
    on_cpu = resolved(optim="lion", device="cpu")
    assert on_cpu.values["optimizer.type"] == "deepspeed.ops.lion.DeepSpeedCPULion"
    assert "optimizer" not in on_cpu.to_deepspeed()
    # Asked for by DeepSpeed's name it is the same: "Lion" itself would need CUDA.
    by_type = resolved({"optimizer": {"type": "Lion"}}, device="cpu")
    assert by_type.optimizer == on_cpu.optimizer
    for name in ("lamb", "adamw_bnb_8bit"):
        with pytest.raises(ConfigError, match="it runs on cuda"):
            resolved(optim=name, device="cpu", zero_stage="0")


# --- types in the user's DeepSpeed config --------------------------------------------------------


@pytest.mark.parametrize("kind", ["OneBitAdam", "OneBitLamb", "ZeroOneAdam", "onebitadam"])
def test_what_deepspeed_removed_is_said_to_be_removed(kind: str):
    with pytest.raises(ConfigError, match=r"(?s)0\.19\.8 removed the 1-bit optimizers.*AdamW"):
        resolved({"optimizer": {"type": kind, "params": {"lr": 1e-3}}})


@pytest.mark.parametrize(
    ("kind", "stage", "why"),
    [
        ("Lamb", 1, "trust ratio"),
        ("Adafactor", 2, "rows and columns"),
        ("LBFGS", 0, "closure"),
        ("SparseAdam", 0, "sparse gradients"),
    ],
)
def test_types_are_refused_as_names_are(kind: str, stage: int, why: str):
    config = {"optimizer": {"type": kind}, "zero_optimization": {"stage": stage}}
    with pytest.raises(ConfigError, match=rf"(?s)optimizer\.type='{kind}' in your config.*{why}"):
        resolved(config)


@pytest.mark.parametrize(
    ("kind", "optim", "agrees"),
    [
        ("AdamW", "adamw_torch_fused", True),
        ("Adam", "adamw_apex_fused", True),  # DeepSpeed's Adam is AdamW
        ("Adam", "adam", True),
        ("AdamW", "adam", False),
        ("lion", "lion_32bit", True),
        ("Lion", "lion_8bit", False),
        ("NAdam", "nadam", True),
        ("RMSprop", "rmsprop_bnb", False),
        ("Lion", "adamw_torch", None),  # the argument's default, so the config decides
    ],
)
def test_a_type_and_the_argument_can_mean_the_same(kind: str, optim: str, agrees: bool | None):
    config = {"optimizer": {"type": kind}}
    if agrees is False:
        with pytest.raises(ConfigError, match=f"argument optim='{optim}'"):
            resolved(config, optim=optim)
    else:
        assert resolved(config, optim=optim).values["optimizer.type"] == kind


def test_adam_decays_through_the_gradient():
    """DeepSpeed's "Adam" is AdamW unless it is told otherwise."""
    assert resolved(optim="adam").values["optimizer.params.adam_w_mode"] is False
    with pytest.raises(ConfigError, match="adam_w_mode=True"):
        resolved({"optimizer": {"type": "Adam", "params": {"adam_w_mode": True}}}, optim="adam")


def test_muon_at_stage_3_reduces_whole_gradients():
    key = "zero_optimization.reduce_scatter"
    assert resolved(optim="muon", zero_stage="3").values[key] is False
    assert key not in resolved(optim="muon", zero_stage="2").values
    for stage in ("1", "2", "3"):
        clip = resolved(optim="muon", zero_stage=stage).values["gradient_clipping"]
        assert clip == 1.0, "dstrain clips before Muon: tests/distributed/test_muon.py"
    config = {"zero_optimization": {"stage": 3, "reduce_scatter": True}}
    with pytest.raises(ConfigError, match="reduce_scatter=True"):
        resolved(config, optim="muon")


# --- parameters ----------------------------------------------------------------------------------


def test_options_reach_the_optimizer_in_their_types():
    got = resolved(optim="sgd", optim_args="momentum=0.9, nesterov=True")
    assert got.values["optimizer.params.momentum"] == 0.9
    assert got.values["optimizer.params.nesterov"] is True
    assert got.provenance["optimizer.params.momentum"].detail == "argument optim_args"
    got = resolved(optim="rprop", optim_args="etas=(0.4,1.3),foreach=0")
    assert got.values["optimizer.params.etas"] == [0.4, 1.3]
    got = resolved(optim="ademamix", optim_args="beta3=0.99,t_alpha=100")
    assert got.values["optimizer.params.betas"] == [0.9, 0.999, 0.99]
    assert got.values["optimizer.params.t_alpha"] == 100
    assert "optimizer.params.beta3" not in got.values


@pytest.mark.parametrize(
    ("optim", "given", "message"),
    [
        ("sgd", "momentun=0.9", "did you mean 'momentum'"),
        ("sgd", "momentum=much", "expected"),
        ("sgd", "lr=0.1", "set learning_rate"),
        ("adamw_torch", "beta1=0.8", "set adam_beta1"),
        ("adamw_torch", "eps=1e-6", "set adam_epsilon"),
        ("sgd", "weight_decay=0.1", "set weight_decay"),
        ("adamw_torch", "bias_correction=false", "no such option"),  # of DeepSpeed's kernel only
        ("muon", "ns_method=fast", "gram"),
    ],
)
def test_wrong_options_are_refused(optim: str, given: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        resolved(optim=optim, optim_args=given)
    assert given.split("=")[0] in str(caught.value)


@pytest.mark.parametrize("given", ["momentum", "momentum=", "=1", "a=1,a=2", "a=1,,b=2"])
def test_optim_args_must_be_pairs(given: str):
    with pytest.raises(ConfigError, match="name=value,name=value"):
        TrainingArguments(optim="sgd", optim_args=given)


def test_an_option_in_config_and_argument_is_a_conflict():
    config = {"optimizer": {"type": "SGD", "params": {"momentum": 0.8}}}
    assert resolved(config, optim_args="momentum=0.8").values["optimizer.params.momentum"] == 0.8
    with pytest.raises(ConfigError, match=r"momentum=0\.8 in your config, but argument optim_args"):
        resolved(config, optim_args="momentum=0.9")


def test_only_what_an_optimizer_has_is_written():
    values = resolved(optim="rprop").values
    assert {k for k in values if k.startswith("optimizer.params")} == {"optimizer.params.lr"}
    with pytest.raises(
        ConfigError, match=r"weight_decay=0\.1.*decays no weights|decays no weights"
    ):
        resolved(optim="rprop", weight_decay=0.1)
    assert "optimizer.params.eps" not in resolved(optim="lion", adam_epsilon=1e-6).values
    got = resolved(optim="sgd", adam_beta1=0.8)
    assert any("adam_beta1 without effect" in text for text in got.warnings)
    with pytest.raises(
        ConfigError, match=r"betas=\[0\.9, 0\.95\].*no such parameter|no such param"
    ):
        resolved({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, optim="sgd")


def test_what_is_different_under_zero_is_said():
    assert any("unfactored" in w for w in resolved(optim="adafactor", zero_stage="1").warnings)
    assert not resolved(optim="adafactor", zero_stage="0").warnings
    assert any("8-bit states" in w for w in resolved(optim="adamw_8bit", zero_stage="0").warnings)


def test_zero_lets_optimizers_of_dstrain_run_on_the_host():
    got = resolved(optim="adafactor", zero_stage="2", offload_optimizer="cpu").values
    assert got["zero_force_ds_cpu_optimizer"] is False
    assert got["zero_allow_untested_optimizer"] is True
    got = resolved(optim="adamw_torch", zero_stage="2", offload_optimizer="cpu").values
    assert "zero_force_ds_cpu_optimizer" not in got
    assert "zero_allow_untested_optimizer" not in got


# --- what the table says is so -------------------------------------------------------------------


def test_deepspeed_has_tested_what_we_say_it_has(deepspeed: Any):
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as THEIRS

    ours = {path.rsplit(".", 1)[1] for path in optimizers.TESTED} - {"MuonWithAuxAdam"}
    theirs = {cls.__name__ for cls in THEIRS} - {"ZenFlowCPUAdam", "MuonWithAuxAdam"}
    assert ours == theirs


PATHS = sorted({build.cls for row in OPTIMIZERS for build in builds(row)})


@pytest.mark.parametrize("path", PATHS)
def test_classes_take_what_they_are_given(path: str, deepspeed: Any):
    """Every constant, option and hyperparameter is in the signature of the installed class."""
    if path.endswith("MuonWithAuxAdam"):
        pytest.skip("DeepSpeed splits its parameters itself: the tests of the schema read them")
    taken = set(inspect.signature(class_of(path).__init__).parameters) | {
        "torch_adam",
        "adam_w_mode",
    }
    for row in OPTIMIZERS:
        for build in builds(row):
            if build.cls == path:
                options = set(optimizers.known_options(row, build)) - {"beta3"}
                assert {"lr", *row.hyper, *build.params, *options} <= taken, row.name


def test_every_optimizer_of_torch_is_in_the_table():
    import torch

    ours = {path.rsplit(".", 1)[1] for path in PATHS if path.startswith("torch.optim.")}
    theirs = {
        name
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
    }
    assert theirs - ours == {"Optimizer", "Muon"}  # Muon is DeepSpeed's own there


ON_TORCH = [r for r in NAMED if not r.refused and r.builds[0].cls.startswith("torch.optim.")]


@pytest.mark.parametrize("row", ON_TORCH, ids=lambda row: row.name)
def test_states_have_the_bytes_that_the_planner_takes(row: Any):
    """Measured on one flat tensor, as ZeRO gives them; a step count of 4 bytes is no state."""
    import torch

    tensor = torch.nn.Parameter(torch.zeros(1000))
    optimizer = class_of(row.builds[0].cls)([tensor], lr=1e-3)
    tensor.grad = torch.ones(1000)
    optimizer.step()
    state = optimizer.state[tensor].values()
    got = sum(v.nbytes for v in state if torch.is_tensor(v) and v.numel() == 1000)
    assert got == row.state_bytes * 1000
    assert optimizers.state_bytes(row.name, stage=2) == row.state_bytes


def test_the_planner_knows_every_optimizer_that_runs():
    runs = EVERYWHERE | NOT_OFFLOADED | STAGE_0_ONLY
    assert runs <= set(optimizers.planned_names())
    assert optimizers.state_bytes("adafactor", stage=0) < optimizers.state_bytes(
        "adafactor", stage=1
    )
    assert optimizers.state_bytes("lion", stage=2) == 4
    assert optimizers.state_bytes("lion", stage=2, offload="cpu") == 8  # one is never used


def test_ops_are_those_that_the_classes_load(deepspeed: Any):
    """An op that is missing would be compiled in the middle of building the engine."""
    from dstrain.engine.ops import OPS

    for row in OPTIMIZERS:
        for build in builds(row):
            if build.cls.startswith("deepspeed.ops"):
                source = inspect.getsource(class_of(build.cls))
                assert OPS[build.op].builder in source
            elif build.type != "Muon":
                assert not build.op


def test_a_run_asks_for_the_ops_of_its_optimizer(deepspeed: Any):
    from dstrain.engine.optimizers.factory import ops_of

    assert ops_of(resolved(optim="adamw_torch")) == []
    assert ops_of(resolved(optim="adamw_apex_fused")) == ["fused_adam"]
    assert ops_of(resolved(optim="adamw_torch", offload_optimizer="cpu")) == ["cpu_adam"]
    assert ops_of(resolved(optim="lion", offload_optimizer="cpu")) == ["cpu_lion"]
    assert ops_of(resolved(optim="lion")) == ["fused_lion"]
    assert ops_of(resolved(optim="adagrad", offload_optimizer="cpu")) == ["cpu_adagrad"]
    assert ops_of(resolved(optim="muon")) == []
    assert ops_of(resolved(optim="muon", offload_optimizer="cpu")) == ["cpu_adam"]
    by_config = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}
    assert ops_of(resolved(by_config)) == ["fused_adam"]


def test_the_page_has_every_name():
    text = optimizers.as_markdown()
    assert all(f"| `{name}` |" in text for name in CHOICES)
    assert text.count("\n") == len(CHOICES) + 2
    assert BY_NAME["lomo"].refused in text
