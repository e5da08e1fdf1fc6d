"""Every optimizer computes under ZeRO what it does in plain torch, or says where it does not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import RaggedTokens, pad_collate, tiny_llama
from tests.parity import reference

# Stages 1 and 2 are one implementation.
STAGES = (0, 2, 3)
NUM_SAMPLES = 24
LR = reference.LEARNING_RATE
Groups = list[dict[str, Any]]


def _adafactor(groups: Groups) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(groups, lr=LR, scale_parameter=False, relative_step=False)


# optim, optim_args, learning rate, the same by hand
IN_TORCH: dict[str, tuple[str | None, float, Callable[[Groups], torch.optim.Optimizer]]] = {
    "adamw_torch": (None, LR, lambda g: torch.optim.AdamW(g, lr=LR)),
    "adamw_torch_fused": ("amsgrad=true", LR, lambda g: torch.optim.AdamW(g, lr=LR, amsgrad=True)),
    "adamw_apex_fused": (None, LR, lambda g: torch.optim.AdamW(g, lr=LR)),
    "adam": (None, LR, lambda g: torch.optim.Adam(g, lr=LR)),
    "nadam": ("momentum_decay=1e-2", LR, lambda g: torch.optim.NAdam(g, LR, momentum_decay=0.01)),
    "radam": (None, LR, lambda g: torch.optim.RAdam(g, lr=LR)),
    "adamax": (None, LR, lambda g: torch.optim.Adamax(g, lr=LR)),
    "adagrad": (
        "initial_accumulator_value=0.1",
        1e-2,
        lambda g: torch.optim.Adagrad(g, lr=1e-2, initial_accumulator_value=0.1),
    ),
    "sgd": (
        "momentum=0.9,nesterov=true",
        1e-2,
        lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9, nesterov=True),
    ),
    "rmsprop": ("alpha=0.9", LR, lambda g: torch.optim.RMSprop(g, lr=LR, alpha=0.9)),
    "adadelta": ("rho=0.8", 0.1, lambda g: torch.optim.Adadelta(g, lr=0.1, rho=0.8)),
    "asgd": (None, 1e-2, lambda g: torch.optim.ASGD(g, lr=1e-2)),
}  # fmt: skip
# Offloaded, those whose op launch/test.sh builds or that need none.
OFFLOADED = [name for name in IN_TORCH if name not in ("adamw_torch_fused", "adagrad")]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Keep DeepSpeed's Muon from compiling its steps, which takes minutes on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _orders() -> list[list[int]]:
    from dstrain.data import EpochOrder

    order = EpochOrder(NUM_SAMPLES, seed=42, shuffle=True)
    return [order.indices(epoch).tolist() for epoch in range(reference.EPOCHS)]


def _by_hand(make: Callable[[Groups], torch.optim.Optimizer], **more: Any) -> list[float]:
    return reference.plain_torch(
        tiny_llama(), RaggedTokens(NUM_SAMPLES), _orders(), make=make, **more
    )


@functools.cache
def _named_by_hand(optim: str) -> tuple[float, ...]:
    return tuple(_by_hand(IN_TORCH[optim][2]))


def _trainer(folder: Path, world_size: int, *, cls: Any = None, **arguments: Any) -> Any:
    from dstrain import Trainer, TrainingArguments

    passed = {k: arguments.pop(k) for k in ("optimizers", "optimizer_cls_and_kwargs")
              if k in arguments}  # fmt: skip
    model = arguments.pop("model", None)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": reference.GLOBAL_BATCH // world_size,
        "num_train_epochs": reference.EPOCHS,
        "learning_rate": LR,
        "weight_decay": reference.WEIGHT_DECAY,
        "max_grad_norm": reference.CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    return (cls or Trainer)(
        tiny_llama() if model is None else model,
        TrainingArguments(str(folder), **settings),
        data_collator=pad_collate,
        train_dataset=RaggedTokens(NUM_SAMPLES),
        **passed,
    )


def _trained(trainer: Any) -> tuple[list[float], Any]:
    """Train; return the curve, and the basic optimizer that ran."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    basic = trainer.deepspeed.basic_optimizer
    trainer.close()
    return losses, basic


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_plain_torch_on_one(stage: int, tmp_path: Path, world_size: int) -> None:
    """Each optimizer at each stage: its class, its decay groups, its options and its schedule."""
    wrong = {}
    for optim, (optim_args, rate, _) in IN_TORCH.items():
        trainer = _trainer(
            tmp_path, world_size, zero_stage=str(stage), optim=optim, optim_args=optim_args,
            learning_rate=rate,
        )  # fmt: skip
        ours, basic = _trained(trainer)
        assert type(basic).__name__ == trainer.resolved.optimizer.cls.rsplit(".", 1)[1]
        assert [g["weight_decay"] for g in basic.param_groups] == [reference.WEIGHT_DECAY, 0.0]
        if ours != pytest.approx(_named_by_hand(optim), rel=2e-5):
            wrong[optim] = (ours, _named_by_hand(optim))
        assert sum(ours[3:]) < sum(ours[:3]), optim  # the second epoch is below the first
    assert not wrong


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 3])
def test_offloaded_optimizers_equal_plain_torch(
    stage: int, tmp_path: Path, world_size: int
) -> None:
    """On host cores: DeepSpeed's CPU Adam for the Adam names, torch's own code for the others."""
    wrong = {}
    for optim in OFFLOADED:
        optim_args, rate, _ = IN_TORCH[optim]
        trainer = _trainer(
            tmp_path, world_size, zero_stage=str(stage), offload_optimizer="cpu", optim=optim,
            optim_args=optim_args, learning_rate=rate,
        )  # fmt: skip
        ours, basic = _trained(trainer)
        assert type(basic).__name__ == trainer.resolved.optimizer.cls.rsplit(".", 1)[1]
        if ours != pytest.approx(_named_by_hand(optim), rel=2e-5):
            wrong[optim] = (ours, _named_by_hand(optim))
    assert not wrong


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimizers_that_look_at_more_than_one_element(
    precision: str, tmp_path: Path, world_size: int
) -> None:
    """Adafactor, Muon, Rprop and Adagrad train at every stage, offloaded too, in 16 bits too."""
    cases = {"adafactor": LR, "muon": 2e-3, "rprop": 1e-4, "adagrad": 1e-2}
    places = {
        "fp32": [(0, "none"), (1, "none"), (3, "none"), (3, "cpu")],
        "bf16": [(0, "none"), (2, "cpu"), (3, "none")],
    }
    for optim, rate in cases.items():
        for stage, offload in places[precision]:
            if offload == "cpu" and optim == "adagrad":
                continue  # its op takes a minute to build
            trainer = _trainer(
                tmp_path, world_size, zero_stage=str(stage), offload_optimizer=offload,
                optim=optim, learning_rate=rate, bf16=precision == "bf16",
                weight_decay=0.0 if optim == "rprop" else 0.1,
            )  # fmt: skip
            ours, _ = _trained(trainer)
            assert sum(ours[3:]) < sum(ours[:3]) - 0.06, (optim, stage, offload, ours)


