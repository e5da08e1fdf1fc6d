"""Conversations in packed blocks and in padded batches."""

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from dstrain.core.errors import ConfigError
from dstrain.tasks.causal_lm import job
from dstrain.tasks.causal_lm.chat import (
    DEFAULT_TEMPLATE,
    ChatEncoder,
    collate_conversations,
    joined,
    pack,
)
from tests.models import tiny_llama

pytestmark = pytest.mark.usefixtures("cache")


def conversations(tokenizer, count=7):
    tokenizer.chat_template = DEFAULT_TEMPLATE
    encode, draw = ChatEncoder(tokenizer), np.random.default_rng(0)
    words = ["red", "blue", "so", "it", "is", "brief"]
    found = []
    for _ in range(count):
        said = [" ".join(draw.choice(words, size=draw.integers(1, 9))) for _ in range(2)]
        found.append(
            encode(
                [
                    {"role": "user", "content": said[0]},
                    {"role": "assistant", "content": said[1]},
                ]
            )
        )
    return found


def packed_samples(found, block_size):
    return [joined(block) for block in pack(found, block_size)]


def test_packed_blocks_hold_every_conversation_whole_and_once(tokenizer):
    found = conversations(tokenizer, 40)
    blocks = pack(found, 64)
    assert sorted(ids for block in blocks for ids, _ in block) == sorted(ids for ids, _ in found)
    sizes = [sum(len(ids) for ids, _ in block) for block in blocks]
    assert max(sizes) <= 64
    assert sum(sizes) / (64 * len(sizes)) > 0.8


def total_loss(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def tiny_gpt2(vocab_size):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_packed_conversations_have_the_loss_and_gradient_of_each_alone(tokenizer, build):
    """Catches attention from one to another, wrong positions and labels across the edges."""
    found = conversations(tokenizer)
    model = build(vocab_size=len(tokenizer)).double().eval()
    model.config.use_cache = False  # as the trainer has it
    alone = sum(
        total_loss(model, collate_conversations([{"input_ids": ids, "labels": labels}]))
        for ids, labels in found
    )
    alone.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for samples in (
        packed_samples(found, 100),
        [{"input_ids": ids, "labels": labels} for ids, labels in found],
    ):
        model.zero_grad()
        batch = collate_conversations(samples)
        assert batch["input_ids"].shape[0] > 1
        assert (batch["labels"] == -100).any()
        loss = total_loss(model, batch)
        loss.backward()
        assert loss.item() == pytest.approx(alone.item(), rel=1e-10)
        for parameter, expected in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-10)


def test_packing_is_refused_for_a_model_without_positions():
    model = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match="packing=True with BloomForCausalLM"):
        job._check_packing(model)
    job._check_packing(tiny_llama())


def test_positions_begin_again_in_the_padding():
    batch = collate_conversations(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]},
            {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [0, 1]},
        ],
        pad_token_id=9,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 6, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    assert "attention_mask" not in batch


def test_padded_samples_have_a_mask():
    batch = collate_conversations(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [-100]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
