"""transformers is told of stage 3 while a model is built partitioned and while ranks work in step.

At any other time a model that a metric, a callback or a user builds is a plain one, on any rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer
from tests.models import PAD_TOKEN_ID, tiny_llama, tiny_llama_config

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}


def _built() -> Any:
    """Build a model as a user does, from a seed; leave the random state of the run as it is."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return AutoModelForCausalLM.from_config(tiny_llama_config(**SMALL))


def _output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 13).view(1, -1)).logits


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_builds_and_loads_plain_models_at_any_point(
    stage: int, rank: int, tmp_path: Path
) -> None:
    """In compute_metrics, on_evaluate, on_step_end and on_save, where other ranks are elsewhere."""
    from transformers import AutoModelForCausalLM, TrainerCallback

    from dstrain.core.ranks import barrier

    plain = _built()
    weights, output = dict(plain.named_parameters()), _output(plain)
    folder = tmp_path / "judge"
    if rank == 0:
        plain.save_pretrained(folder)
    barrier()
    places: list[str] = []

    def check(place: str) -> None:
        for model in (_built(), AutoModelForCausalLM.from_pretrained(folder)):
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, weights[name]), (place, name)
            assert torch.equal(_output(model), output), place
            model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
            assert model.lm_head.weight.grad is not None
        places.append(place)

    class Judge(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                check("step")

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                check("evaluate")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                check("save")
                saved = f"{args.output_dir}/checkpoint-{state.global_step}"
                loaded = AutoModelForCausalLM.from_pretrained(saved)
                assert loaded(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()

    def metrics(prediction: Any) -> dict[str, float]:
        check("metrics")
        return {"judged": 1.0}

    trainer = make_trainer(
        tmp_path / "run", stage=stage, max_steps=2, callbacks=[Judge], eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.compute_metrics = metrics
    trainer.train()
    trainer.evaluate()
    wanted = ["step", "metrics", "evaluate", "save"] * 2 + ["metrics", "evaluate"]
    assert places == (wanted if rank == 0 else [])
    check("after")
    trainer.close()
    check("closed")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_second_model_starts_like_the_first(stage: int, tmp_path: Path) -> None:
    """From the same seed, while the first Trainer lives; and trains alike, at stage 2 too."""
    curves, trainers = [], []
    for number, at in enumerate((3, stage)):
        trainer = make_trainer(tmp_path / str(number), model=_built(), stage=at, max_steps=2)
        trainer.train_dataset = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
        trainer.train()
        curves.append(losses(trainer))
        trainers.append(trainer)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    first = dict(_built().named_parameters())
    assert all(torch.equal(p, first[n]) for n, p in _built().named_parameters())
    for trainer in trainers:
        trainer.close()


@pytest.mark.ranks(2)
def test_a_judge_in_the_loss_is_a_plain_model(tmp_path: Path) -> None:
    """At stage 3: its layers compute as torch's own, not through DeepSpeed's linear function."""
    from dstrain import Trainer

    linear = torch.nn.functional.linear
    judge = _built()
    expected, seen = _output(judge), []

    class Judged(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, **kwargs)
            seen.append(torch.equal(_output(judge), expected))
            return loss

    trainer = make_trainer(tmp_path, stage=3, cls=Judged, max_steps=2, bf16=True)
    trainer.train()
    assert seen
    assert all(seen)
    assert torch.nn.functional.linear is not linear
    trainer.close()
    assert torch.nn.functional.linear is linear


# --- in step -------------------------------------------------------------------------------------


def _prompts(rank: int) -> dict[str, torch.Tensor]:
    """Make prompts as long on each rank, with continuations of other lengths: see ``_ends``."""
    ids = torch.tensor([[5, 6, 7]]) if rank == 0 else torch.tensor([[8, 9, 10]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _kwargs(rank: int) -> dict[str, Any]:
    return {"max_new_tokens": 3 + 6 * rank, "do_sample": False, "pad_token_id": PAD_TOKEN_ID}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["callback", "prediction_step", "synced_gpus=False"])
def test_ranks_that_generate_themselves_keep_in_step(where: str, rank: int, tmp_path: Path) -> None:
    """At stage 3, with other numbers of tokens on each rank: as the whole model alone does."""
    from transformers import TrainerCallback

    from dstrain import Trainer

    options: dict[str, Any] = {"synced_gpus": False} if where.startswith("synced") else {}
    results: list[torch.Tensor] = []

    def generate(model: Any) -> None:
        model.eval()
        results.append(model.generate(**_prompts(rank), **_kwargs(rank), **options))

    class Own(Trainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if where == "prediction_step":
                generate(model)
            return super().prediction_step(model, inputs, *args, **kwargs)

    class Sample(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if where != "prediction_step":
                generate(kwargs["model"])

    trainer = make_trainer(
        tmp_path, stage=3, cls=Own, max_steps=2, learning_rate=0.0, callbacks=[Sample],
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    expected = tiny_llama().eval().generate(**_prompts(rank), **_kwargs(rank))
    assert len(results) == 3
    assert all(torch.equal(tokens, expected) for tokens in results)
    trainer.close()


@pytest.mark.ranks(2)
def test_a_rank_that_generates_alone_is_told(rank: int, tmp_path: Path) -> None:
    """It would hang in its first gather; ``ddp_timeout`` is how long it waits."""
    from dstrain.core.errors import ModelError
    from dstrain.core.ranks import barrier

    trainer = make_trainer(tmp_path, stage=3, max_steps=1, ddp_timeout=2)
    trainer.train()
    trainer.model.eval()
    if rank == 0:
        with pytest.raises(ModelError, match=r"rank 0 called generate\(\)"):
            trainer.model.generate(**_prompts(0), **_kwargs(0))
    barrier()
    tokens = trainer.model.generate(**_prompts(rank), **_kwargs(rank))  # together it works
    assert tokens.shape[1] > 3
    trainer.close()


@pytest.mark.ranks(2)
def test_layers_that_chance_skips_run_on_all_ranks(rank: int, tmp_path: Path) -> None:
    """LayerDrop at stage 3: ranks draw for themselves, and a skipped layer would not gather."""
    from transformers import HubertConfig, HubertForSequenceClassification

    from dstrain import Trainer, TrainingArguments

    torch.manual_seed(1)
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.5, apply_spec_augment=False, num_labels=2,
        classifier_proj_size=8,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(2)
    data = [{"input_values": torch.randn(64, generator=draw), "labels": n % 2} for n in range(16)]
    args = TrainingArguments(
        str(tmp_path), zero_stage="3", per_device_train_batch_size=2, num_train_epochs=2,
        report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(HubertForSequenceClassification(config), args, train_dataset=data)
    trainer.train()
    assert len(losses(trainer)) == 8
    trainer.close()


# --- put back as it was --------------------------------------------------------------------------


class _Own:
    """What a user has registered."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def is_zero3(self) -> bool:
        return True


@pytest.mark.ranks(1)
def test_what_was_registered_before_is_put_back(tmp_path: Path) -> None:
    """Nested, after an error, with a config of the user's own, at any stage."""
    from transformers.integrations import (
        is_deepspeed_zero3_enabled,
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    import dstrain
    from dstrain import TrainingArguments
    from dstrain.engine import is_partitioned

    def block(stage: int) -> Any:
        return dstrain.partitioned(TrainingArguments(str(tmp_path), zero_stage=str(stage)))

    assert not is_deepspeed_zero3_enabled()
    with block(3):
        assert is_deepspeed_zero3_enabled()
        with block(2):
            assert not is_deepspeed_zero3_enabled()
            with block(3):
                assert all(is_partitioned(p) for p in _built().parameters())
            assert not is_deepspeed_zero3_enabled()
            assert not any(is_partitioned(p) for p in _built().parameters())
        assert is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()
    with pytest.raises(ZeroDivisionError), block(3):
        raise ZeroDivisionError
    assert not is_deepspeed_zero3_enabled()
    own = _Own()
    set_hf_deepspeed_config(own)
    try:
        with block(2):
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
        with pytest.raises(ZeroDivisionError), block(3):
            raise ZeroDivisionError
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    with block(3):
        set_hf_deepspeed_config(own)  # since: it stays
    assert is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()


@pytest.mark.ranks(1)
def test_building_partitioned_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """A block used to leave ``linear`` replaced, and Module with an ``__init_subclass__``."""
    from transformers import LlamaForCausalLM

    import dstrain
    from dstrain import TrainingArguments
    from tests.distributed.test_ordinary import globals_of_torch

    LlamaForCausalLM(tiny_llama_config(**SMALL))  # transformers adds to torch at its first model
    before = globals_of_torch()
    with dstrain.partitioned(TrainingArguments(str(tmp_path), zero_stage="3")):
        LlamaForCausalLM._from_config(tiny_llama_config(**SMALL))
    assert globals_of_torch() == before

    class Mixin:
        seen: list[str] = []  # noqa: RUF012

        def __init_subclass__(cls) -> None:
            Mixin.seen.append(cls.__name__)

    class Mixed(torch.nn.Module, Mixin):
        pass

    assert Mixin.seen == ["Mixed"]
    assert isinstance(Mixed(), torch.nn.Module)
