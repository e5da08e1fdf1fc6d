"""What the installed DeepSpeed's own models declare is what the committed keys say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.config.schema.entry import Alias, Entry, Key, Refused, Section
from dstrain.config.schema.generated import MODELS
from tests.deepspeed_keys import models, section_of, sections
from tests.unit.config.schema.paths import section_at

NOT_IN_A_CONFIG_FILE = {"inference"}  # deepspeed/inference has configs of its own
LIMITS = ("minimum", "maximum", "above", "below")


@pytest.mark.usefixtures("deepspeed")
def test_the_committed_keys_are_those_of_the_installed_models() -> None:
    assert sections() == MODELS, "run `python -m tests.deepspeed_keys`"


def test_every_model_is_read(deepspeed: Any) -> None:
    root = Path(deepspeed.__file__).parent
    declared = set()
    for file in root.rglob("*.py"):
        if file.relative_to(root).parts[0] not in NOT_IN_A_CONFIG_FILE:
            text = file.read_text(encoding="utf-8")
            declared |= set(re.findall(r"^class (\w+)\(DeepSpeedConfigModel\)", text, re.M))
    read = {model.__name__ for top in models().values() for model in _with_inner(top)}
    # The model of the monitors holds a model for each; WeightQuantConfig lives with inference.
    assert declared == (read | {"DeepSpeedMonitorConfig"}) - {"WeightQuantConfig"}


def _with_inner(model: Any) -> Iterator[Any]:
    yield model
    for info in model.model_fields.values():
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if hasattr(part, "model_fields"):
                yield from _with_inner(part)


@pytest.mark.usefixtures("deepspeed")
def test_deprecated_fields_are_other_spellings_of_their_replacement() -> None:
    seen = 0
    for path, model in models().items():
        for name, info in model.model_fields.items():
            extra = info.json_schema_extra or {}
            if not extra.get("deprecated"):
                continue
            seen += 1
            entry = section_at(path).keys[name]
            if not isinstance(entry, Refused):
                assert isinstance(entry, Alias)
                assert entry.to.endswith(extra["new_param"])
    assert seen == 4


def _pairs(generated: Section, ours: Section, path: str) -> Iterator[tuple[str, Entry, Entry]]:
    for name, entry in generated.keys.items():
        yield f"{path}.{name}", entry, ours.keys[name]
        if isinstance(entry, Section):
            inner = ours.keys[name]
            assert isinstance(inner, Section), name
            yield from _pairs(entry, inner, f"{path}.{name}")


@pytest.mark.parametrize("path", MODELS)
def test_what_is_amended_by_hand_contradicts_no_model(path: str) -> None:
    """Limits and choices are added, defaults stay; keys are refused, never forgotten."""
    for where, entry, ours in _pairs(MODELS[path], section_at(path), path):
        if not isinstance(entry, Key) or isinstance(ours, Refused):
            continue
        assert isinstance(ours, Key), where
        assert ours.default == entry.default, where
        assert set(entry.types) <= set(ours.types), where
        assert not entry.choices or ours.choices == entry.choices, where
        for limit in LIMITS:
            assert getattr(entry, limit) in (None, getattr(ours, limit)), where


def test_a_change_of_a_model_is_a_difference() -> None:
    from pydantic import BaseModel, Field

    class Before(BaseModel):
        size: int = Field(4, ge=0)
        mode: str = "fast"

    class After(BaseModel):
        size: int = Field(8, ge=1)
        names: list[str] = []

    before = section_of(Before, "block")
    assert before == Section({"size": Key((int,), 4, minimum=0), "mode": Key((str,), "fast")})
    assert section_of(After, "block").keys == {
        "size": Key((int,), 8, minimum=1),
        "names": Key((list,), [], items=Key((str,))),
    }
