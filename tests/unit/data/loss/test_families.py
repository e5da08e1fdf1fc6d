"""What the losses of models of transformers are a mean over, read off a forward pass."""

from __future__ import annotations

import logging
import random

import pytest
import torch

from dstrain.data import LossRule
from dstrain.training.loss_terms import LossTerms
from dstrain.training.model_outputs import loss_of
from tests.families.zoo import FAMILIES
from tests.unit.data.loss.losses import BY_SAMPLES, MAIN, SAMPLES, Reader


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - BY_SAMPLES))
def test_the_weighted_mean_of_two_halves_is_the_whole(name: str):
    """For losses and gradients, of halves of any size with ragged targets."""
    reader = Reader(name)
    for seed in range(2):
        rows = list(range(SAMPLES))
        random.Random(seed).shuffle(rows)
        cut = 3 - seed
        loss, gradient = torch.zeros(()), torch.zeros(())
        wholes, totals = reader.parts(rows)
        for half in (rows[:cut], rows[cut:]):
            parts, counts = reader.parts(half)
            weights = [
                1.0 if reader.targets.rule.is_sum else n / max(1, total)
                for n, total in zip(counts, totals, strict=True)
            ]
            kept = [index for index, weight in enumerate(weights) if weight]
            gradients = reader.gradient(parts)
            for index in kept:
                loss = loss + weights[index] * parts[index].detach()
                gradient = gradient + weights[index] * gradients[index]
        whole = reader.gradient(wholes).sum(0)
        assert loss.item() == pytest.approx(wholes.sum().item(), rel=3e-6)
        # Measured: rounding up to 1.2e-5 (dpt, two threads), a wrong weight 4e-3 or more.
        assert torch.linalg.norm(gradient - whole) < 1e-4 * torch.linalg.norm(whole)


@pytest.mark.parametrize("name", sorted(n for n in FAMILIES if LossTerms.of(FAMILIES[n].build())))
def test_the_terms_of_a_loss_add_up_to_the_models_own(name: str):
    family = FAMILIES[name]
    model, rows = family.build().eval(), family.samples(SAMPLES)
    terms, batch = LossTerms.of(model), family.collate(rows)
    assert terms is not None
    with torch.no_grad():
        parts, outputs = terms(model, batch)
        own = loss_of(model(**batch))
    assert parts.sum().item() == pytest.approx(own.item(), rel=1e-6)
    assert "loss" not in outputs or outputs["loss"] is None
    assert len(terms.rule().counts(batch)) == len(parts)


def test_models_whose_rule_cannot_be_read_are_named_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        reader = Reader("two_heads", steps=1)
        assert not reader.targets.settled, "its first samples have labels for one head alone"
        reader.parts(list(range(SAMPLES)))
        reader.targets.agree(MAIN, final=True)
    assert reader.targets.rule == LossRule()
    assert not reader.targets.is_exact
    (record,) = caplog.records
    assert "TwoHeads" in record.message
    assert "weighted by their samples" in record.message
