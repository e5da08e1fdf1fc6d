"""Parameters of shape () train, are saved, go on at other topologies and are exported."""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.runs import STAGES, losses, make_trainer, whole_weights
from tests.models import RaggedTokens, pad_collate
from tests.parity import reference
from tests.scaled import (
    HEAT,
    SCALARS,
    SCALE,
    ScaledLlamaForCausalLM,
    scaled_llama,
    scaled_llama_config,
)

TRAIN = {"train": 24, "num_train_epochs": 1, "learning_rate": 2e-2, "lr_scheduler_type": "linear"}
RANKS = [pytest.param(n, marks=pytest.mark.ranks(n, timeout=240)) for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def _fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def make(folder: Path, stage: int, **settings: Any) -> Any:
    """Return a trainer of the scaled llama whose global batch is 6 samples at 1 to 3 ranks."""
    from dstrain.core.ranks import launched_ranks

    batch = 6 // launched_ranks().world_size
    model = settings.pop("model", scaled_llama)()
    arguments = {"per_device_train_batch_size": batch, **TRAIN, **settings}
    return make_trainer(folder, stage=stage, model=model, **arguments)


@functools.cache
def torch_losses() -> tuple[float, ...]:
    """Train likewise in one process of plain torch, clipped at a norm of 0.5."""
    from dstrain.data import EpochOrder

    model, data = scaled_llama(), RaggedTokens(24)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, reference.linear_decay(4))
    order, found = EpochOrder(24, seed=42, shuffle=True).indices(0).tolist(), []
    for first in range(0, 24, 6):
        loss = model(**pad_collate([data[i] for i in order[first : first + 6]])).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert abs(model.scale.item() - SCALE) > 1e-2
    return tuple(found)


def check_shapes(model: nn.Module) -> None:
    from dstrain.engine import full_shape

    named = dict(model.named_parameters())
    assert [full_shape(named[name]) for name in SCALARS] == [()] * 3


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_plain_torch(stage: int, world_size: int, tmp_path: Path) -> None:
    """Also where gradients are clipped, which at stage 0 in fp32 DeepSpeed cannot do itself."""
    trainer = make(tmp_path, stage, max_grad_norm=0.5)
    trainer.train()
    assert losses(trainer) == pytest.approx(torch_losses(), rel=3e-6)
    check_shapes(trainer.model)
    weights = whole_weights(trainer)
    assert weights["scale"].shape == ()
    assert weights["heat"].item() == HEAT
    trainer.close()
    if stage < 3:
        assert trainer.model.scale.shape == ()
        trainer.model(torch.tensor([[3, 4, 5]]))  # it asserts the shapes


