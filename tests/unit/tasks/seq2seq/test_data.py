"""Data and metrics of the sequence-to-sequence task: pairs, splits, tokens, ROUGE-L, errors."""

import dataclasses
import json
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, EvalPrediction

from dstrain.core.errors import ConfigError, DataError
from dstrain.data import Resumable
from dstrain.tasks.common import files
from dstrain.tasks.common.files import library_origin
from dstrain.tasks.common.tokenizer import train_tokenizer
from dstrain.tasks.seq2seq import library
from dstrain.tasks.seq2seq.arguments import DataArguments, ModelArguments
from dstrain.tasks.seq2seq.metrics import (
    GenerationMetrics,
    lcs_length,
    rouge_l,
    text_metrics,
    words_of,
)
from dstrain.tasks.seq2seq.prepare import check_tokenizer, prepare
from dstrain.tasks.seq2seq.sources import load_pairs

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["return self value index name"] * 9, 300, folder, adds_eos=True)
    return AutoTokenizer.from_pretrained(str(folder))


# --- functions of the standard library ---------------------------------------------------------


def test_documented_functions_and_their_first_lines():
    text = textwrap.dedent('''
        def documented(a):
            """Say what it does.

            And more of it.
            """
            # a comment stays
            if a:
                return 1
            return 2

        class Class:
            async def method(self):
                """
                  The first line with text
                in it."""
                return "\x0c"  # a form feed is no line
            def plain(self):
                return 1
            def only(self): "One line"; return 1
            def bare(self):
                """Nothing but this."""

        def outer():
            """Outer."""
            def inner():
                """Inner."""
                return 0
            return inner
    ''')
    inner = 'def inner():\n    """Inner."""\n    return 0\nreturn inner'
    assert [(pair["source"], pair["target"]) for pair in library.functions_of(text)] == [
        ("# a comment stays\nif a:\n    return 1\nreturn 2", "Say what it does."),
        ('return "\x0c"  # a form feed is no line', "The first line with text"),
        (inner, "Outer."),
        ("return 0", "Inner."),
    ]


def test_what_is_no_python_has_no_functions():
    assert library.functions_of("def f(:") == []
    assert library.functions_of("\0") == []


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """Give a standard library of forty modules, some with a function that is in each of them."""
    root = tmp_path / "lib"
    root.mkdir()
    for index in range(40):
        (root / f"module{index}.py").write_text(
            f'def own():\n    """Return {index}."""\n    return {index}\n'
            'def shared():\n    """Close it."""\n    self.close()\n'
        )
    monkeypatch.setattr(files.sysconfig, "get_path", lambda name: str(root))
    return root


def test_the_library_is_split_by_file_and_no_source_is_on_both_sides(small_library, tmp_path):
    pairs = load_pairs(DataArguments(validation_percentage=20))
    train, held_out = set(pairs.train["source"]), set(pairs.validation["source"])
    assert "self.close()" in train
    assert not train & held_out
    assert train | held_out == {"self.close()", *(f"return {i}" for i in range(40))}
    assert 3 <= len(held_out) <= 14
    assert len(pairs.train) == 2 * (len(train) - 1)  # what training repeats stays repeated
    again = load_pairs(DataArguments(validation_percentage=20))
    assert again.validation["source"] == pairs.validation["source"]
    assert again.train_fingerprint == pairs.train_fingerprint


def test_the_real_library_has_thousands_of_pairs():
    origin = library_origin()
    part = next(part for part in origin.parts if part.name == "textwrap.py")
    found = {pair["target"]: pair["source"] for pair in library.read_pairs((part,), ())}
    source = found["Remove any common leading whitespace from every line in `text`."]
    assert source.startswith("# Look for the longest leading string of spaces and tabs common to")
    assert source.endswith("return text")
    assert len(origin.parts) > 300


