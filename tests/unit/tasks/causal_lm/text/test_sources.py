"""Sources of text: the standard library, folders, files, rows, datasets; and their split."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.tasks.causal_lm import text_files
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.sources import load_documents
from dstrain.tasks.common import origin
from dstrain.tasks.common import rows as rows_module
from tests.unit.tasks.causal_lm.text.corpus import sample_text, texts_of, write_rows

pytestmark = pytest.mark.usefixtures("cache")


def test_standard_library_is_the_default():
    documents = load_documents(DataArguments())
    assert documents.train_bytes > 8_000_000
    assert 100_000 < documents.validation_bytes < documents.train_bytes / 5
    assert "standard library" in documents.description
    assert not set(texts_of(documents.validation)) & set(texts_of(documents.train))


def test_folder_is_split_by_file_and_the_split_is_stable(folder, tmp_path):
    documents = load_documents(DataArguments(train_file=str(folder), validation_percentage=20))
    train, held_out = texts_of(documents.train), texts_of(documents.validation)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(path.read_text() for path in folder.rglob("*.py"))

    # Elsewhere, and with a file more: nothing changes sides.
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    (elsewhere / "new.py").write_text("new = 1\n")
    moved = load_documents(DataArguments(train_file=str(elsewhere), validation_percentage=20))
    assert set(texts_of(moved.validation)) - {"new = 1\n"} == set(held_out)


def test_split_does_not_depend_on_the_process_or_machine():
    # The first 16 digits of: printf a/b.py | sha256sum
    assert origin.unit_hash("a/b.py") == 0xD9584A802A2864F0 / 2**64


def test_folder_leaves_out_what_is_not_text(folder):
    (folder / "image.bin").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.py").write_bytes("# é\n".encode("latin-1") * 3)
    (folder / "late.py").write_bytes(b"# ok\n" * 20_000 + b"\xff\n")
    (folder / "empty.py").write_text("")
    (folder / ".hidden.py").write_text("hidden = 1\n")
    documents = load_documents(DataArguments(train_file=str(folder)))
    texts = texts_of(documents.train) + texts_of(documents.validation)
    assert len(texts) == 40
    assert "2 files are not UTF-8 text" in documents.description


def test_text_file_keeps_its_tail_for_validation(tmp_path):
    lines = [f"line {index}\r\n" for index in range(1000)]
    path = tmp_path / "book.txt"
    path.write_text("".join(lines), newline="")
    documents = load_documents(DataArguments(train_file=str(path), validation_percentage=10))
    train, held_out = texts_of(documents.train), texts_of(documents.validation)
    assert "".join(train + held_out) == "".join(lines)
    assert held_out[0].startswith("line ")
    assert documents.validation_bytes / path.stat().st_size == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_large_files_become_pieces_that_join_to_the_file(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(text_files, "PIECE_BYTES", 64)
    monkeypatch.setattr(text_files, "SHARD_BYTES", 300)
    text = separator.join(["né漢🎉"] * 200)
    path = tmp_path / "large.txt"
    path.write_text(text, newline="")
    documents = load_documents(DataArguments(train_file=str(path)))
    pieces = texts_of(documents.train) + texts_of(documents.validation)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 64
    stream = load_documents(DataArguments(train_file=str(path), streaming=True)).train
    assert texts_of(stream) == texts_of(documents.train)
    assert stream.num_shards == -(-documents.train_bytes // 300)


def test_of_a_large_file_in_a_folder_what_is_no_text_is_left_out(tmp_path, monkeypatch, caplog):
    """It is not read whole before it is used."""
    monkeypatch.setattr(text_files, "PIECE_BYTES", 64)
    monkeypatch.setattr(text_files, "SHARD_BYTES", 300)
    monkeypatch.setattr("dstrain.tasks.common.files._SNIFF_BYTES", 64)
    lines = [f"line {index:04}\n".encode() for index in range(100)]
    lines[50] = b"l\xefne 0050\n"
    (tmp_path / "large.txt").write_bytes(b"".join(lines))
    (tmp_path / "other.txt").write_text("other")
    documents = load_documents(DataArguments(train_file=str(tmp_path), validation_percentage=0))
    found = "".join(texts_of(documents.train))
    assert found.startswith("line 0000")
    assert "ne 0050" not in found
    assert found.endswith("line 0099\nother")
    assert len(found) > 1000 - 300
    assert "near byte 501" in caplog.text


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "folder of jsonl"])
def test_rows_are_split_by_content(tmp_path, suffix):
    texts = [sample_text(seed, num_lines=2) for seed in range(300)]
    texts += texts[:100] + ["", "  \n", None]  # copies must stay on one side, blanks must go
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), path)
    elif suffix == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif suffix == "jsonl":
        write_rows(path, texts)
    else:
        path.mkdir()
        write_rows(path / "0.jsonl", texts[:200])
        write_rows(path / "1.jsonl", texts[200:])
    documents = load_documents(DataArguments(train_file=str(path), validation_percentage=10))
    train, held_out = texts_of(documents.train), texts_of(documents.validation)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(texts[:-3])
    assert 10 <= len(set(held_out)) <= 60
    assert documents.train.column_names == ["text"]


@pytest.mark.parametrize("texts", [["one"], ["one", "one"], ["one", "two"], ["a", "b", "c"]])
def test_few_rows_leave_something_to_train_on(tmp_path, texts):
    path = write_rows(tmp_path / "few.jsonl", texts)
    documents = load_documents(DataArguments(train_file=path, validation_percentage=50))
    train, held_out = texts_of(documents.train), texts_of(documents.validation)
    assert sorted(train + held_out) == texts
    assert train
    assert bool(held_out) == (len(set(texts)) > 1)


def test_named_validation_is_taken_whole(folder, tmp_path):
    rows = write_rows(tmp_path / "held.jsonl", ["held out", "too"], column="body")
    documents = load_documents(
        DataArguments(train_file=str(folder), validation_file=rows, text_column="body")
    )
    assert texts_of(documents.validation) == ["held out", "too"]
    assert len(documents.train) == 40


def test_dataset_by_name_with_its_splits(tmp_path):
    write_rows(tmp_path / "train.jsonl", ["first", "second"])
    write_rows(tmp_path / "test.jsonl", ["held out"])
    for streaming in (False, True):
        args = DataArguments(
            dataset_name=str(tmp_path), validation_split="test", streaming=streaming
        )
        documents = load_documents(args)
        assert texts_of(documents.train) == ["first", "second"]
        assert texts_of(documents.validation) == ["held out"]
        assert isinstance(documents.train, datasets.IterableDataset) == streaming


def test_stream_holds_out_its_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "STREAM_VALIDATION_DOCUMENTS", 3)
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b", "c", "", "d", "a", "e", "f"])
    documents = load_documents(DataArguments(train_file=path, streaming=True))
    assert texts_of(documents.validation) == ["a", "b", "c"]
    assert texts_of(documents.train) == ["d", "e", "f"]  # the copy of a row held out went too

    short = write_rows(tmp_path / "short.jsonl", ["a", "b", "c", "d"])
    documents = load_documents(
        DataArguments(train_file=short, streaming=True, validation_percentage=50)
    )
    assert texts_of(documents.validation) == ["a", "b"]
    assert texts_of(documents.train) == ["c", "d"]
