"""JSON lines read from spans of a file: each line once, wherever the cuts are."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dstrain.core.errors import DataError
from dstrain.tasks.common import lines
from dstrain.tasks.common.lines import read_texts, spans_of, stream_lines


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("shard_bytes", [1, 7, 40, 1000])
def test_every_line_is_read_once(tmp_path, monkeypatch, end, shard_bytes):
    monkeypatch.setattr(lines, "SHARD_BYTES", shard_bytes)
    draw = random.Random(shard_bytes)
    texts = ["é" * draw.randint(0, 30) for _ in range(40)]
    files = []
    for part in (texts[:25], texts[25:]):
        files.append(str(tmp_path / f"{len(files)}.jsonl"))
        rows = [json.dumps({"a": text, "n": 3}, ensure_ascii=len(text) > 9) for text in part]
        rows[3:3] = ["", "  "]
        text = (end or "\n").join(rows) + end
        Path(files[-1]).write_text(text, encoding="utf-8", newline="")
    stream = stream_lines(files, ["a", "b"])
    assert stream is not None
    assert list(stream) == [{"a": text, "b": None} for text in texts]
    assert stream.num_shards == sum(-(-Path(f).stat().st_size // shard_bytes) for f in files)


@pytest.mark.parametrize("text", ['[{"a": "x"}]', '{\n"a": "x"}', "", "\n\n", '"x"', "x"])
def test_files_that_are_not_like_that(tmp_path, text):
    (tmp_path / "a.json").write_text('{"a": "x"}\n')
    (tmp_path / "b.json").write_text(text)
    assert stream_lines([str(tmp_path / name) for name in ("a.json", "b.json")], ["a"]) is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 of .*bad.jsonl is not JSON"),
        ("[1]", "line 2 of .* is not a JSON object"),
        ('{"a": 5}', "'a' of line 2 of .* holds int"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": "x"}\n' + line + "\n")
    rows = read_texts(spans_of(str(path)), ["a"])
    assert next(rows) == {"a": "x"}
    with pytest.raises(DataError, match=problem):
        next(rows)
    later = problem.replace("line 2 of", "the line at byte 11 of")
    with pytest.raises(DataError, match=later):
        next(read_texts([(str(path), 11, path.stat().st_size)], ["a"]))
