"""Formats of parameters: trained as the model has them, or refused before anything expensive."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from tests.distributed.runs import STAGES, losses, make_trainer, whole_weights
from tests.models import SEED, tiny_llama

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip


class Mixed(nn.Module):
    """Three layers, each in a format of its own; some frozen; one more frozen tensor."""

    def __init__(
        self, formats: tuple[str, ...], frozen: tuple[int, ...] = (), extra: Any = None
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            sizes = ((4, 6), (6, 6), (6, 1))
            layers = [nn.Linear(*size) for size in sizes]
        self.layers = nn.ModuleList(
            layer.to(DTYPES[name]) for layer, name in zip(layers, formats, strict=True)
        )
        for index in frozen:
            self.layers[index].requires_grad_(False)
        if extra is not None:
            self.extra = nn.Parameter(extra, requires_grad=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return {"loss": (x.squeeze(-1).float() - labels).square().mean()}


@functools.cache
def data() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(SEED)
    return [
        {"x": torch.randn(4, generator=draw), "labels": torch.randn((), generator=draw)}
        for _ in range(8)
    ]


def trainer_of(folder: Path, model: nn.Module, stage: int, **settings: Any) -> Any:
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(
        str(folder), zero_stage=str(stage), per_device_train_batch_size=4, num_train_epochs=4,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", logging_steps=1,
        disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0, save_steps=2,
        **settings,
    )  # fmt: skip
    return Trainer(model, args, data_collator=default_collate, train_dataset=data())


def by_hand(model: nn.Module) -> list[float]:
    """Train four steps by plain torch on all of the data."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), []
    for _ in range(4):
        loss = model(**default_collate(data()))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


RIGHT: list[tuple[int, tuple[str, ...], tuple[int, ...], float]] = [
    *[(stage, ("fp32", "bf16", "fp32"), (1,), 1e-6) for stage in STAGES],
    *[(stage, ("fp16", "fp32", "fp64"), (0, 2), 1e-6) for stage in STAGES],
    (0, ("fp32", "bf16", "fp32"), (), 2e-3),  # gradients of two ranks are added in bf16
    *[(stage, ("bf16", "bf16", "bf16"), (), 3e-2) for stage in STAGES],
    *[(stage, ("bf16", "bf16", "bf16"), (2,), 3e-2) for stage in STAGES],
]


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(("stage", "formats", "frozen", "tolerance"), RIGHT)
def test_an_fp32_run_trains_these_as_plain_torch_does(
    stage: int,
    formats: tuple[str, ...],
    frozen: tuple[int, ...],
    tolerance: float,
    tmp_path: Path,
    rank: int,
) -> None:
    """With the formats that the model has, in the saved file and the exported one too."""
    from safetensors.torch import load_file

    from dstrain.checkpoint import export
    from dstrain.core.ranks import barrier

    expected = by_hand(Mixed(formats, frozen))
    before = {n: p.detach().clone() for n, p in Mixed(formats, frozen).named_parameters()}
    trainer = trainer_of(tmp_path, Mixed(formats, frozen), stage)
    trainer.train()
    assert losses(trainer) == pytest.approx(expected, rel=tolerance)
    weights = whole_weights(trainer)
    trainer.save_model()
    trainer.close()
    if rank == 0:
        export(tmp_path / "checkpoint-4", tmp_path / "exported")
    barrier()
    for file in ("model.safetensors", "exported/model.safetensors"):
        saved = load_file(tmp_path / file)
        for name, weight in weights.items():
            assert weight.dtype == before[name].dtype, name
            assert torch.equal(saved[name], weight), (file, name)
    for index in frozen:
        name = f"layers.{index}.weight"
        assert torch.equal(weights[name], before[name])


