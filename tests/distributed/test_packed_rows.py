"""Sequences in one row: each is trained and evaluated as if it were alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer
from tests.models import RaggedTokens, tiny_llama

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2}


def _build(family: str, attention: str = "sdpa") -> Any:
    """Build a tiny model with the cache on in its config, as published ones have it."""
    import transformers as t

    configs = {
        "llama": lambda: t.LlamaConfig(**GROUPED),
        "qwen2": lambda: t.Qwen2Config(**GROUPED),
        "gpt_neox": lambda: t.GPTNeoXConfig(**SMALL, hidden_dropout=0.0),
        # Two layers of sliding attention, which has a mask of its own.
        "gemma3": lambda: t.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6),
    }
    config = configs[family]()
    assert config.use_cache
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def _flattened(folder: Path, **arguments: Any) -> Any:
    from transformers import DataCollatorWithFlattening

    trainer = make_trainer(folder, learning_rate=0.0, max_grad_norm=0.0, **arguments)
    trainer.data_collator = DataCollatorWithFlattening()
    return trainer


def _figures(trainer: Any) -> tuple[float, list[float], list[float]]:
    """Return evaluation loss, training losses, gradient norms."""
    evaluation = trainer.evaluate()["eval_loss"]
    trainer.train()
    norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    trainer.close()
    return evaluation, losses(trainer), norms


def _alone(model: Any) -> tuple[float, float, float]:
    """Compute evaluation loss, and a step's loss and norm, by torch, one sequence at a time."""
    from dstrain.data import EpochOrder

    model.config.use_cache = False

    def loss_of(examples: Any) -> torch.Tensor:
        total, targets = torch.zeros(()), 0
        for example in examples:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels[0, 1:], reduction="sum"
            )
            targets += int((labels[:, 1:] != -100).sum())
        return total / targets

    with torch.no_grad():
        evaluation = loss_of(RaggedTokens(7, seed=99)).item()
    data = RaggedTokens(8)
    order = EpochOrder(8, seed=42, shuffle=True).indices(0).tolist()
    loss = loss_of([data[i] for i in order])
    loss.backward()
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    )
    return evaluation, loss.item(), norm.item()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma3"])
def test_padding_free_batches_are_worth_their_sequences_one_by_one(
    family: str, stage: int, tmp_path: Path
) -> None:
    """With the cache on, transformers does not see that a row holds several sequences."""
    evaluation, loss, norm = _alone(_build(family))
    for batch in (1, 4):
        model = _build(family)
        trainer = _flattened(
            tmp_path,
            stage=stage,
            model=model,
            train=8,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
        )
        found = _figures(trainer)
        assert found[0] == pytest.approx(evaluation, rel=2e-6)
        assert found[1] == [pytest.approx(loss, rel=2e-6)]
        assert found[2] == [pytest.approx(norm, rel=1e-5)]
        assert model.config.use_cache


@pytest.mark.ranks(2)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_packed_conversations_are_worth_each_alone(
    attention: str, stage: int, tmp_path: Path
) -> None:
    """The causal language model task's own packing, several samples in a batch."""
    from dstrain.tasks.causal_lm.chat import collate_conversations, joined, pack
    from dstrain.tasks.causal_lm.trainer import CausalLMTrainer

    found = []
    for example in RaggedTokens(16):
        found.append((example["input_ids"], [-100, *example["labels"][1:]]))
    figures = []
    for packed in (False, True):
        samples: Any = [{"input_ids": ids, "labels": labels} for ids, labels in found]
        if packed:
            samples = [joined(block) for block in pack(found, 40)]
            assert 4 < len(samples) <= 8, "one global batch, of samples with several conversations"
        trainer = make_trainer(
            tmp_path,
            stage=stage,
            cls=CausalLMTrainer,
            model=_build("llama", attention),
            data=samples,
            evaluation=samples,
            learning_rate=0.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=4 if packed else 8,
            per_device_eval_batch_size=3,
        )
        trainer.data_collator = collate_conversations
        trainer.refuse_mixing()
        figures.append(_figures(trainer))
    (evaluation, (loss,), (norm,)), packed_figures = figures
    assert packed_figures[0] == pytest.approx(evaluation, rel=2e-6)
    assert packed_figures[1] == [pytest.approx(loss, rel=2e-6)]
    assert packed_figures[2] == [pytest.approx(norm, rel=1e-5)]


def _mixing(family: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "bloom": lambda: t.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: t.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2),
        # Takes position_ids, and makes its mask without them.
        "opt": lambda: t.OPTConfig(
            vocab_size=259,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
    }
    return t.AutoModelForCausalLM.from_config(configs[family]())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_models_that_mix_the_sequences_of_a_row_are_found_out(
    stage: int, tmp_path: Path, rank: int, caplog: Any
) -> None:
    """By trying; the arguments of ``forward`` do not tell. Padding-free: a warning."""

    def warnings(model: Any, **arguments: Any) -> list[str]:
        caplog.clear()
        trainer = _flattened(tmp_path, stage=stage, model=model, train=4, **arguments)
        with caplog.at_level(logging.WARNING, logger="dstrain"):
            trainer.train()
        trainer.close()
        return [r.message for r in caplog.records if "see each other" in r.message]

    for family in ("bloom", "mamba", "opt"):
        (message,) = warnings(_mixing(family)) if rank == 0 else warnings(_mixing(family)) or [""]
        assert rank or message.startswith(type(_mixing(family)).__name__)
    for family in ("llama", "gemma3"):
        assert not warnings(_build(family))
    assert not warnings(_build("llama"), bf16=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_packing_conversations_is_refused_for_a_model_that_mixes_them(
    stage: int, tmp_path: Path
) -> None:
    """Before anything is trained, on all ranks."""
    from dstrain.core.errors import ConfigError
    from dstrain.tasks.causal_lm.chat import collate_conversations
    from dstrain.tasks.causal_lm.trainer import CausalLMTrainer

    trainer = make_trainer(tmp_path, stage=stage, cls=CausalLMTrainer, model=_mixing("opt"))
    trainer.data_collator = collate_conversations
    with pytest.raises(ConfigError, match="packing=True with OPTForCausalLM"):
        trainer.refuse_mixing()
    trainer.close()


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_metrics_of_a_model_whose_cache_is_no_tensor(stage: int, tmp_path: Path, rank: int) -> None:
    """Mamba returns its cache under a name that its config does not call ignored."""
    shapes: list[Any] = []

    def metric(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.predictions)}

    trainer = make_trainer(
        tmp_path, stage=stage, model=_mixing("mamba"), max_steps=1, eval_strategy="steps"
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
        self.inner = _build("llama")

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

    return get_peft_model(_build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))


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
    """One token a forward pass; the same tokens as without the cache."""
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
