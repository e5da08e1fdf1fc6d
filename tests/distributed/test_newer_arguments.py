"""Arguments of newer releases of transformers, on real ranks: what they change, and what not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.core.errors import ConfigError
from tests.distributed.runs import losses, make_trainer
from tests.models import RaggedTokens, pad_collate, tiny_llama


def small(**sizes: int) -> Any:
    return tiny_llama(hidden_size=32, intermediate_size=32, **sizes)


def run(folder: Path, **arguments: Any) -> Any:
    trainer = make_trainer(
        folder, **{"max_steps": 3, "evaluation": 0, "model": small(), **arguments}
    )
    trainer.train()
    trainer.close()
    return trainer


@pytest.mark.ranks(2)
def test_rebalanced_batches_train_the_same_curve_with_less_padding(
    rank: int, tmp_path: Path
) -> None:
    """Each step has the samples of a random order; a run goes on inside of an epoch."""
    sizes: list[int] = []

    def collate(samples: list[Any]) -> Any:
        sizes.append(len(samples))
        return pad_collate(samples)

    arguments: dict[str, Any] = {
        "data": RaggedTokens(24, min_length=4, max_length=48), "max_steps": 3,
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "include_num_input_tokens_seen": True,
    }  # fmt: skip
    random = run(tmp_path / "random", **arguments)
    trainer = make_trainer(
        tmp_path / "dealt", train_sampling_strategy="batch_rebalance", evaluation=0,
        model=small(), **arguments,
    )  # fmt: skip
    trainer.data_collator = collate
    trainer.train()
    trainer.close()
    assert losses(trainer) == pytest.approx(losses(random), rel=1e-5)
    assert trainer.state.num_input_tokens_seen < random.state.num_input_tokens_seen
    assert len(set(sizes)) > 1, "long samples in small micro-batches, short ones in large"
    resumed = make_trainer(
        tmp_path / "dealt", train_sampling_strategy="batch_rebalance", evaluation=0,
        model=small(), **arguments,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "dealt" / "checkpoint-2"))
    resumed.close()
    assert losses(resumed) == losses(trainer)


@pytest.mark.ranks(2)
def test_sequential_samples_come_as_the_dataset_has_them(rank: int, tmp_path: Path) -> None:
    data = RaggedTokens(12)
    batches: list[list[int]] = []

    def collate(samples: list[Any]) -> Any:
        batches.append([data.examples.index(sample) for sample in samples])
        return pad_collate(samples)

    trainer = make_trainer(
        tmp_path, model=small(), evaluation=0, data=data, train_sampling_strategy="sequential"
    )
    trainer.data_collator = collate
    trainer.train()
    trainer.close()
    assert batches == [[4 * step + 2 * rank, 4 * step + 2 * rank + 1] for step in range(3)]


@pytest.mark.ranks(1)
def test_loader_processes_are_started_as_told(tmp_path: Path) -> None:
    """A spawned one imports dataset and collator anew; the numbers are the same."""
    arguments: dict[str, Any] = {"max_steps": 2, "train": 4}
    plain = losses(run(tmp_path, **arguments))
    trainer = make_trainer(
        tmp_path, evaluation=0, model=small(), dataloader_num_workers=1,
        dataloader_multiprocessing_context="spawn", **arguments,
    )  # fmt: skip
    context = trainer.get_train_dataloader().multiprocessing_context
    assert context.get_start_method() == "spawn"
    trainer.train()
    trainer.close()
    assert losses(trainer) == plain


@pytest.mark.ranks(1)
def test_only_some_layers_are_recomputed(tmp_path: Path) -> None:
    """Under the newer name of the argument, without a word of transformers about the older one."""
    counts: list[int] = []
    plain = losses(run(tmp_path, model=small(num_hidden_layers=4)))
    with pytest.raises(ConfigError, match="activations are in host memory there"):
        run(tmp_path, activation_checkpointing=True,
            activation_checkpointing_kwargs={"offload": True})  # fmt: skip
    for kwargs in ({"every_n_layers": 2}, None):
        model, calls = small(num_hidden_layers=4), []
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*gradient_checkpointing.*")
            trainer = run(
                tmp_path,
                model=model,
                activation_checkpointing=True,
                activation_checkpointing_kwargs=kwargs,
            )
        assert losses(trainer) == pytest.approx(plain, rel=1e-6)
        counts.append(len(calls))
    assert counts == [3 * 6, 3 * 8], "three steps of four layers, two or all of them twice"


@pytest.mark.ranks(1)
@pytest.mark.parametrize("used", [False, True])
def test_a_cache_is_filled_in_training_where_it_is_asked_for(used: bool, tmp_path: Path) -> None:
    model = small()
    model.config.use_cache = not used
    seen: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            kwargs.get("past_key_values", kwargs.get("cache")) is not None
        ),
        with_kwargs=True,
    )
    run(tmp_path, model=model, use_cache=used, train=4, max_steps=1)
    assert set(seen) == {used}
    assert model.config.use_cache is not used, "as the user left it"
    assert torch.is_grad_enabled()