# Stages, formats of the layers, frozen layers, settings, what the error says.
Case = tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...], dict[str, Any], str]
REFUSED: dict[str, Case] = {
    "fp64": (
        STAGES, ("fp64", "fp64", "fp64"), (), {},
        r"6 parameters in float64 \(layers.0.weight, layers.0.bias, layers.1.weight and 3 more\)",
    ),
    "a few of fp64": (STAGES, ("fp32", "fp64", "fp32"), (), {}, "2 parameters in float64"),
    "two formats": (
        (1, 2, 3), ("fp32", "bf16", "fp32"), (), {},
        r"2 parameters in bfloat16 \(layers.1.weight, layers.1.bias\); 4 parameters in float32",
    ),
    "fp64 in a 16-bit run": (
        (0, 3), ("fp32", "fp64", "fp32"), (), {"bf16": True}, "casts every parameter to bf16",
    ),
    "frozen fp64 in a 16-bit run": (
        (0, 3), ("fp32", "fp64", "fp32"), (1,), {"bf16": True}, "frozen ones too",
    ),
}  # fmt: skip


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_cast_is_refused(name: str, tmp_path: Path) -> None:
    """At construction; the model is as it was."""
    from dstrain.core.errors import ModelError

    stages, formats, frozen, settings, message = REFUSED[name]
    for stage in stages:
        model = Mixed(formats, frozen)
        with pytest.raises(ModelError, match=message):
            trainer_of(tmp_path, model, stage, **settings)
        expected = Mixed(formats, frozen).state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


FROZEN = {
    "uint8": torch.arange(7, dtype=torch.uint8),
    "int64": torch.tensor(5),
    "bool": torch.tensor([True, False, True]),
    "float8": torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn),
    "uint16": torch.arange(3).to(torch.uint16),
    "complex": torch.tensor([1 + 2j, 3.0]),
    "no elements": torch.zeros(0, 6),
}
NOT_AT_STAGE_THREE = {
    "float8": "1 parameter in float8_e4m3fn .extra. at ZeRO stage 3",
    "uint16": "1 parameter in uint16 .extra. at ZeRO stage 3",
    "no elements": "1 parameter in float32 .extra. without elements at ZeRO stage 3",
}


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters_of_any_kind_stay(
    name: str, precision: str, tmp_path: Path, rank: int
) -> None:
    """Quantised, integers, no elements: kept, saved, resumed and exported; or refused."""
    from safetensors.torch import load_file

    from dstrain.checkpoint import compare, export, verify
    from dstrain.core.errors import ModelError
    from dstrain.core.ranks import barrier

    for stage in (0, 2, 3):
        folder = tmp_path / str(stage)
        model = Mixed(("fp32",) * 3, extra=FROZEN[name].clone())
        settings = {"bf16": precision == "bf16"}
        if stage == 3 and name in NOT_AT_STAGE_THREE:
            with pytest.raises(ModelError, match=NOT_AT_STAGE_THREE[name]):
                trainer_of(folder, model, stage, **settings)
            continue
        trainer = trainer_of(folder / "one", model, stage, **settings)
        trainer.train()
        expected = FROZEN[name]
        if expected.dtype == torch.float32:
            expected = expected.to(DTYPES[precision])
        weights = whole_weights(trainer)
        trainer.close()
        if rank == 0:
            export(folder / "one/checkpoint-4", folder / "exported")
            assert verify(folder / "one/checkpoint-4")[1] == []
            other = compare(folder / "one/checkpoint-2", folder / "one/checkpoint-4")
            assert other.tensors
            assert "extra" not in {d.name for d in other.tensors}
            shutil.copytree(folder / "one/checkpoint-2", folder / "two/checkpoint-2")
        barrier()
        for found in (
            weights["extra"],
            load_file(folder / "one/checkpoint-4/model.safetensors")["extra"],
            load_file(folder / "exported/model.safetensors")["extra"],
        ):
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert found.tolist() == expected.tolist()
        again = trainer_of(
            folder / "two", Mixed(("fp32",) * 3, extra=FROZEN[name].clone()), stage, **settings
        )
        again.train(True)
        assert losses(again) == losses(trainer)
        again.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", STAGES)