@pytest.mark.ranks(2)
def test_adafactor_is_factored_at_stage_0_only(tmp_path: Path, world_size: int) -> None:
    """There it is transformers' Adafactor to the digit; ZeRO's slices have one dimension."""
    ours, basic = _trained(_trainer(tmp_path, world_size, zero_stage="0", optim="adafactor"))
    assert ours == pytest.approx(_by_hand(_adafactor), rel=2e-5)
    assert any("exp_avg_sq_row" in state for state in basic.state.values())
    _, basic = _trained(_trainer(tmp_path, world_size, zero_stage="2", optim="adafactor"))
    assert basic.state
    assert not any("exp_avg_sq_row" in state for state in basic.state.values())


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_muon_orthogonalises_whole_matrices(
    stage: int, offload: str, clip: float, tmp_path: Path, world_size: int
) -> None:
    """At every stage as DeepSpeed's class does it on whole matrices, without ZeRO and ranks.

    True gradients are clipped, before Muon, to a fourth of what they are and less.
    """
    if stage == 0 and offload == "cpu":
        pytest.skip("stage 0 offloads nothing")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    model = tiny_llama()
    names = {id(p): name for name, p in model.named_parameters()}

    def make(groups: Groups) -> torch.optim.Optimizer:
        halves = []
        for group in groups:
            for use_muon in (True, False):
                mine = [
                    p
                    for p in group["params"]
                    if use_muon
                    == (p.ndim > 1 and not ("embed" in names[id(p)] or "lm_head" in names[id(p)]))
                ]
                settings = {"lr": 2e-3, "weight_decay": group["weight_decay"]}
                more = {"momentum": 0.95} if use_muon else {"betas": (0.9, 0.999), "eps": 1e-8}
                if mine:
                    halves.append({"params": mine, "use_muon": use_muon, **settings, **more})
        return MuonWithAuxAdam(halves)

    expected = reference.plain_torch(
        model, RaggedTokens(NUM_SAMPLES), _orders(), make=make, clip=clip
    )
    trainer = _trainer(
        tmp_path, world_size, zero_stage=str(stage), offload_optimizer=offload, optim="muon",
        learning_rate=2e-3, max_grad_norm=clip,
    )  # fmt: skip
    ours, _ = _trained(trainer)
    assert ours == pytest.approx(expected, rel=1e-3)  # Newton-Schulz runs in bf16


# --- the user's own ------------------------------------------------------------------------------

OWN = {
    "sgd": lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9),
    # DeepSpeed puts another Adagrad of one group in its place, which must not stay.
    "adagrad": lambda g: torch.optim.Adagrad(g, lr=1e-2),
    "adamw": lambda g: torch.optim.AdamW(g, lr=LR),
}


