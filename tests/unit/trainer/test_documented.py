"""Every documented name of ``Trainer`` and ``Seq2SeqTrainer`` is here and takes what it should."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import dstrain
from dstrain.trainer.overrides import ELSEWHERE, ignored_overrides

REFERENCE = (
    Path(__file__).resolve().parents[4]
    / "shared"
    / "reference"
    / "trainer-and-training-arguments.txt"
)
# Names and defaults of the reference document's signatures; where it shows none, how it begins.
DOCUMENTED: dict[str, Any] = json.loads(
    Path(__file__).with_name("documented_trainer.json").read_text()
)
METHODS = [(cls, name) for cls, entry in DOCUMENTED.items() for name in entry["methods"]]


def class_named(name: str) -> type[Any]:
    return getattr(dstrain, name)


def test_the_document_has_40_methods_and_5_attributes():
    """Catches a data file that lost some of them."""
    trainer = DOCUMENTED["Trainer"]
    assert len(trainer["methods"]) == 40
    assert trainer["attributes"] == [
        "model",
        "model_wrapped",
        "is_model_parallel",
        "place_model_on_device",
        "is_in_train",
    ]
    assert list(DOCUMENTED["Seq2SeqTrainer"]["methods"]) == ["evaluate", "predict"]


@pytest.mark.parametrize(("cls", "name"), METHODS)
def test_a_documented_method_takes_what_is_documented(cls, name):
    """By the same names in the same places, with the same defaults."""
    method = getattr(class_named(cls), name)
    documented = DOCUMENTED[cls]["methods"][name].get("signature")
    if documented is None:
        return
    ours = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    named = {n: default for n, default in documented.items() if not n.startswith("*")}
    for (expected, default), found in zip(named.items(), ours, strict=False):
        assert found.name == expected
        assert found.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        required = found.default is inspect.Parameter.empty
        assert required == (default == "<required>") or not required
        if not required and default != "<required>":
            assert found.default == default
    assert len(ours) >= len(named)
    if len(named) < len(documented):
        assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours)


@pytest.mark.parametrize("name", DOCUMENTED["Trainer"]["attributes"])
def test_a_documented_attribute_is_described(name):
    """Whether it has the right value is seen on a trainer: tests/distributed/test_surface.py."""
    cls = class_named("Trainer")
    assert hasattr(cls, name) or re.search(rf"^ +{name}: ", inspect.getdoc(cls) or "", re.M)


@pytest.mark.parametrize("cls", DOCUMENTED)
def test_the_constructor_takes_what_is_documented(cls):
    """By name; the first seven also by position, where all releases agree."""
    parameters = inspect.signature(class_named(cls).__init__).parameters
    for place, (name, default) in enumerate(DOCUMENTED[cls]["constructor"].items()):
        found = parameters.get(name)
        if found is None:  # a subclass that hands everything on
            assert cls != "Trainer"
            continue
        assert found.default == (tuple(default) if isinstance(default, list) else default)
        if place < 5:
            assert list(parameters)[1 + place] == name
    if cls == "Trainer":
        assert list(parameters)[6:8] == ["processing_class", "model_init"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_override_that_nothing_calls_is_refused(name):
    """A subclass written for transformers must not be ignored in part."""
    own = type("Own", (dstrain.Trainer,), {name: lambda self: None})
    assert [problem.what for problem in ignored_overrides(own)] == [f"Own overrides {name}"]


@pytest.mark.parametrize("name", ["Trainer", "Seq2SeqTrainer"])
def test_every_method_of_the_installed_trainer_is_here_or_refused(name):
    """Private ones too: what nothing calls here is refused where a subclass overrides it.

    Catches a method that a newer transformers has added.
    """
    installed = getattr(importlib.import_module("transformers"), name)
    methods = {n for n in dir(installed) if callable(getattr(installed, n)) and n[:2] != "__"}
    missing = {n for n in methods if not hasattr(class_named(name), n)}
    assert missing <= set(ELSEWHERE)
    for method in missing:
        with pytest.raises(AttributeError, match=rf"no attribute '{method}': ."):
            getattr(object.__new__(class_named(name)), method)


def test_no_method_of_ours_is_among_the_refused():
    assert ignored_overrides(dstrain.Trainer) == []


def test_arguments_by_position_that_releases_order_differently_are_refused():
    """The eighth is compute_metrics in some releases and compute_loss_func in others."""
    (problem,) = ignored_overrides(dstrain.Trainer, (print,))
    assert problem.what == "1 arguments of Trainer by position, after model_init"


def test_the_data_file_is_what_the_reference_document_says():
    if not REFERENCE.is_file():
        pytest.skip("the reference documents are not beside this checkout")
    lines = REFERENCE.read_text().splitlines()
    for cls, entry in DOCUMENTED.items():
        start = lines.index(f"class transformers.{cls}")
        end = next(
            (i for i in range(start + 1, len(lines)) if lines[i].startswith("class ")), len(lines)
        )
        section = lines[start:end]
        assert _signature(section[1]) == entry["constructor"]
        shown = {
            section[i - 1]: _signature(line)
            for i, line in enumerate(section)
            if line.startswith("< source >") and re.fullmatch(r"\w+", section[i - 1])
        }
        methods = entry["methods"]
        assert shown == {n: m["signature"] for n, m in methods.items() if "signature" in m}
        for method in methods.values():
            assert "signature" in method or any(s.startswith(method["says"]) for s in section)
        assert [
            m.group(1)
            for line in section[: section.index("add_callback") if cls == "Trainer" else 2]
            if (m := re.match(r"- (\w+) — ", line)) and m.group(1) != "tokenizer"
        ] == entry["attributes"]


def _signature(line: str) -> dict[str, Any]:
    """Return names and defaults in ``< source >( name: Type = default ... )``."""
    body = line.partition("(")[2].partition("→")[0].rpartition(")")[0].strip()
    found = {}
    pattern = r"(\*{0,2}\w+)(?:: [\w\[\]\".]+)?(?: = (\([^)]*\)|'[^']*'|\S+))?(?=\s|$)"
    for match in re.finditer(pattern, body):
        name, text = match.groups()
        value = "<required>" if text is None else ast.literal_eval(text)
        found[name] = list(value) if isinstance(value, tuple) else value
    return found
