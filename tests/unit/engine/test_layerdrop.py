"""Models that skip layers by chance, refused at stage 3."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dstrain.core.errors import ModelError
from dstrain.engine.model_checks.layerdrop import check_layerdrop


def test_models_that_keep_ranks_in_step_are_not_refused() -> None:
    """Wav2Vec2's layers ask for stage 3; its adapter does not, nor does anything of Whisper."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2Model,
        WhisperConfig,
        WhisperForConditionalGeneration,
    )

    def wav2vec2(**settings: object) -> nn.Module:
        config = Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            layerdrop=0.2, **settings,
        )  # fmt: skip
        return Wav2Vec2Model(config)

    whisper = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64,
        decoder_layerdrop=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        check_layerdrop(wav2vec2(), leaves=())
        adapted = wav2vec2(add_adapter=True)
        model = WhisperForConditionalGeneration(whisper)
    with pytest.raises(ModelError, match=r"config\.layerdrop=0\.2 of Wav2Vec2Adapter"):
        check_layerdrop(adapted, leaves=())
    with pytest.raises(ModelError, match=r"config\.decoder_layerdrop=0\.1 of WhisperDecoder"):
        check_layerdrop(model, leaves=())
    check_layerdrop(model, leaves=("WhisperDecoder",))
    whisper.decoder_layerdrop = 0.0
    model.model.decoder.layerdrop = 0.0
    check_layerdrop(model, leaves=())
