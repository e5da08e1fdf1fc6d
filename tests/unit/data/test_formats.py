"""Number formats of a batch: what a model computes with is cast, what its loss compares is not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dstrain.core.errors import ModelError
from dstrain.data import InputFormats
from tests.models import RegressionModel

LABEL = 1004665.0  # in bf16 it would be 1003520
FORMATS = InputFormats(RegressionModel(), ["labels"])


def test_labels_keep_their_format_and_what_goes_into_layers_does_not():
    given: dict[str, Any] = {
        "x": torch.zeros(2, 8),
        "ids": torch.tensor([2049]),
        "labels": torch.tensor([LABEL]),
        "class_labels": torch.tensor([LABEL], dtype=torch.float64),  # in no signature
        "mask_labels": [{"boxes": torch.zeros(3, 4)}],
    }
    moved = FORMATS(given, "cpu", torch.bfloat16)
    assert moved["x"].dtype == torch.bfloat16
    assert moved["ids"].tolist() == [2049]
    assert moved["labels"].tolist() == [LABEL]
    assert moved["class_labels"].dtype == torch.float64
    assert moved["mask_labels"][0]["boxes"].dtype == torch.float32


def test_a_batch_without_names_is_cast_whole():
    moved = FORMATS((torch.zeros(1), torch.tensor([1])), "cpu", torch.bfloat16)
    assert [t.dtype for t in moved] == [torch.bfloat16, torch.int64]


LOSSES = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "smooth_l1": functional.smooth_l1_loss,
    "huber": functional.huber_loss,
    "bce_with_logits": functional.binary_cross_entropy_with_logits,
    "bce": lambda x, y: functional.binary_cross_entropy(x.sigmoid(), y),
    "cross_entropy": lambda x, y: functional.cross_entropy(x, y.softmax(-1)),
    "kl_div": lambda x, y: functional.kl_div(
        x.log_softmax(-1), y.softmax(-1), reduction="batchmean"
    ),
    "cdist": lambda x, y: torch.cdist(x, y, p=1).mean(),
    "module": nn.MSELoss(),
    "by_name": lambda x, y: functional.mse_loss(input=x, target=y, reduction="sum"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_labels_themselves(name, dtype):
    """The loss and its gradient, as if the predictions were in the labels' format."""
    draw = torch.Generator().manual_seed(0)
    predictions = torch.randn(4, 3, generator=draw).to(dtype).requires_grad_()
    labels = torch.rand(4, 3, generator=draw)
    with FORMATS.computing_loss({"labels": labels}, dtype):
        loss = LOSSES[name](predictions, labels)
    (gradient,) = torch.autograd.grad(loss, predictions)
    wide = predictions.detach().float().requires_grad_()
    expected = LOSSES[name](wide, labels)
    (right,) = torch.autograd.grad(expected, wide)
    # The sigmoid and softmax before the loss are in 16 bits, as the predictions are.
    before = name in ("bce", "kl_div")
    torch.testing.assert_close(loss, expected, rtol=1e-2 if before else 1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.float(), right, rtol=1e-2, atol=1e-3)
    assert gradient.dtype == dtype


def test_losses_of_one_format_are_left_alone():
    """A model in 16 bits whose labels the collator gives so, and one in fp32."""
    for dtype in (torch.bfloat16, torch.float32):
        labels = torch.rand(3).to(dtype)
        with FORMATS.computing_loss({"labels": labels}, dtype):
            assert functional.mse_loss(torch.zeros(3, dtype=dtype), labels).dtype == dtype


def test_labels_that_go_into_a_layer_are_an_error_that_says_so():
    labels = torch.rand(2, 8)
    with (
        pytest.raises(ModelError, match=r"bfloat16, and labels is in float32") as raised,
        FORMATS.computing_loss({"labels": labels}, torch.bfloat16),
    ):
        nn.Linear(8, 1, dtype=torch.bfloat16)(labels)
    assert "predictions.float()" in str(raised.value)


def test_other_errors_of_a_model_stay_what_they_are():
    with (
        pytest.raises(RuntimeError, match="shapes"),
        FORMATS.computing_loss({"labels": torch.rand(2, 3)}, torch.bfloat16),
    ):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_a_column_that_loses_whole_numbers_is_named_once(caplog):
    formats = InputFormats(RegressionModel(), ["labels"])
    pixels = torch.linspace(-3, 3, 50)
    batch = {
        "times": torch.tensor([0.0, 1.7e9 + 123]),
        "pixels": pixels,
        "labels": torch.tensor([LABEL]),
        "gaps": torch.tensor([float("nan"), float("inf"), 1.0]),
    }
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        for _ in range(2):
            formats(batch, "cpu", torch.bfloat16)
    (record,) = caplog.records
    assert record.message.startswith("times is rounded to bfloat16")
    assert "1700000128.0 becomes 1702887424.0" in record.message
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        InputFormats(RegressionModel(), [])({"x": torch.tensor([7e4])}, "cpu", torch.float16)
        InputFormats(RegressionModel(), [])({"x": torch.tensor([7e4])}, "cpu", torch.float32)
    assert [r.message.split(" (")[0] for r in caplog.records] == [
        "x is rounded to float16, the model's format: 70000.0 becomes inf."
    ]


def tiny_speecht5() -> Any:
    from transformers import SpeechT5Config, SpeechT5ForTextToSpeech

    config = SpeechT5Config(
        vocab_size=64,
        hidden_size=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        speech_decoder_prenet_units=16,
        speech_decoder_postnet_units=16,
        speaker_embedding_dim=8,
        reduction_factor=2,
        conv_dim=(16,),
        conv_stride=(2,),
        conv_kernel=(4,),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        use_guided_attention_loss=False,
    )
    return SpeechT5ForTextToSpeech(config)


def test_labels_that_a_family_feeds_into_its_layers_are_cast_and_that_is_said(caplog):
    """SpeechT5 reads its own spectrogram, one step back."""
    torch.manual_seed(0)
    model = tiny_speecht5().to(torch.bfloat16)
    formats = InputFormats(model, ["labels", "stop_labels"])
    batch = {
        "input_ids": torch.randint(3, 60, (2, 8)),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "decoder_attention_mask": torch.ones(2, 10, dtype=torch.int64),
        "labels": torch.randn(2, 10, 8),
        "speaker_embeddings": torch.randn(2, 8),
    }
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        moved = formats(batch, "cpu", torch.bfloat16)
    assert "SpeechT5ForTextToSpeech feeds labels into its layers" in caplog.text
    with formats.computing_loss(moved, torch.bfloat16):
        assert model(**moved).loss.isfinite()