def test_a_trained_parameter_without_elements(stage: int, tmp_path: Path, rank: int) -> None:
    """Trains below stage 3, keeps its shape, and goes on at another topology."""
    from dstrain.checkpoint import convert, export
    from dstrain.core.errors import ModelError
    from dstrain.core.ranks import barrier

    class Empty(Mixed):
        def __init__(self) -> None:
            super().__init__(("fp32",) * 3)
            self.none = nn.Linear(4, 0)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": super().forward(x, labels)["loss"] + self.none(x).sum()}

    if stage == 3:
        with pytest.raises(ModelError, match="2 parameters in float32 .none.weight, none.bias"):
            trainer_of(tmp_path, Empty(), stage)
        return
    trainer = trainer_of(tmp_path / "one", Empty(), stage)
    trainer.train()
    assert losses(trainer) == pytest.approx(by_hand(Empty()), rel=1e-6)
    assert trainer.model.none.weight.shape == (0, 4)
    trainer.close()
    if rank == 0:
        export(tmp_path / "one/checkpoint-4", tmp_path / "exported")
        convert(tmp_path / "one/checkpoint-4", tmp_path / "theirs")
    barrier()
    again = trainer_of(tmp_path / "two", Empty(), (stage + 1) % 3)
    again.train(str(tmp_path / "one/checkpoint-2"))
    assert losses(again) == pytest.approx(losses(trainer), rel=1e-6)
    again.close()


def router(strict: bool) -> Any:
    """Return a llama whose class says that its head stays in fp32."""
    model = tiny_llama()
    name = "_keep_in_fp32_modules_strict" if strict else "_keep_in_fp32_modules"
    setattr(model, name, {"lm_head"})
    return model


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strict", [False, True])
def test_modules_that_a_model_keeps_in_fp32(
    strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where they would compute in 16 bits, unless the config says that they may."""
    from deepspeed.accelerator import get_accelerator

    from dstrain.core.errors import ModelError

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    formats = ("bf16", "fp16") if strict else ("fp16",)
    for run in formats:
        with pytest.raises(
            ModelError, match="keeps 1 parameter .lm_head.weight. in fp32"
        ) as caught:
            make_trainer(tmp_path, model=router(strict), **{run: True})
        assert ("set bf16 instead" in str(caught.value)) is not strict
    make_trainer(tmp_path, model=router(strict))
    make_trainer(tmp_path, model=router(strict), torch_autocast=True)
    if not strict:
        make_trainer(tmp_path, model=router(strict), bf16=True)
    config = {"data_types": {"keep_in_fp32_modules": []}}
    trainer = make_trainer(
        tmp_path, model=router(strict), deepspeed=config, max_steps=1, **{formats[-1]: True}
    )
    trainer.train()
    assert trainer.model.lm_head.weight.dtype == torch.float16
    trainer.close()


@pytest.mark.ranks(1)
def test_unusual_formats_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model in bf16 with no format set; some of it in fp32 in a bf16 run."""
    trainer_of(tmp_path, Mixed(("bf16",) * 3), 2)
    assert "the model is in bf16 and neither bf16 nor fp16 is set" in caplog.text
    assert "master weights in fp32" in caplog.text
    caplog.clear()
    trainer_of(tmp_path, Mixed(("bf16", "fp32", "bf16")), 2, bf16=True)
    assert "2 parameters of the model are in fp32 and 4 in bf16" in caplog.text
    caplog.clear()
    trainer_of(tmp_path, Mixed(("fp32",) * 3), 2, bf16=True)
    assert "parameters of the model are in" not in caplog.text


@pytest.mark.ranks(2)
def test_evaluation_leaves_a_model_in_its_format(tmp_path: Path) -> None:
    """Before training too: an fp32 run computes in the formats that the model has."""
    model = tiny_llama().bfloat16()
    trainer = make_trainer(tmp_path, stage=1, model=model)
    trainer.evaluate()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
