"""Text of the causal language model task: errors of arguments and of data."""

import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, HfArgumentParser

from dstrain.core.errors import DataError
from dstrain.tasks.causal_lm import sources
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.prepare import prepare
from dstrain.tasks.causal_lm.sources import load_documents
from tests.unit.tasks.causal_lm.text.corpus import prepare_tokenizer, texts_of, write_rows

pytestmark = pytest.mark.usefixtures("cache")


def message(**kwargs):
    """Return the error of reading the data that the arguments name."""
    with pytest.raises(DataError) as caught:
        load_documents(DataArguments(**kwargs))
    return str(caught.value)


def test_arguments_parse_from_the_command_line():
    flags = ["--train_file", "a.txt", "--block_size", "64", "--streaming", "--validation_split"]
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(flags[:-1])
    assert (args.train_file, args.block_size, args.streaming) == ("a.txt", 64, True)
    assert args.max_train_samples is None


def test_arguments_import_no_torch():
    code = (
        "import sys, importlib.util\n"
        "path = 'dstrain/tasks/causal_lm/arguments.py'\n"
        "spec = importlib.util.spec_from_file_location('arguments', path)\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['arguments'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print([name for name in ('torch', 'datasets', 'transformers') if name in sys.modules])"
    )
    root = Path(__file__).parents[5]
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert found.stdout.strip() == "[]"


def test_all_illegal_arguments_come_at_once():
    with pytest.raises(DataError) as caught:
        DataArguments(
            train_file="a.txt",
            dataset_name="b",
            validation_file="c.txt",
            validation_split="test",
            block_size=1,
            validation_percentage=100,
            max_train_samples=0,
            vocab_size=100,
        )
    text = str(caught.value)
    for flag in (
        "--train_file a.txt and --dataset_name b",
        "--validation_file c.txt and --validation_split test",
        "--block_size 1",
        "--validation_percentage 100",
        "--max_train_samples 0",
        "--vocab_size 100",
    ):
        assert flag in text
    assert len(caught.value.problems) == 6


def test_parts_of_a_dataset_need_its_name():
    with pytest.raises(DataError) as caught:
        DataArguments(train_split="train[:1%]", dataset_config_name="c", validation_split="v")
    assert len(caught.value.problems) == 3


def test_missing_file(tmp_path):
    text = message(train_file=str(tmp_path / "absent.txt"))
    assert "absent.txt does not exist" in text
    assert "--train_file" in text
    (tmp_path / "a.txt").write_text("words\nwords\n")
    text = message(train_file=str(tmp_path / "a.txt"), validation_file=str(tmp_path / "absent"))
    assert "--validation_file" in text


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    text = message(train_file=str(tmp_path / "a.docx"))
    assert "'.docx'" in text
    assert ".jsonl" in text


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.json"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_text("")
    assert "holds no text" in message(train_file=str(tmp_path / name))


def test_blank_text_file_and_blank_validation(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n\t\n" * 100)
    assert "holds no text" in message(train_file=str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("words\nwords\n")
    text = message(train_file=str(tmp_path / "b.txt"), validation_file=str(tmp_path / "a.txt"))
    assert "--validation_file" in text


def test_table_without_rows(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "holds no text" in message(train_file=str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["words"]}), tmp_path / "b.parquet")
    assert texts_of(load_documents(DataArguments(train_file=str(tmp_path))).train) == ["words"]


def test_file_that_is_no_table(tmp_path):
    (tmp_path / "a.parquet").write_text("text, not parquet")
    assert "could not be read" in message(train_file=str(tmp_path / "a.parquet"))


def test_folder_without_text(tmp_path):
    (tmp_path / "only").mkdir()
    assert "is a folder without files" in message(train_file=str(tmp_path / "only"))
    (tmp_path / "only" / ".hidden.txt").write_text("words")
    assert "hidden files do not count" in message(train_file=str(tmp_path / "only"))
    (tmp_path / "only" / "image.png").write_bytes(b"\x89PNG\0")
    assert "1 are not readable UTF-8" in message(train_file=str(tmp_path / "only"))


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_column(tmp_path, streaming):
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b"], column="texts")
    text = message(train_file=path, streaming=streaming)
    assert "no column 'text'" in text
    assert "'texts', 'n'" in text
    assert "give --text_column texts" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_column_that_is_not_text(tmp_path, streaming):
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b"])
    assert "int64" in message(train_file=path, text_column="n", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_blank(tmp_path, streaming):
    path = write_rows(tmp_path / "rows.jsonl", ["", " \n"])
    text = message(train_file=path, streaming=streaming)
    assert "holds no text" in text
    assert "white space in every row" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_malformed_line_is_named(tmp_path, streaming):
    path = Path(write_rows(tmp_path / "rows.jsonl", ["a"] * 20))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:12], '{"text": oops}\n', *lines[12:]]))
    text = message(train_file=str(path), streaming=streaming)
    assert f"line 13 of {path}" in text


def test_text_file_in_another_encoding(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"words\n" * 10 + "caf\u00e9\n".encode("latin-1") + b"words\n" * 10)
    text = message(train_file=str(path))
    assert "not UTF-8" in text
    assert "byte 63" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_that_cannot_be_loaded(tmp_path, streaming):
    name = str(tmp_path / "absent" / "dataset")
    text = message(dataset_name=name, streaming=streaming)
    assert f"--dataset_name {name} could not be read" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_split(tmp_path, streaming):
    write_rows(tmp_path / "train.jsonl", ["first", "second"])
    text = message(dataset_name=str(tmp_path), validation_split="dev", streaming=streaming)
    assert "dev" in text
    assert "['train']" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_than_two_tokens(tokenizer, streaming):
    rows = datasets.Dataset.from_dict({"text": [""]})
    documents = sources.Documents(
        train=rows.to_iterable_dataset() if streaming else rows,
        validation=None,
        description="",
        train_fingerprint="x",
    )
    with pytest.raises(DataError, match="train text has fewer than 2 tokens"):
        prepare(documents, tokenizer, DataArguments())


def test_tokenizer_without_eos(tokenizer, tmp_path, folder):
    tokenizer.save_pretrained(tmp_path)
    without = AutoTokenizer.from_pretrained(str(tmp_path))
    without.eos_token = None
    args = DataArguments(train_file=str(folder))
    with pytest.raises(DataError, match="no EOS"):
        prepare(load_documents(args), without, args)


def test_tokenizer_that_cannot_be_loaded(folder, tmp_path):
    args = DataArguments(train_file=str(folder), tokenizer_name=str(tmp_path / "absent"))
    with pytest.raises(DataError, match="could not be loaded"):
        prepare_tokenizer(load_documents(args), args)


def test_cache_that_cannot_be_written(tmp_path, tokenizer, folder):
    (tmp_path / "file").write_text("in the way")
    args = DataArguments(train_file=str(folder))
    with pytest.raises(DataError, match="cannot be written"):
        prepare(load_documents(args), tokenizer, args, cache_dir=tmp_path / "file" / "cache")