OFFLOAD = {"offload_optimizer": "cpu"}
FP16 = {"deepspeed": {"fp16": {"enabled": True, "initial_scale_power": 8}}}
NOT_PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES: list[tuple[int, dict[str, Any]]] = [
    (0, {"bf16": True}),
    (0, FP16),
    (0, {"optim": "nadam"}),
    (1, {"bf16": True, "gradient_accumulation_steps": 2}),
    (1, {"bf16": True, "round_robin_gradients": True, **OFFLOAD}),
    (1, FP16),
    (2, {"bf16": True, "overlap_comm": True}),
    (2, {"optim": "nadam", "gradient_accumulation_steps": 2}),
    (2, {"torch_autocast": True, **OFFLOAD}),
    (3, {"bf16": True, "gradient_accumulation_steps": 2}),
    (3, {"bf16": True, "offload_param": "cpu", **OFFLOAD}),
    (3, {"deepspeed": {**NOT_PERSISTENT, **FP16["deepspeed"]}}),
    (3, {"deepspeed": NOT_PERSISTENT, "gradient_checkpointing": True}),
]


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(("stage", "settings"), CASES)
def test_formats_and_places(
    stage: int, settings: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """The scalar moves, is saved with its shape as ``save_pretrained`` would, and goes on."""
    from safetensors.torch import load_file

    from dstrain.core.ranks import barrier
    from dstrain.engine import gathered

    saves = {"save_strategy": "steps", "save_steps": 2, **settings}
    trainer = make(tmp_path / "whole", stage, **saves)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_shapes(trainer.model)
    weights = whole_weights(trainer)
    assert abs(weights["scale"].item() - SCALE) > 1e-3
    trainer.save_model(str(tmp_path / "saved"))
    with gathered(trainer.model.parameters()):
        if rank == 0:
            twin = copy.deepcopy(scaled_llama()).to(weights["scale"].dtype)
            twin.load_state_dict(weights, strict=False)
            twin.save_pretrained(tmp_path / "own")
    trainer.close()
    barrier()
    saved, own = (load_file(tmp_path / n / "model.safetensors") for n in ("saved", "own"))
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {
        n: (t.shape, t.dtype) for n, t in own.items()
    }
    assert all(torch.equal(saved[n], own[n]) for n in own)
    if rank == 0:
        shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "again/checkpoint-2")
    barrier()
    again = make(tmp_path / "again", stage, **saves)
    again.train(True)
    if "offload_optimizer" in settings:  # DeepSpeed's Adam on the host rounds anew
        assert losses(again) == pytest.approx(losses(trainer), rel=1e-4)
    else:
        assert losses(again) == losses(trainer)
        assert all(torch.equal(w, weights[n]) for n, w in whole_weights(again).items())
    again.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("how", ["loaded", "built"])
def test_inside_of_partitioned(how: str, tmp_path: Path, rank: int) -> None:
    """Loaded or built there, the weights are the file's, and it trains as one that came whole."""
    from dstrain import TrainingArguments, partitioned
    from dstrain.core.ranks import barrier
    from dstrain.engine import gathered, is_partitioned

    if rank == 0:
        changed = scaled_llama()
        with torch.no_grad():
            changed.scale.fill_(0.8125)
        changed.save_pretrained(tmp_path / "model")
    barrier()
    args = TrainingArguments(str(tmp_path / "x"), zero_stage="3", report_to="none")
    with partitioned(args):
        if how == "loaded":
            model = ScaledLlamaForCausalLM.from_pretrained(tmp_path / "model")
        else:
            model = ScaledLlamaForCausalLM._from_config(scaled_llama_config())
    assert all(is_partitioned(p) for p in model.parameters())
    model.heat.requires_grad_(False)
    check_shapes(model)
    with gathered(model.parameters()):
        assert model.scale.shape == ()
        assert model.scale.item() == (0.8125 if how == "loaded" else SCALE)
    with gathered([model.scale, model.lm_head.weight], write_from=0):
        if rank == 0:
            model.scale.data.fill_(SCALE)
    with gathered([model.scale]):
        assert model.scale.item() == SCALE
    if how == "loaded":
        trainer = make(tmp_path, 3, model=lambda: model, max_grad_norm=0.5)
        trainer.train()
        assert losses(trainer) == pytest.approx(torch_losses(), rel=3e-6)
        trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", STAGES)
