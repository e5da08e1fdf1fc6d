"""What a training leaves: a module that ordinary torch code can use, or one call that makes it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import STAGES, losses, make_trainer, whole_weights
from tests.models import RaggedTokens, pad_collate, tiny_llama

# Containers of hooks and parameters, which every module has: what is in them counts.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
# Of gradient checkpointing: False, a partial of a function of torch, and an empty list.
_OF_TRANSFORMERS = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
)


def traces(model: torch.nn.Module) -> dict[str, Any]:
    """Return everything that can hang on a module and its parameters, without the values."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _OF_TRANSFORMERS:
                continue
            there = len(value) if key in _HOOKS else type(value).__name__
            found[f"module {name}: {key}"] = there
    for name, parameter in model.named_parameters():
        found |= {f"{name}: {k}": type(v).__name__ for k, v in vars(parameter).items()}
        found[f"{name} itself"] = (
            type(parameter),
            tuple(parameter.shape),
            parameter.requires_grad,
            parameter.is_leaf,
            parameter.grad,
            len(parameter._backward_hooks or ()),
            len(parameter._post_accumulate_grad_hooks or ()),
        )
    return found


def globals_of_torch() -> dict[str, Any]:
    """Return the functions that DeepSpeed replaces in torch, and those that it keeps of them."""
    found: dict[str, Any] = {}
    for owner in (torch, torch.nn.functional, torch.nn.Module, torch.nn.Linear, torch.nn.Embedding):
        for name, value in vars(owner).items():
            if callable(value) and (not name.startswith("__") or name == "__init_subclass__"):
                found[f"{owner.__name__}.{name}"] = value
    return found


def _batch() -> dict[str, torch.Tensor]:
    return pad_collate(RaggedTokens(4, seed=3).examples)


def _own_training(model: Any) -> list[float]:
    """Train three steps in a loop that knows nothing of dstrain; the same on every rank."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    curve = []
    for _ in range(3):
        loss = model(**_batch()).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def _copy_of(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Return a model that was never near an engine, with these weights."""
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].to(dtype, copy=True)  # buffers stay in fp32
    return model


def _settings(stage: int, options: dict[str, Any]) -> dict[str, Any]:
    return {"stage": stage, "max_steps": 2, "evaluation": 0, **options}


OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "fp32": (STAGES, {}),
    "bf16": ((0, 1, 3), {"bf16": True}),
    "offload": ((2, 3), {"bf16": True, "offload_optimizer": "cpu"}),
    "params": ((3,), {"offload_optimizer": "cpu", "offload_param": "cpu"}),
    "autocast": ((1,), {"torch_autocast": True}),
    "checkpointing": ((3,), {"gradient_checkpointing": True}),
}
CASES = [
    pytest.param(stage, options, id=f"{stage}-{name}")
    for name, (stages, options) in OPTIONS.items()
    for stage in stages
]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("stage", "options"), CASES)
def test_nothing_hangs_on_a_model_afterwards(
    stage: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Attributes, hooks and kinds of containers are those of before, in torch too."""
    model = tiny_llama()
    before, torch_before = traces(model), globals_of_torch()
    trainer = make_trainer(tmp_path, model=model, **_settings(stage, options))
    trainer.train()
    if stage == 3:
        assert traces(model) != before
        trainer.close(whole=True)
    assert traces(model) == before
    trainer.close()
    assert traces(model) == before
    assert globals_of_torch() == torch_before


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("stage", "bf16"), [(0, False), (1, False), (2, True), (3, False), (3, True)]
)
def test_ordinary_torch_code_uses_a_trained_model(stage: int, bf16: bool, tmp_path: Path) -> None:
    """Copies, pickles, state_dict, another optimizer, another format: as with a plain model."""
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model=model, stage=stage, max_steps=2, bf16=bf16)
    trainer.train()
    weights, dtype = whole_weights(trainer), torch.bfloat16 if bf16 else torch.float32
    expected = trainer.evaluate()["eval_loss"]
    if stage == 3:
        trainer.close(whole=True)
    plain = _copy_of(weights, dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, weights[name]), name

    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert traces(again).keys() == traces(plain).keys()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    model.save_pretrained(tmp_path / "own", safe_serialization=True) if trainer.ranks.is_main else 0

    curve = _own_training(plain)
    for other in (twin, again, model):
        assert _own_training(other) == curve
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    # What the user's loop has learned is what the Trainer evaluates and goes on with.
    after = trainer.evaluate()["eval_loss"]
    assert after < expected
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.close(whole=True)
    model.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert torch.isfinite(model(**_batch()).loss)


@pytest.mark.ranks(2)
def test_a_partitioned_model_says_what_makes_it_whole(rank: int, tmp_path: Path) -> None:
    """At stage 3: instead of empty tensors, or an error about a shape of 1-D."""
    from dstrain.core.errors import ConfigError, ModelError

    model = tiny_llama(hidden_size=64, vocab_size=2000)  # too large to stay gathered
    trainer = make_trainer(
        tmp_path, model=model, stage=3, max_steps=1,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )  # fmt: skip
    trainer.train()
    weights = whole_weights(trainer)
    with pytest.raises(ModelError, match=r"state_dict\(\) of a model .*\n?.*\n?.*close\(whole"):
        model.state_dict()
    for copied in (lambda: copy.deepcopy(model), lambda: torch.save(model, io.BytesIO())):
        with pytest.raises(ModelError, match="a copy, or torch.save"):
            copied()
    with pytest.raises(ModelError, match="resize_token_embeddings"):
        model.resize_token_embeddings(2002)
    with torch.no_grad():
        gathered = model(**_batch()).loss.item()  # an engine is alive
    trainer.close()
    for run in (lambda: model(**_batch()), lambda: model.generate(_batch()["input_ids"])):
        with pytest.raises(ModelError, match="partitioned over the ranks"):
            run()
    with pytest.raises(ConfigError, match="zero_stage=2 with a model that is partitioned"):
        make_trainer(tmp_path / "two", model=model, stage=2)
    trainer.close(whole="cpu")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        assert model(**_batch()).loss.item() == pytest.approx(gathered, rel=1e-6)
    second = make_trainer(tmp_path / "two", model=model, stage=2, max_steps=1)
    second.train()
    second.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_of_the_users_own_has_its_parameters_back(stage: int, tmp_path: Path) -> None:
    """DeepSpeed leaves flat tensors in it: steps of the user's own loop changed nothing."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = make_trainer(
        tmp_path, model=model, stage=stage, max_steps=2, optimizers=(optimizer, None)
    )
    trainer.train()
    trainer.close(whole=True)
    plain = copy.deepcopy(model)
    other = torch.optim.SGD(plain.parameters(), lr=optimizer.param_groups[0]["lr"], momentum=0.9)
    for steps in ((model, optimizer), (plain, other)):
        steps[0](**_batch()).loss.backward()
        steps[1].step()
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 2])
def test_an_engine_at_rest_can_be_read_and_not_stepped(stage: int, tmp_path: Path) -> None:
    """What scripts ask after train(): rates, groups, state of the optimizer, the engine."""
    from dstrain.core.errors import TrainingError

    trainer = make_trainer(tmp_path, stage=stage, max_steps=2, weight_decay=0.1)
    trainer.train()
    assert trainer.model_wrapped is trainer.model
    assert trainer.deepspeed.global_steps == 2
    assert len(trainer.get_learning_rates()) == 2
    group = trainer.get_optimizer_group(trainer.model.lm_head.weight)
    assert group["weight_decay"] == 0.1
    assert trainer.lr_scheduler.get_last_lr()
    assert trainer.optimizer.state_dict()
    for run in (trainer.deepspeed, trainer.deepspeed.backward):
        with pytest.raises(TrainingError, match="whose training has ended"):
            run(trainer.model(**_batch()).loss)
    engine = weakref.ref(trainer.deepspeed)
    del trainer
    gc.collect()
    assert engine() is None, "master weights and moments go with the Trainer"