# --- pairs of the user ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "dataset"])
def test_rows_are_split_by_their_source(tmp_path, suffix):
    rows = [{"code": f"x = {i}", "summary": f"{i}", "n": i} for i in range(199)]
    rows.append({"code": "None", "summary": "NA", "n": 0})
    rows += [row | {"summary": "again"} for row in rows[:50]]
    rows += [{"code": "x", "summary": " ", "n": 0}, {"code": "", "summary": "x", "n": 0}]
    path = tmp_path / f"rows.{suffix}"
    given = {"train_file": str(path)}
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        lines = [f'{row["code"]},"{row["summary"]}",{row["n"]}\n' for row in rows]
        path.write_text("code,summary,n\n" + "".join(lines))
    else:
        if suffix == "dataset":
            path.mkdir()
            given = {"dataset_name": str(path)}
            path /= "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DataArguments(
        **given, source_column="code", target_column="summary", validation_percentage=10
    )
    pairs = load_pairs(args)
    assert pairs.train.column_names == ["source", "target"]
    train, held_out = set(pairs.train["source"]), set(pairs.validation["source"])
    assert not train & held_out
    both = [*pairs.train, *pairs.validation]
    assert sorted((pair["source"], pair["target"]) for pair in both) == sorted(
        (row["code"], row["summary"]) for row in rows[:-2]
    )
    assert 5 <= len(held_out) <= 40


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_holds_out_its_first_rows_and_gives_the_same_samples(tmp_path, suffix, tokenizer):
    """Without copies of what is held out and blank rows; it goes on inside of what was mapped."""
    rows = [{"id": i, "source": f"value {i}", "target": f"index {i}"} for i in range(80)]
    rows += [rows[0], {"id": 80, "source": "name", "target": " "}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DataArguments(train_file=str(path), streaming=True, validation_percentage=5)
    pairs = load_pairs(args)
    expected = [{"source": row["source"], "target": row["target"]} for row in rows[:80]]
    assert list(pairs.validation) == expected[:4]
    assert list(pairs.train) == expected[4:]
    assert "stream: --train_file" in pairs.description
    assert "the first 4 rows" in pairs.description

    encoded = prepare(pairs, tokenizer, args)
    whole = DataArguments(train_file=str(path), validation_percentage=0)
    by_hand = list(prepare(load_pairs(whole), tokenizer, whole).train)
    assert list(encoded.train) == by_hand[4:80]
    assert list(encoded.validation) == by_hand[:4]
    limited = dataclasses.replace(args, max_train_samples=3)
    assert list(prepare(pairs, tokenizer, limited).train) == by_hand[4:7]

    stream = Resumable.of(encoded.train)
    samples = iter(stream.source)
    for _ in range(40):  # eight of the second batch
        next(samples)
    again = Resumable.of(prepare(load_pairs(args), tokenizer, args).train)
    assert again.load(stream.state())
    assert list(again.source) == by_hand[44:80]


def test_functions_are_streamed_by_file(small_library):
    whole, streamed = (load_pairs(DataArguments(streaming=s)) for s in (False, True))
    assert list(streamed.train) == list(whole.train)
    assert list(streamed.validation) == list(whole.validation)


def test_named_validation_is_taken_whole(tmp_path):
    for name in ("train", "held"):
        rows = [{"source": f"{name} {i}", "target": "t"} for i in range(5)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = DataArguments(
        train_file=str(tmp_path / "train.jsonl"), validation_file=str(tmp_path / "held.jsonl")
    )
    pairs = load_pairs(args)
    assert (len(pairs.train), len(pairs.validation)) == (5, 5)
    assert pairs.validation["source"][0] == "held 0"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "words", ["is text without rows", ".csv"]),
        ("a.jsonl", '{"body": "x", "target": "y"}\n', ["no column 'source'", "--source_column"]),
        ("a.jsonl", '{"source": "x", "summary": "y"}\n', ["'target'", "--target_column"]),
        ("a.jsonl", '{"source": "x", "target": 1}\n', ["'target'", "int64", "--target_column"]),
        ("a.jsonl", '{"source": "x", "target": ""}\n', ["holds no text", "'source' or 'target'"]),
    ],
)
def test_data_that_holds_no_pairs(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load_pairs(DataArguments(train_file=str(tmp_path / name)))
    for part in expected:
        assert part in str(caught.value)


def test_all_illegal_arguments_come_at_once():
    with pytest.raises(DataError) as caught:
        DataArguments(
            max_source_length=1,
            max_target_length=0,
            source_column="a",
            target_column="a",
            vocab_size=5,
        )
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="num_samples_shown"):
        ModelArguments(num_samples_shown=-1)


# --- tokens --------------------------------------------------------------------------------------


