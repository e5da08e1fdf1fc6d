"""Caches of keys and values: off in forward passes of a run, on for generation and for users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import make_trainer
from tests.distributed.small_models import GROUPED, build_mixing, build_small
from tests.models import tiny_llama


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_metrics_of_a_model_whose_cache_is_no_tensor(stage: int, tmp_path: Path, rank: int) -> None:
    """Mamba returns its cache under a name that its config does not call ignored."""
    shapes: list[Any] = []

    def metric(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.predictions)}

    trainer = make_trainer(
        tmp_path, stage=stage, model=build_mixing("mamba"), max_steps=1, eval_strategy="steps"
    )
    trainer.compute_metrics = metric
    trainer.train()
    assert trainer.evaluate()["eval_rows"] == 7
    assert len(shapes) == (0 if rank else 2)
    assert all(shape[0] == 7 and len(shape) == 3 for shape in shapes)
    assert trainer.model.config.use_cache
    trainer.close()


class _Wrapped(torch.nn.Module):
    """A user's own module around a model; it knows nothing of caches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_small("llama")

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        assert output.past_key_values is None
        return output.loss, output.logits


def _llava() -> Any:
    import transformers as t

    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
        text_config=t.LlamaConfig(**GROUPED),
        image_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    return t.LlavaForConditionalGeneration(config)


def _with_adapter() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(build_small("llama"), LoraConfig(r=2, target_modules=["q_proj"]))


def _encoder_decoder() -> Any:
    from tests.models import tiny_t5

    return tiny_t5()


class _Breaks(Exception):
    pass


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("build", "named"),
    [
        (tiny_llama, "config"),
        (_Wrapped, "inner.config"),
        (_llava, "model.language_model.config"),
        (_with_adapter, "config"),
        (_encoder_decoder, "decoder.config"),
    ],
)
def test_the_cache_is_off_in_a_run_and_nowhere_else(build: Any, named: str, tmp_path: Path) -> None:
    """In forward passes; what a callback sees and a checkpoint holds is what the user said."""
    import operator

    from transformers import TrainerCallback

    from dstrain import Trainer

    model = build()
    config = operator.attrgetter(named)(model)
    assert config.use_cache
    given = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}
    seen: dict[str, set[bool]] = {"forward": set(), "callback": set()}

    class Watching(Trainer):
        breaks = False

        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            seen["forward"].add(config.use_cache)
            if self.breaks:
                raise _Breaks
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            held = outputs.get("past_key_values") if isinstance(outputs, dict) else None
            assert held is None
            return (loss, outputs) if kwargs.get("return_outputs") else loss

    class Callback(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen["callback"].add(config.use_cache)

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            seen["callback"].add(config.use_cache)

    trainer = make_trainer(
        tmp_path,
        cls=Watching,
        model=model,
        data=[given] * 4,
        evaluation=[given] * 2,
        callbacks=[Callback],
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    trainer.train()
    trainer.predict([given] * 2)
    assert seen == {"forward": {False}, "callback": {True}}
    for path in tmp_path.glob("checkpoint-*/config.json"):
        document = json.loads(path.read_text())
        assert document.get("text_config", document).get("use_cache", True)
    Watching.breaks = True
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(_Breaks):
            run()
        assert config.use_cache
    trainer.close()


@pytest.mark.ranks(1)
def test_whoever_says_use_cache_is_heard(tmp_path: Path) -> None:
    """A batch, or a loss that goes on from a cache: the config is what is asked where none says."""
    from dstrain import Trainer
    from tests.models import pad_collate

    held: list[bool] = []

    class Says(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            held.append(outputs.past_key_values is not None)
            return outputs.loss

    for said in (True, False):
        trainer = make_trainer(tmp_path, cls=Says, max_steps=1)
        trainer.data_collator = lambda samples, said=said: (
            pad_collate(samples) | {"use_cache": said}
        )
        trainer.train()
        trainer.close()
    assert held == [True, False]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_generating_in_an_evaluation_uses_the_cache(stage: int, tmp_path: Path) -> None:
    """Generate the same tokens as without the cache, with one token in each forward pass."""
    from dstrain import Seq2SeqTrainer, Seq2SeqTrainingArguments
    from tests.models import tiny_t5

    given = [{"input_ids": [5, 6, 7, 8 + i], "labels": [9, 8, 7, 1]} for i in range(4)]
    model = tiny_t5()
    widths: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        widths.append(kwargs["input_ids"].shape[1])

    model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        zero_stage=str(stage),
        predict_with_generate=True,
        generation_max_length=6,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a"
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=given,
        eval_dataset=given,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.predict([{"input_ids": g["input_ids"]} for g in given])
    assert len(widths) >= 2
    assert set(widths) == {1}
    trainer.close()
