"""The other jobs as a user starts them: pairs of texts, and conversations.

One run of two ranks each, whose saved model is then looked at with transformers alone.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch

from dstrain.tasks.seq2seq.metrics import text_metrics
from tests.cli.corpus import TINY_MODEL, WORDS, flags
from tests.cli.launched import TIMEOUT_SECONDS
from tests.launch import launch

STEPS = 30
TINY_T5 = "t5:d_model=32,d_kv=16,d_ff=64,num_layers=1,num_heads=2,dropout_rate=0.0"


@dataclass(frozen=True)
class Run:
    """A finished run, and what it read and wrote."""

    folder: Path
    data: Path
    cache: Path
    stdout: str

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


def start(home: Path, task: str, rows: list[dict], **given: object) -> Run:
    """Train on two ranks."""
    run = Run(home / "out", home / "rows.jsonl", home / "hf", "")
    run.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, object] = {
        "train_file": run.data,
        "validation_percentage": 15,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 10,
        "block_size": None,
        "completion_tokens": None,
    }
    words = flags(run.folder, **values | given)
    done = launch(
        ["--quiet", "--module", "dstrain", "train", task, *words],
        timeout=TIMEOUT_SECONDS,
        env={"HF_HOME": str(run.cache)},
    )
    both = done.stdout + done.stderr
    assert done.returncode == 0, both
    for noise in ("Traceback", "Warning:", "[rank 1]"):
        assert noise not in both
    for name in ("train_results.json", "eval_results.json", "loss_curve.png"):
        assert (run.folder / name).is_file()
    assert run.json("all_results.json") == run.json("train_results.json") | run.json(
        "eval_results.json"
    )
    return Run(run.folder, run.data, run.cache, done.stdout)


def shown_figures(run: Run) -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^([a-z ]+?) +([\d.]+) +([\d.]+)$", run.stdout, re.MULTILINE)
    return {name: (float(before), float(after)) for name, before, after in rows}


# ------------------------------------------------------------------ pairs


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory) -> Run:
    """Run the pairs task at stage 3, where the model never exists whole."""
    draw = random.Random(0)
    rows = []
    for _ in range(150):
        words = draw.choices(WORDS, k=draw.randint(2, 7))
        rows.append({"text": " ".join(words), "summary": words[0], "other": 1})
    return start(
        tmp_path_factory.mktemp("pairs"),
        "seq2seq",
        rows,
        model_config=TINY_T5,
        source_column="text",
        target_column="summary",
        max_source_length=16,
        max_target_length=6,
        predict_with_generate="true",
        eval_strategy="steps",
        eval_steps=STEPS,
        zero_stage=3,
        num_samples_shown=3,
    )


def held_out_pairs(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    from dstrain.tasks.seq2seq.arguments import DataArguments
    from dstrain.tasks.seq2seq.sources import load_pairs

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", run.cache / "datasets")
    args = DataArguments(
        train_file=str(run.data),
        source_column="text",
        target_column="summary",
        validation_percentage=15,
    )
    return list(load_pairs(args).validation)


def test_a_model_of_pairs_learns_and_has_the_loss_that_was_reported(pairs_run, monkeypatch):
    """By hand: the saved model on each held-out pair; the mean over all target tokens."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pairs_run.folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(pairs_run.folder).eval()
    total, count, texts = 0.0, 0, []
    for pair in held_out_pairs(pairs_run, monkeypatch):
        source = tokenizer(pair["source"], return_tensors="pt", max_length=16, truncation=True)
        labels = tokenizer(text_target=pair["target"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += model(**source, labels=labels).loss.item() * labels.numel()
            texts.append(tokenizer.decode(model.generate(**source)[0], skip_special_tokens=True))
        count += labels.numel()
    results = pairs_run.json("eval_results.json")
    assert results["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert results["eval_loss"] < results["eval_before_loss"] - 1
    held_out = held_out_pairs(pairs_run, monkeypatch)
    metrics = text_metrics(texts, [pair["target"] for pair in held_out])
    assert metrics["rouge_l"] > 0.1
    for name, title in {
        "loss": "loss",
        "rouge_l": "rouge l",
        "exact_match": "exact match",
        "generated_length": "generated length",
    }.items():
        before, after = shown_figures(pairs_run)[title]
        assert before == pytest.approx(results[f"eval_before_{name}"], abs=1e-3)
        assert after == pytest.approx(results[f"eval_{name}"], abs=1e-3)
        if name in metrics:
            assert results[f"eval_{name}"] == pytest.approx(metrics[name])

    shown = re.findall(
        r"^sample (\d+)\n  (.*)\n  prediction: ?(.*)\n  reference:  (.*)$",
        pairs_run.stdout,
        re.MULTILINE,
    )
    assert len(shown) == 3
    for number, source, prediction, reference in shown:
        pair = held_out[int(number)]
        assert (source, reference) == (pair["source"], pair["target"])
        assert prediction == texts[int(number)].strip()


def test_a_saved_model_of_pairs_starts_and_stops_right(pairs_run):
    config, generation = pairs_run.json("config.json"), pairs_run.json("generation_config.json")
    tokenizer = pairs_run.json("tokenizer_config.json")
    assert tokenizer["pad_token"] == "<|pad|>"
    for source in (config, generation):
        assert (source["pad_token_id"], source["eos_token_id"]) == (1, 0)
        assert source["decoder_start_token_id"] == 1
    assert generation["max_length"] == 7  # six tokens after the one that starts


# ------------------------------------------------------------------ conversations


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Run:
    """Run the chat task, packed, with turns of different lengths."""
    draw = random.Random(0)
    rows = []
    for _ in range(150):
        messages = [{"role": "system", "content": "repeat"}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 3)):
            word = draw.choice(WORDS)
            messages.append({"role": "user", "content": f"say {word}"})
            messages.append({"role": "assistant", "content": f"{word} " * draw.randint(1, 3)})
        rows.append({"messages": messages, "id": 1})
    return start(
        tmp_path_factory.mktemp("chat"),
        "causal-lm",
        rows,
        model_config=TINY_MODEL,
        data_format="chat",
        packing="true",
        block_size=128,
        zero_stage=2,
    )


def test_a_model_of_conversations_has_the_loss_of_its_answers(chat_run, monkeypatch):
    """By hand, one conversation at a time: what the template adds with each answer, no more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dstrain.tasks.causal_lm.arguments import DataArguments
    from dstrain.tasks.causal_lm.conversations import load_conversations, messages_of

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", chat_run.cache / "datasets")
    args = DataArguments(
        data_format="chat", train_file=str(chat_run.data), validation_percentage=15
    )
    tokenizer = AutoTokenizer.from_pretrained(chat_run.folder)
    model = AutoModelForCausalLM.from_pretrained(chat_run.folder).eval()
    eos = tokenizer.eos_token
    total, count = 0.0, 0
    held_out = load_conversations(args).validation
    for row in held_out:
        ids, targets = [], []
        for message in messages_of(row):
            is_answer = message["role"] == "assistant"
            head = f"<|{message['role']}|>\n"
            body = message["content"] + (eos if is_answer else "") + "\n"
            for text, learned in ((head, False), (body, is_answer)):
                tokens = tokenizer(text)["input_ids"]
                ids += tokens
                targets += [learned] * len(tokens)
        # The tokens of the whole, not of its pieces, unless the tokenizer would join them.
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
            messages_of(row), tokenize=False
        )
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        wanted = torch.tensor(targets[1:])
        total += torch.nn.functional.cross_entropy(
            logits[wanted], torch.tensor(ids[1:])[wanted], reduction="sum"
        ).item()
        count += int(wanted.sum())
    results = chat_run.json("eval_results.json")
    assert results["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert results["eval_loss"] < results["eval_before_loss"] - 1
    assert "eval_bits_per_byte" not in results

    shown = chat_run.stdout.split("a conversation:\n")[1]
    messages = messages_of(held_out[0])
    assert f"  user: {messages[-2]['content']}\n  answer of the model: " in shown
    assert f"  answer in the data:  {messages[-1]['content'].strip()}\n" in shown