@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        {"source": "return self", "target": "self"},
        {"source": "value " * 50, "target": "index " * 50},
        {"source": "name", "target": "value index"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_texts_end_with_eos_also_where_they_are_cut(pairs_file, tokenizer, caplog):
    args = DataArguments(
        train_file=pairs_file,
        validation_percentage=0,
        source_prefix="say: ",
        max_source_length=12,
        max_target_length=6,
    )
    with caplog.at_level("INFO"):
        encoded = prepare(load_pairs(args), tokenizer, args)
    assert "train: 1 sources of 3 fill all 12 tokens of max_source_length" in caplog.text
    assert "train: 1 targets of 3 fill all 6 tokens" in caplog.text
    eos = tokenizer.eos_token_id
    for row in encoded.train:
        for ids in (row["input_ids"], row["labels"]):
            assert ids[-1] == eos
            assert eos not in ids[:-1]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert [len(row["input_ids"]) <= 12 for row in encoded.train] == [True] * 3
    assert len(encoded.train[1]["input_ids"]) == 12
    assert len(encoded.train[1]["labels"]) == 6
    texts = tokenizer.batch_decode(list(encoded.train["input_ids"]), skip_special_tokens=True)
    assert texts[0] == "say: return self"
    assert texts[1].startswith("say: value value")


def test_batches_are_padded_to_their_longest_and_labels_with_ignored(pairs_file, tokenizer):
    args = DataArguments(train_file=pairs_file, validation_percentage=0)
    encoded = prepare(load_pairs(args), tokenizer, args)
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(
        [encoded.train[0], encoded.train[2]]
    )
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].shape[1] == max(len(encoded.train[i]["input_ids"]) for i in (0, 2))
    assert ((batch["input_ids"] == pad) == (batch["attention_mask"] == 0)).all()
    for row, index in zip(batch["labels"].tolist(), (0, 2), strict=True):
        labels = encoded.train[index]["labels"]
        assert row == labels + [-100] * (len(row) - len(labels))


def test_encoded_pairs_are_found_again_and_changes_are_seen(pairs_file, tokenizer):
    args = DataArguments(train_file=pairs_file, validation_percentage=0)
    first = prepare(load_pairs(args), tokenizer, args).train.cache_files
    assert prepare(load_pairs(args), tokenizer, args).train.cache_files == first
    for change in ({"max_source_length": 9}, {"source_prefix": "x"}, {"max_target_length": 9}):
        changed = DataArguments(train_file=pairs_file, validation_percentage=0, **change)
        assert prepare(load_pairs(changed), tokenizer, changed).train.cache_files != first


def test_a_tokenizer_that_never_ends_a_target_is_refused(tokenizer, tmp_path):
    check_tokenizer(tokenizer)
    plain = train_tokenizer(["words"], 260, tmp_path / "plain")
    plain.pad_token = None
    with pytest.raises(DataError) as caught:
        check_tokenizer(plain)
    assert len(caught.value.problems) == 2
    assert "does not end texts with EOS" in str(caught.value)


# --- metrics -------------------------------------------------------------------------------------


def table_length(left, right):
    """Compute the table by the textbook recurrence (Lin 2004 cites Cormen et al.)."""
    table = np.zeros((len(left) + 1, len(right) + 1), dtype=int)
    for i, a in enumerate(left, start=1):
        for j, b in enumerate(right, start=1):
            same = table[i - 1, j - 1] + 1
            table[i, j] = same if a == b else max(table[i - 1, j], table[i, j - 1])
    return int(table[-1, -1])


@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcd")))
def test_length_of_the_longest_common_subsequence(left, right):
    assert lcs_length(left, right) == table_length(left, right)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # Lin 2004, section 3.1: LCS of 3 and of 2 words out of 4 and 4.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("Return the value.", "return: the VALUE", 1.0),
        ("a b", "a x b y", 2 * 1.0 * 0.5 / 1.5),
        ("", "words", 0.0),
        ("...", "!!!", 0.0),
        ("größe 長さ", "größe 長さ", 1.0),
    ],
)
def test_rouge_l(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected)
    assert rouge_l(reference, prediction) == pytest.approx(expected)


def test_words_are_letters_and_digits():
    assert words_of("Don't_stop at 3.14!") == ["don", "t", "stop", "at", "3", "14"]


def test_text_metrics_are_means_over_pairs():
    metrics = text_metrics(["a b\n", "x", "c"], ["a b", "y", "C"])
    assert metrics == {"rouge_l": pytest.approx(2 / 3), "exact_match": pytest.approx(1 / 3)}


def test_metrics_of_padded_token_ids(tokenizer):
    """Padding of either kind, the start token and EOS are no text, and no length."""
    texts = ["return self", "value index name"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows)) + 2
    pad = tokenizer.pad_token_id
    predictions = [[pad, *row] + [pad] * (longest - len(row)) for row in rows]
    labels = [row + [-100] * (longest - len(row)) for row in rows]
    predictions[0][-1] = -100
    prediction = EvalPrediction(predictions=np.array(predictions), label_ids=np.array(labels))
    metrics = GenerationMetrics(tokenizer)(prediction)
    assert metrics["rouge_l"] == metrics["exact_match"] == 1.0
    assert metrics["generated_length"] == sum(len(row) - 1 for row in rows) / 2