@functools.cache
def _own_by_hand(name: str) -> tuple[float, ...]:
    return tuple(_by_hand(OWN[name]))


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_users_own_optimizer_equals_plain_torch(
    stage: int, offload: str, tmp_path: Path, world_size: int
) -> None:
    """Passed as an object with groups of its own: the very object runs, and computes the same."""
    if stage == 0 and offload == "cpu":
        pytest.skip("stage 0 offloads nothing")
    for name, make in OWN.items():
        model = tiny_llama()
        own = make(reference.groups(model))
        trainer = _trainer(
            tmp_path, world_size, zero_stage=str(stage), offload_optimizer=offload, model=model,
            optimizers=(own, None),
        )  # fmt: skip
        ours, basic = _trained(trainer)
        assert basic is own
        assert ours == pytest.approx(_own_by_hand(name), rel=2e-5), name


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 3])
def test_overrides_make_the_optimizer_that_runs(
    stage: int, tmp_path: Path, world_size: int
) -> None:
    """Each of transformers' hooks, used as its documentation shows."""
    from dstrain import Trainer

    class Creates(Trainer):
        def create_optimizer(self) -> Any:
            self.optimizer = OWN["sgd"](reference.groups(self.model))
            return self.optimizer

    class CreatesBoth(Trainer):
        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            self.optimizer = OWN["sgd"](reference.groups(self.model))
            factor = reference.linear_decay(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    class ChoosesClass(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
            return torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}

    class Adds(Trainer):
        """Builds on what the config resolves to."""

        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            assert type(optimizer) is torch.optim.SGD
            for group in optimizer.param_groups:
                group["momentum"] = 0.9
            return optimizer

    class CreatesScheduler(Trainer):
        """Reads ``self.optimizer``, as scripts for transformers do, and returns nothing."""

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> None:
            factor = reference.linear_decay(num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    pair = (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9})
    ways: list[dict[str, Any]] = [
        {"cls": Creates},
        {"cls": CreatesBoth},
        {"cls": ChoosesClass},
        {"cls": Adds, "optim": "sgd", "learning_rate": 1e-2},
        {"cls": CreatesScheduler, "optim": "sgd", "learning_rate": 1e-2,
         "optim_args": "momentum=0.9"},
        {"optimizer_cls_and_kwargs": pair},
    ]  # fmt: skip
    for way in ways:
        trainer = _trainer(tmp_path, world_size, zero_stage=str(stage), **way)
        ours, _ = _trained(trainer)
        assert ours == pytest.approx(_own_by_hand("sgd"), rel=2e-5), way
        again, _ = _trained(trainer)  # made anew for the second training
        assert again[len(ours)] < ours[0]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_trainer_says_of_its_optimizer(stage: int, tmp_path: Path, world_size: int) -> None:
    """Groups are found by the model's own parameters, although ZeRO's groups hold flat slices."""
    trainer = _trainer(tmp_path, world_size, zero_stage=str(stage), max_steps=1)
    with pytest.raises(ValueError, match="optimizer is None"):
        trainer.get_learning_rates()
    trainer.train()
    assert len(trainer.get_learning_rates()) == 2
    names = dict(trainer.model.named_parameters())
    decayed = trainer.get_optimizer_group(names["lm_head.weight"])
    kept = trainer.get_optimizer_group(names["model.norm.weight"])
    assert (decayed["weight_decay"], kept["weight_decay"]) == (reference.WEIGHT_DECAY, 0.0)
    assert len(trainer.get_optimizer_group()) == 2
    assert trainer.get_num_trainable_parameters() == sum(
        p.numel() for p in tiny_llama().parameters()
    )
    trainer.close()


@pytest.mark.ranks(1)
def test_own_objects_that_could_not_run_as_given_are_refused(tmp_path: Path) -> None:
    """A schedule of another optimizer, a closure, whole matrices, two ways at once, nothing."""
    from transformers import Adafactor

    from dstrain import Trainer
    from dstrain.core.errors import ConfigError

    class Forgets(Trainer):
        def create_optimizer(self) -> None: ...

    model = tiny_llama()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(sgd)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"optimizers": (None, schedule)}, "steers a SGD that is not the optimizer of this run"),
        ({"optimizers": (torch.optim.LBFGS(model.parameters()), None)}, "closure"),
        ({"optimizers": (torch.optim.Muon(matrices), None)}, "(?s)stage 2.*whole matrices"),
        ({"optimizers": (torch.optim.Adafactor(model.parameters()), None)}, "rows and columns"),
        ({"optimizers": (sgd, None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "both"),
    ]
    for passed, message in cases:
        with pytest.raises(ConfigError, match=message):
            _trainer(tmp_path, 1, zero_stage="2", model=model, **passed)
    with pytest.raises(ConfigError, match=r"self\.optimizer is None"):
        _trainer(tmp_path, 1, zero_stage="2", cls=Forgets).train()
    adafactor = Adafactor(model.parameters(), lr=LR, relative_step=False)
    _trainer(tmp_path, 1, zero_stage="0", model=model, optimizers=(adafactor, None))
