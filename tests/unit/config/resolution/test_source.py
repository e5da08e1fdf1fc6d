"""Where the config comes from: a dict, JSON text, a file or a preset."""

from __future__ import annotations

import base64
import json

import pytest

from tests.unit.config.resolution.resolving import (
    problems_of,
    resolved,
)

# --- where the config comes from -----------------------------------------------------------------


def test_json_text_path_and_dict_of_one_config_resolve_alike(tmp_path):
    config = {"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    text = json.dumps(config)
    in_base64 = base64.urlsafe_b64encode(text.encode()).decode()
    forms = [config, text, f"  \n{text}", in_base64, str(file), file]
    assert {json.dumps(dict(resolved(form).values)) for form in forms} == {
        json.dumps(dict(resolved(config).values))
    }
    assert str(resolved(str(file)).provenance["gradient_clipping"]) == "your config (ds.json)"


def test_a_path_may_begin_with_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5}')
    assert resolved("~/ds.json").values["gradient_clipping"] == 0.5


@pytest.mark.parametrize("as_file", [True, False])
def test_keys_that_stand_twice_are_refused_at_every_depth(tmp_path, as_file):
    """JSON parsers keep the last without a word."""
    text = '{"bf16": {"enabled": true, "enabled": false}, "gradient_clipping": 1,\n"bf16": {}}'
    (tmp_path / "ds.json").write_text(text)
    texts = problems_of(lambda: resolved(str(tmp_path / "ds.json") if as_file else text))
    assert len(texts) == 2
    assert "'enabled' (values True and False)" in texts[0]
    assert "'bf16'" in texts[1]


def test_json_that_does_not_parse_is_refused_with_line_and_column():
    (text,) = problems_of(lambda: resolved('{"bf16": {"enabled": true},\n "fp16": }'))
    assert "not valid JSON" in text
    assert "line 2, column 10" in text


@pytest.mark.parametrize(
    ("content", "kind"), [("[1, 2]", "list"), ('"zero2"', "str"), ("1", "int")]
)
def test_a_file_without_an_object_is_refused(tmp_path, content, kind):
    file = tmp_path / "ds.json"
    file.write_text(content)
    (text,) = problems_of(lambda: resolved(str(file)))
    assert f"a JSON {kind}" in text
    assert "expected an object {...}" in text


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems_of(lambda: resolved(str(file)))[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero_3", "did you mean 'zero3'"),
        ("zero2offload", "did you mean 'zero2_offload'"),
        ("/nowhere/ds.json", "neither a file nor a preset"),
        ("x" * 5000, "neither a file nor a preset"),
        ("", "neither a file nor a preset"),
    ],
    ids=["zero_3", "zero2offload", "no such file", "very long", "empty"],
)
def test_an_unknown_preset_or_path_is_refused_with_the_presets(name, expected):
    (text,) = problems_of(lambda: resolved(name))
    assert expected in text
    assert "zero2_offload" in text, "the presets are listed"


def test_a_folder_does_not_hide_the_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero1").mkdir()
    assert resolved("zero1").stage == 1
