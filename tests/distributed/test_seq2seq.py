"""Seq2SeqTrainer: generated text of every sample, once and in order, at every stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.predictions import EVERYTHING_WIDE
from tests.models import tiny_t5

LENGTH = 8


def _samples(number: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(7)
    return [
        {
            "input_ids": torch.randint(2, 64, (6,), generator=draw),
            "labels": torch.randint(2, 64, (4,), generator=draw),
        }
        for _ in range(number)
    ]


def _trainer(folder: Path, data: Any, *, stage: int = 2, **arguments: Any) -> Any:
    from dstrain import Seq2SeqTrainer, Seq2SeqTrainingArguments

    settings: dict[str, Any] = {
        "predict_with_generate": True,
        "generation_max_length": LENGTH,
        "per_device_eval_batch_size": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 0.0,
        "zero_stage": str(stage),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **({"deepspeed": EVERYTHING_WIDE} if stage == 3 else {}),
        **arguments,
    }
    args = Seq2SeqTrainingArguments(str(folder), **settings)
    return Seq2SeqTrainer(tiny_t5(), args, train_dataset=_samples(4), eval_dataset=data)


def _expected(data: Any, **kwargs: Any) -> np.ndarray:
    """Generate the tokens of each sample alone, padded to the model's own limit of 20."""
    rows = []
    for sample in data:
        tokens = tiny_t5().generate(sample["input_ids"][None], **{"max_length": LENGTH} | kwargs)
        rows.append(torch.nn.functional.pad(tokens, (0, 20 - tokens.shape[1])))
    return torch.cat(rows).numpy()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("stage", "gather"), [(2, "auto"), (3, "auto"), (3, "never")])
def test_tokens_are_those_of_each_sample_alone(
    stage: int, gather: str, tmp_path: Path, rank: int
) -> None:
    """Unequal counts, rows of unequal length, beams, several rows per sample; around training."""
    data = _samples(5)
    expected = _expected(data)
    expected_beams = _expected(data[:3], num_beams=2, num_return_sequences=2)
    trainer = _trainer(tmp_path, data, stage=stage, generation_gather_weights=gather)
    with _watched(trainer, whole=gather != "never", in_step=stage == 3):
        for _ in range(2):
            output = trainer.predict(data)
            several = trainer.predict(data[:3], num_beams=2, num_return_sequences=2)
            assert np.isfinite(output.metrics["test_loss"])
            if rank == 0:
                assert np.array_equal(output.predictions, expected)
                assert output.label_ids.shape == (5, 20)
                assert output.label_ids[:, :4].tolist() == [s["labels"].tolist() for s in data]
                assert (output.label_ids[:, 4:] == 0).all(), "padded with the pad token"
                assert np.array_equal(several.predictions, expected_beams)
            trainer.train()
    assert not any(getattr(p, "ds_active_sub_modules", ()) for p in trainer.model.parameters())
    trainer.close()


def _watched(trainer: Any, *, whole: bool, in_step: bool) -> Any:
    """Note whether the weights are whole all the time that the model generates.

    Ranks must be in step at stage 3 with whole weights too, where forward passes have collectives.
    """
    import contextlib

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        generate, seen = trainer.model.generate, []

        def watching(*args: Any, **kwargs: Any) -> Any:
            before = all(p.numel() for p in trainer.model.parameters())
            tokens = generate(*args, **kwargs)
            seen.append((before, all(p.numel() for p in trainer.model.parameters())))
            assert kwargs["synced_gpus"] == in_step
            return tokens

        trainer.model.generate = watching
        yield
        assert seen
        assert set(seen) == {(whole, whole)}
        del trainer.model.generate

    return watched()


@pytest.mark.ranks(2)
def test_arguments_of_generation_reach_it(tmp_path: Path, rank: int) -> None:
    """Those of the call win; each set of a dict gets them; without labels; without generating."""
    trainer = _trainer(tmp_path, {"a": _samples(2), "b": _samples(3)}, generation_num_beams=2)
    given: list[dict[str, Any]] = []
    generate = trainer.model.generate

    def watching(**kwargs: Any) -> Any:
        given.append({k: v for k, v in kwargs.items() if k in ("max_length", "num_beams")})
        assert "labels" not in kwargs
        return generate(**kwargs)

    trainer.model.generate = watching
    trainer.compute_metrics = lambda p: {"width": p.predictions.shape[1]}
    found = trainer.evaluate(max_length=25, num_beams=1)
    assert given == [{"max_length": 25, "num_beams": 1}] * 2
    assert (found["eval_a_width"], found["eval_b_width"]) == (25, 25)
    given.clear()
    assert trainer.evaluate("b")["eval_width"] == 20
    assert given == [{"max_length": LENGTH, "num_beams": 2}]
    output = trainer.predict([{"input_ids": s["input_ids"]} for s in _samples(3)])
    assert output.label_ids is None
    assert "test_loss" not in output.metrics
    given.clear()
    trainer.args.predict_with_generate, trainer.compute_metrics = False, None
    output = trainer.predict(_samples(3))
    assert not given
    if rank == 0:
        assert output.predictions[0].shape == (3, 4, 64)


@pytest.mark.ranks(1)
def test_what_cannot_work_is_said_at_once(tmp_path: Path) -> None:
    """Before an evaluation in the middle of a night."""
    from transformers import GenerationConfig

    from dstrain import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
    from tests.models import RegressionModel

    quiet = {"report_to": "none", "disable_tqdm": True}
    with pytest.raises(ValueError, match="Seq2SeqTrainingArguments"):
        Seq2SeqTrainer(tiny_t5(), TrainingArguments(str(tmp_path), **quiet))
    args = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, **quiet)
    with pytest.raises(ValueError, match="no method generate"):
        Seq2SeqTrainer(RegressionModel(), args)
    bad = GenerationConfig(do_sample=False, top_p=0.9)
    with pytest.raises(ValueError, match="contradicts itself"):
        _trainer(tmp_path, None, generation_config=bad)
    with pytest.raises(ValueError, match="cannot be read"):
        _trainer(tmp_path, None, generation_config=str(tmp_path / "none"))
    GenerationConfig(max_new_tokens=3, num_beams=2).save_pretrained(tmp_path / "config")
    for place in (tmp_path / "config", tmp_path / "config" / "generation_config.json"):
        trainer = _trainer(tmp_path, None, generation_config=str(place), generation_max_length=None)
        assert trainer.model.generation_config.num_beams == 2
