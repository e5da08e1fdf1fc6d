"""What modules keep outside of parameters and buffers, as a checkpoint holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dstrain.checkpoint.codec import is_plain
from dstrain.checkpoint.extra_state import extra_states, put_extra_states
from dstrain.core.errors import CheckpointError


class Keeps(nn.Module):
    """Has any extra state."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state["n"]


@pytest.mark.parametrize(
    "state",
    [
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2).to_sparse(),
        np.array(["text"]),
        np.array([object()]),
        object(),
        {"deep": [torch.ones(1, dtype=torch.complex64)]},
    ],
    ids=["complex", "float8", "sparse", "strings", "objects", "object", "inside"],
)
def test_what_could_not_be_read_again_is_not_written(state: Any):
    assert not is_plain(state)
    plain, lost = extra_states(nn.Sequential(Keeps(state), Keeps({"n": 1})))
    assert plain == {"1": {"n": 1}}
    assert lost == ["0"]


def test_a_state_that_a_module_cannot_take_up_is_one_error():
    model = nn.Sequential(Keeps(None))
    put_extra_states(model, {"0": {"n": 3}})
    assert model[0].state == 3
    with pytest.raises(CheckpointError, match="the module 0 cannot take up"):
        put_extra_states(model, {"0": {"m": 3}})
    with pytest.raises(CheckpointError, match="it has none any more"):
        put_extra_states(model, {"1": {"n": 3}})
