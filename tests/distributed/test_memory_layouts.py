"""Parameters that lie in memory in another order, or share it: trained as by torch, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.runs import STAGES, losses, whole_weights
from tests.distributed.test_formats import by_hand, trainer_of
from tests.models import SEED


class Laid(nn.Module):
    """Weights that are transposed, columns of one tensor, and a convolution in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(SEED)
        self.transposed = nn.Parameter(torch.randn(6, 4, generator=draw).t())
        columns = torch.randn(6, 12, generator=draw)
        self.left = nn.Parameter(columns[:, :6])
        self.right = nn.Parameter(columns[:, 6:])
        convolution = nn.Conv2d(2, 3, 1)
        convolution.weight.data = torch.randn(3, 2, 1, 1, generator=draw)
        convolution.bias.data.zero_()
        self.convolution = convolution.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(x @ self.transposed)
        hidden = torch.tanh(hidden @ self.left) * torch.sigmoid(hidden @ self.right)
        seen = self.convolution(hidden.view(-1, 2, 3, 1))
        return {"loss": nn.functional.mse_loss(seen.mean(dim=(1, 2, 3)), labels)}


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_in_another_order_train_as_in_torch(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """And are saved, and go on from a checkpoint."""
    from safetensors.torch import load_file

    model = Laid()
    assert not all(p.is_contiguous() for p in model.parameters())
    trainer = trainer_of(tmp_path, model, stage)
    trainer.train()
    assert losses(trainer) == pytest.approx(by_hand(Laid()), rel=1e-5)
    weights = whole_weights(trainer)
    trainer.save_model()
    trainer.close()
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in weights.items())
    again = trainer_of(tmp_path, Laid(), stage)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(weights[n], w) for n, w in whole_weights(again).items())
    again.close()


class Shared(Laid):
    """Two parameters over the same memory, one of them transposed or a part of it."""

    def __init__(self, view: Any, *, trains: bool = True) -> None:
        super().__init__()
        self.other = nn.Parameter(view(self.left.data), requires_grad=trains)


VIEWS = {"all": lambda t: t, "transposed": lambda t: t.t(), "a row": lambda t: t[1]}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("view", VIEWS)
def test_two_parameters_over_the_same_memory_are_refused(view: str, tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    for stage, trains in ((1, True), (2, False), (3, True)):
        model = Shared(VIEWS[view], trains=trains)
        with pytest.raises(ModelError, match="left and other share memory"):
            trainer_of(tmp_path, model, stage)


@pytest.mark.ranks(2)
def test_parameters_beside_each_other_or_registered_twice_share_nothing(tmp_path: Path) -> None:
    model = Laid()
    model.twice = model.left
    trainer_of(tmp_path, model, 2).close()


class Tied(nn.Module):
    """An autoencoder whose decoder is the transposed encoder, by its values alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight.data = self.encoder.weight.data.t()


@pytest.mark.ranks(2)
def test_weights_that_are_tied_by_their_values_are_refused_at_every_stage(tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    for stage in STAGES:
        with pytest.raises(ModelError, match=r"encoder.weight and decoder.weight share memory"):
            trainer_of(tmp_path, Tied(), stage)


class Table(nn.Module):
    """An embedding of a kind that cannot be trained."""

    def __init__(self, table: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.table, self.layer = table, layer


@pytest.mark.ranks(2)
def test_sparse_gradients_and_lazy_layers_are_refused(tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    for stage in (0, 2, 3):
        with pytest.raises(ModelError, match="table: sparse=True"):
            trainer_of(tmp_path, Table(nn.EmbeddingBag(4, 4, sparse=True), nn.Linear(4, 1)), stage)
        with pytest.raises(ModelError, match=r"parameters without a size: layer.weight"):
            trainer_of(tmp_path, Table(nn.Embedding(4, 4), nn.LazyLinear(1)), stage)