def test_with_adapters_around_it(stage: int, tmp_path: Path) -> None:
    """The scalars are frozen there; they are in the checkpoint, and stay as they were."""
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return peft.get_peft_model(scaled_llama(), config)

    settings = {"model": adapted, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, stage, **settings)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    weights = whole_weights(trainer)
    assert weights["base_model.model.scale"].item() == SCALE
    trainer.close()
    again = make(tmp_path / "again", stage, **settings)
    again.train(str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(trainer)
    again.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_functions_of_a_parameter(stage: int, tmp_path: Path) -> None:
    """Master weights and optimizer state have the shape (); so does a gradient. While it trains."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
    )
    from transformers import TrainerCallback

    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(safe_get_full_grad(kwargs["model"].scale))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step < 2:
                return
            scale = kwargs["model"].scale
            found = [
                safe_get_full_fp32_param(scale),
                safe_get_full_optimizer_state(scale, "exp_avg"),
            ]
            assert found[0].item() == whole_weights(trainer)["scale"].item()
            seen.extend(found)
            if stage < 3:  # at stage 3 it needs at least one element per rank of any parameter
                safe_set_full_fp32_param(scale, torch.tensor(0.5))
                assert safe_get_full_fp32_param(scale).item() == 0.5

    trainer = make(tmp_path, stage, callbacks=[Look], max_steps=2)
    trainer.train()
    assert [value.shape for value in seen] == [()] * 4
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", STAGES)
def test_a_model_of_nothing_but_scalars(stage: int, tmp_path: Path) -> None:
    """Fewer elements than ranks."""
    from tests.models import SEED

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.a * x - labels).square().mean()}

    draw = torch.Generator().manual_seed(SEED)
    data = [{"x": x, "labels": 2 * x} for x in torch.randn(16, generator=draw)]

    def run(folder: Path, resume: Any = False) -> Any:
        from dstrain import Trainer, TrainingArguments

        args = TrainingArguments(
            str(folder), zero_stage=str(stage), per_device_train_batch_size=2, learning_rate=0.1,
            num_train_epochs=1, report_to="none", logging_steps=1, disable_tqdm=True, save_steps=2,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(Line(), args, train_dataset=data)
        trainer.train(resume)
        return trainer

    trainer = run(tmp_path / "one")
    weight = whole_weights(trainer)["a"]
    assert (weight.shape, 0.2 < weight.item() < 2) == ((), True)
    trainer.close()
    again = run(tmp_path / "two", str(tmp_path / "one/checkpoint-2"))
    assert whole_weights(again)["a"].item() == weight.item()
    again.close()


@pytest.mark.ranks(1)
def test_deepspeed_still_needs_help(tmp_path: Path) -> None:
    """Where this fails, DeepSpeed has learned it: take it out of zero/scalar_parameters.py."""
    import deepspeed
    from deepspeed.runtime.utils import clip_grad_norm_

    from dstrain.engine import start

    start(use_cpu=True)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    with pytest.raises(RuntimeError, match="cannot be 0 to view"):
        deepspeed.initialize(model=scaled_llama(), config=config)
    with pytest.raises(RuntimeError, match="cannot be 0 to view"):
        deepspeed.zero.Init(module=nn.ParameterList([torch.tensor(1.0)]))
    scalar = nn.Parameter(torch.tensor(1.0))
    scalar.grad = torch.tensor(3.0)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        clip_grad_norm_([scalar], 1.0)


@pytest.mark.ranks(2, timeout=240)
def test_clip(tmp_path: Path) -> None:
    """Its own ``logit_scale``, at every stage; SigLIP's has the shape (1,)."""
    from safetensors.torch import load_file

    from dstrain import Trainer, TrainingArguments
    from tests.families.zoo import FAMILIES

    family = FAMILIES["clip"]
    before: Any = family.build()
    scalars = {n: p.item() for n, p in before.named_parameters() if p.dim() == 0}
    assert list(scalars) == ["logit_scale"]
    found = []
    for stage in STAGES:
        args = TrainingArguments(
            str(tmp_path / str(stage)), zero_stage=str(stage), per_device_train_batch_size=2,
            max_steps=2, learning_rate=1e-2, report_to="none", disable_tqdm=True,
            remove_unused_columns=False, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            family.build(), args, data_collator=family.collate, train_dataset=family.samples(8)
        )
        trainer.train()
        trainer.save_model()
        trainer.close()
        saved = load_file(tmp_path / str(stage) / "model.safetensors")
        assert all(saved[n].shape == () for n in scalars)
        found.append([saved[n].item() for n in scalars])
        assert all(a != b for a, b in zip(found[-1], scalars.values(), strict=True))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
