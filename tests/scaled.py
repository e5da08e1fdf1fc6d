"""A llama with parameters of shape (), for tests of what has no dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.models import SEED, tiny_llama_config

SCALE, SHIFT, HEAT = 0.75, 0.25, 1.5
SCALARS = ("scale", "shift", "heat")


class ScaledLlamaForCausalLM(LlamaForCausalLM):
    """A llama whose logits go through ``logits * scale * heat + shift * logits**2``.

    ``scale`` and ``shift`` are trained, ``heat`` is frozen; all have the shape ().
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(SCALE))
        self.shift = nn.Parameter(torch.tensor(SHIFT))
        self.heat = nn.Parameter(torch.tensor(HEAT), requires_grad=False)

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        assert [p.shape for p in (self.scale, self.shift, self.heat)] == [()] * 3
        logits = output.logits * self.scale * self.heat + self.shift * output.logits.square()
        output.logits = logits
        if labels is not None:
            output.loss = self.loss_function(logits, labels, self.config.vocab_size)
        return output


def scaled_llama_config() -> Any:
    """Return the config of ``scaled_llama``."""
    return tiny_llama_config(hidden_size=32, intermediate_size=32, num_hidden_layers=1)


def scaled_llama() -> ScaledLlamaForCausalLM:
    """Return one with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ScaledLlamaForCausalLM(scaled_llama_config())
