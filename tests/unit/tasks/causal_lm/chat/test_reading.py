"""Conversations: reading rows and files, errors of rows, samples, streams."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dstrain.core.errors import DataError
from dstrain.core.ranks import Ranks
from dstrain.data import Resumable
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.chat import (
    ChatEncoder,
    pack,
)
from dstrain.tasks.causal_lm.chat_prepare import prepare_chat, set_template
from dstrain.tasks.causal_lm.conversations import load_conversations, messages_in, messages_of
from dstrain.tasks.causal_lm.data import prepare_data
from tests.unit.tasks.causal_lm.chat.messages import AS_MESSAGES, PAIR

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": AS_MESSAGES},
        {"conversations": AS_MESSAGES, "id": 1},
        {
            "conversations": [
                {"from": "human", "value": "Name a colour"},
                {"from": "gpt", "value": "red"},
            ]
        },
        PAIR | {"score": 1.0},
        PAIR | {"messages": None},
    ],
)
def test_shapes_of_a_row(row):
    assert messages_in(row, "line 1 of a.jsonl") == AS_MESSAGES


def with_message(**changes):
    return {"messages": [AS_MESSAGES[0], {**AS_MESSAGES[1], **changes}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], ["line 3 of a.jsonl is not an object", "a list"]),
        ({"text": "x"}, ["line 3 of a.jsonl holds no conversation", "'text'", "'messages'"]),
        ({"messages": []}, ["'messages' in line 3 of a.jsonl is empty"]),
        ({"messages": "hi"}, ["'messages' in line 3 of a.jsonl is a str", "a list of messages"]),
        ({"messages": ["hi"]}, ["message 1 of", "line 3", "is a str", "'role' and 'content'"]),
        (with_message(role="asistant"), ["message 2", "'asistant'", "did you mean 'assistant'?"]),
        (with_message(role=None), ["message 2", "the role None", "system, user, assistant"]),
        (with_message(content=None), ["message 2", "null", "tool calls"]),
        (with_message(content=[{"type": "text"}]), ["message 2", "a list", "text is expected"]),
        (with_message(content=" \n"), ["message 2", "an empty answer"]),
        ({"messages": AS_MESSAGES[:1]}, ["line 3 of a.jsonl has no answer"]),
        ({"messages": AS_MESSAGES[1:]}, ["line 3 of a.jsonl has no answer"]),
        ({"prompt": 1, "completion": "x"}, ["message 1 of line 3 of a.jsonl", "a int ('1')"]),
    ],
)
def test_what_is_wrong_with_a_row(row, expected):
    problem = messages_in(row, "line 3 of a.jsonl")
    for part in expected:
        assert part in str(problem)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_arguments(path, **given):
    return DataArguments(data_format="chat", train_file=str(path), **given)


def test_bad_rows_come_in_one_error_with_their_lines(tmp_path):
    rows = [PAIR, {"messages": []}, PAIR, with_message(role="bot"), {"x": 1}]
    with pytest.raises(DataError) as caught:
        load_conversations(chat_arguments(write_jsonl(tmp_path / "a.jsonl", rows)))
    lines = [int(p.what.split("line ")[1].split(" ")[0]) for p in caught.value.problems]
    assert lines == [2, 4, 5]
    assert str(tmp_path / "a.jsonl") in str(caught.value)


def test_broken_json_names_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + '\n\n{"prompt": \n')
    with pytest.raises(DataError, match=r"line 3 of .*a\.jsonl is not JSON"):
        load_conversations(chat_arguments(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_files_are_read_and_split_by_content(tmp_path, suffix):
    rows = [{"prompt": f"Name colour {i}", "completion": f"{i}"} for i in range(60)]
    rows += rows[:20]  # copies must stay on one side
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        lines = [f"{row['prompt']},{row['completion']}\n" for row in rows]
        path.write_text("prompt,completion\n" + "".join(lines))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    found = load_conversations(chat_arguments(path, validation_percentage=10))
    train, held_out = (
        [messages_of(row)[0]["content"] for row in part] for part in (found.train, found.validation)
    )
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(row["prompt"] for row in rows)
    assert held_out


def test_conversations_cut_and_left_out(tokenizer, tmp_path, caplog):
    rows = [
        PAIR,
        {"prompt": "Name a colour", "completion": "red " * 100},  # cut in its answer
        {"prompt": "Name a colour " * 100, "completion": "red"},  # no answer within the block
    ]
    args = chat_arguments(
        write_jsonl(tmp_path / "a.jsonl", rows), validation_percentage=0, block_size=48
    )
    set_template(tokenizer, args)
    with caplog.at_level("WARNING"):
        samples = prepare_chat(load_conversations(args), tokenizer, args)
    whole = len(ChatEncoder(tokenizer)(AS_MESSAGES)[0])
    assert [len(row["input_ids"]) for row in samples.train] == [whole, 48]
    assert "of 3 conversations 1 are cut" in caplog.text
    assert "1 are left out" in caplog.text
    short = chat_arguments(args.train_file, validation_percentage=0, block_size=4)
    with pytest.raises(DataError, match="no train conversation has an answer within block_size=4"):
        prepare_chat(load_conversations(short), tokenizer, short)


def test_packed_samples_are_those_of_each_conversation(tmp_path):
    """From a file to samples; and a second run finds them in the cache."""
    rows = [{"prompt": f"Name colour {i}", "completion": f"red {i}"} for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    plain = prepare_data(chat_arguments(path, vocab_size=300), None, Ranks())
    args = chat_arguments(
        path, vocab_size=300, packing=True, block_size=128, preprocessing_num_workers=2
    )
    packed = prepare_data(args, None, Ranks())
    assert len(packed.train) < len(plain.train) / 2
    for name in ("input_ids", "labels"):
        tokens = [
            sorted(int(t) for sample in data.train for t in sample[name])
            for data in (plain, packed)
        ]
        assert tokens[0] == tokens[1]
    for sample in packed.train:
        starts = np.flatnonzero(sample["position_ids"] == 0)
        assert (sample["labels"][starts] == -100).all()
    again = prepare_data(args, None, Ranks())
    assert again.train.cache_files == packed.train.cache_files


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_gives_the_samples_of_its_conversations(
    tokenizer, tmp_path, caplog, monkeypatch, suffix, packing
):
    """Bad rows are left out and named once; it goes on inside of what was mapped, and of a file."""
    monkeypatch.setattr("dstrain.tasks.common.lines.SHARD_BYTES", 1000)
    rows = [{"prompt": f"Name colour {i}", "completion": f"red {i}"} for i in range(80)]
    good = tmp_path / "good.jsonl"
    write_jsonl(good, rows)
    rows[50:50] = [
        {"prompt": "Name a colour", "completion": " "},
        {"prompt": "Name a colour " * 100, "completion": "red"},  # no answer within the block
        rows[1],  # a copy of what is held out
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    else:
        write_jsonl(path, rows)
    given = {"block_size": 64, "packing": packing}
    args = chat_arguments(path, streaming=True, validation_percentage=5, **given)
    set_template(tokenizer, args)
    found = load_conversations(args)
    assert [messages_of(row)[0]["content"] for row in found.validation] == [
        row["prompt"] for row in rows[:4]
    ]
    with caplog.at_level("WARNING"):
        streamed = prepare_chat(found, tokenizer, args)
        samples = list(streamed.train)
        assert list(streamed.train) == samples
    before = sum(map(len, path.read_bytes().splitlines(keepends=True)[:50]))
    place = f"the line at byte {before:,} of {path}"
    if suffix == "parquet":
        place = f"row 51 of --train_file {path}"
    assert found.train.num_shards >= 5
    assert caplog.text.count(place) == 1
    assert caplog.text.count("without an answer in their first 64 tokens") == 1

    whole = chat_arguments(good, validation_percentage=0, block_size=64)
    by_hand = list(prepare_chat(load_conversations(whole), tokenizer, whole).train)[4:]
    tokens = [
        [list(map(int, sample[name])) for sample in by_hand] for name in ("input_ids", "labels")
    ]
    if not packing:
        assert [[sample[n] for sample in samples] for n in ("input_ids", "labels")] == tokens
    else:
        assert len(samples) <= len(by_hand) / 2
        blocks = pack(list(zip(*tokens, strict=True)), 64)
        assert [s["input_ids"] for s in samples] == [sum((i for i, _ in b), []) for b in blocks]
        assert all(s["position_ids"][0] == 0 for s in samples)

    half = len(samples) // 2
    stream = Resumable.of(streamed.train)
    reading = iter(stream.source)
    for _ in range(half):
        next(reading)
    again = Resumable.of(prepare_chat(load_conversations(args), tokenizer, args).train)
    assert again.load(stream.state())
    assert list(again.source) == samples[half:]


def test_a_stream_without_a_conversation_says_what_is_wrong(tokenizer, tmp_path):
    args = chat_arguments(
        write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"messages": []}]), streaming=True
    )
    with pytest.raises(DataError, match="line 1 of .*holds no conversation") as caught:
        load_conversations(args)
    assert len(caught.value.problems) == 2
    short = chat_arguments(
        write_jsonl(tmp_path / "b.jsonl", [PAIR] * 3), streaming=True, block_size=4,
        validation_percentage=0,
    )  # fmt: skip
    set_template(tokenizer, short)
    with pytest.raises(DataError, match="no train conversation has an answer within block_size=4"):
        prepare_chat(load_conversations(short), tokenizer, short)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data_format": "chat"}, "--data_format chat without data"),
        (
            {"data_format": "chat", "train_file": "a.jsonl", "text_column": "body"},
            "--text_column body with --data_format chat",
        ),
        (
            {"data_format": "chat", "train_file": "a.jsonl", "chat_template": "no/such.jinja"},
            "--chat_template no/such.jinja is no file",
        ),
        ({"packing": True}, "--packing True with --data_format text"),
        ({"train_on_answers": "last"}, "--train_on_answers last with --data_format text"),
    ],
)
def test_arguments_that_do_not_go_together(given, expected):
    with pytest.raises(DataError) as caught:
        DataArguments(**given)
    assert expected in str(caught.value)


def test_text_is_no_conversation(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match="is text without rows"):
        load_conversations(chat_arguments(tmp_path / "a.txt"))
