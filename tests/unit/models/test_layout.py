"""Groups of tensors that are saved together, and the record of a layout in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.weights import differences, in_files
from tests.families.tiny import build

CONVERTED = [
    "MixtralForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Glm4MoeForCausalLM",
    "Emu3ForConditionalGeneration",
]


def model_of(name: str) -> Any:
    import transformers

    return build(getattr(transformers, name))


def saved_by_groups(groups: list[Any]) -> dict[str, torch.Tensor]:
    """Return what the groups make of the model's own tensors."""
    saved: dict[str, torch.Tensor] = {}
    for group in groups:
        made = group.convert([entry.tensor.detach() for entry in group.entries])
        for planned in group.saved:
            assert tuple(made[planned.name].shape) == planned.shape
            assert made[planned.name].dtype == planned.dtype
        saved |= {name: tensor.contiguous() for name, tensor in made.items()}
    return saved


@pytest.mark.parametrize("name", CONVERTED)
def test_groups_are_saved_as_transformers_does_and_come_back(name: str, tmp_path: Path) -> None:
    """Names, shapes and values; and of the saved tensors the model's own again."""
    from dstrain.models import groups_of

    model = model_of(name)
    groups = groups_of(model)
    saved = saved_by_groups(groups)
    model.save_pretrained(tmp_path)
    assert differences(in_files(tmp_path), saved) == []
    for group in groups:
        back = group.restore({planned.name: saved[planned.name] for planned in group.saved})
        for entry, tensor in zip(group.entries, back, strict=True):
            assert torch.equal(entry.tensor, tensor), entry.name


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_recorded_layout_is_that_of_the_model(name: str, loaded: bool, tmp_path: Path) -> None:
    """Also after a save, which changes the patterns that transformers' conversions are made of."""
    from dstrain.models import groups_of, record_layout, recorded_layout

    model = model_of(name)
    model.save_pretrained(tmp_path)
    if loaded:
        model = type(model).from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    record = json.loads(json.dumps(record_layout(model)))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    layout = recorded_layout(tmp_path, record, shapes)
    planned = [[group.saved for group in groups] for groups in (groups_of(model), layout.groups)]
    assert planned[0] == planned[1]


def test_a_record_knows_the_users_own_names(tmp_path: Path) -> None:
    """``key_mapping`` of ``from_pretrained``: saving goes back to the names of the checkpoint."""
    from safetensors.torch import save_file

    from dstrain.models import groups_of, record_layout, recorded_layout

    model = model_of("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    own = {f"net.{name}": tensor for name, tensor in in_files(tmp_path).items()}
    save_file(own, tmp_path / "model.safetensors", {"format": "pt"})
    model = type(model).from_pretrained(tmp_path, key_mapping={r"^net\.": ""})
    saved = {planned.name for group in groups_of(model) for planned in group.saved}
    model.save_pretrained(tmp_path / "again")
    assert saved == set(in_files(tmp_path / "again"))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    layout = recorded_layout(tmp_path, record_layout(model), shapes)
    assert {planned.name for group in layout.groups for planned in group.saved} == saved


def test_a_model_without_conversions_has_nothing_to_record() -> None:
    from dstrain.models import record_layout

    assert record_layout(model_of("LlamaForCausalLM")) is None
    assert record_layout(torch.nn.Linear(2, 2)) is None
