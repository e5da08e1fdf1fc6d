"""Streams of text: packed blocks, loader processes, and going on behind any block."""

import pickle
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from dstrain.checkpoint.codec import decode, encode
from dstrain.tasks.causal_lm import text_files
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.packing import PackedStream, Packer, collate_blocks
from dstrain.tasks.causal_lm.prepare import prepare
from dstrain.tasks.causal_lm.sources import load_documents
from dstrain.tasks.common import lines as lines_module
from tests.unit.tasks.causal_lm.text.corpus import (
    lists_of,
    prepare_tokenizer,
    sample_text,
    tokens_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def stream_and_blocks(folder, tokenizer):
    kwargs = {"train_file": str(folder), "block_size": 32}
    streamed = DataArguments(**kwargs, streaming=True)
    stored = DataArguments(**kwargs)
    stream = prepare(load_documents(streamed), tokenizer, streamed)
    blocks = prepare(load_documents(stored), tokenizer, stored)
    assert isinstance(stream.train, PackedStream)
    assert tokens_of(stream.validation) == tokens_of(blocks.validation)
    assert stream.tokens_per_byte == blocks.tokens_per_byte
    return stream.train, [sample["input_ids"].tolist() for sample in blocks.train]


def test_stream_gives_the_blocks_of_the_stored_data_again_and_again(stream_and_blocks):
    stream, blocks = stream_and_blocks
    assert lists_of(stream) == blocks
    assert lists_of(stream) == blocks
    assert lists_of(pickle.loads(pickle.dumps(stream))) == blocks
    assert {sample["input_ids"].dtype for sample in stream} == {np.dtype(np.int64)}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_of_a_stream_repeat_and_lose_nothing(stream_and_blocks, num_workers):
    stream, blocks = stream_and_blocks
    loader = DataLoader(
        stream, batch_size=4, num_workers=num_workers, collate_fn=collate_blocks, timeout=60
    )
    padded = [row for batch in loader for row in batch["input_ids"].tolist()]
    assert padded[:-1] == blocks[:-1]
    assert padded[-1][: len(blocks[-1])] == blocks[-1]


@pytest.mark.parametrize("kind", ["texts", "rows"])
@pytest.mark.parametrize("limit", [None, 40])
def test_stream_goes_on_behind_any_block(kind, limit, folder, tmp_path, tokenizer, monkeypatch):
    """As it would have; of what was used, only what was tokenised at once is read again."""
    monkeypatch.setattr("dstrain.tasks.causal_lm.packing.STREAM_BATCH_CHARACTERS", 400)
    monkeypatch.setattr("dstrain.tasks.causal_lm.packing._READ_ROWS", 3)
    path = write_rows(tmp_path / "rows.jsonl", [sample_text(seed) for seed in range(50)])
    args = DataArguments(
        train_file=path if kind == "rows" else str(folder), streaming=True, block_size=32
    )
    rows = load_documents(args).train
    blocks = lists_of(PackedStream(rows, tokenizer, 32, max_blocks=limit))
    assert len(blocks) > 10
    running = PackedStream(rows, tokenizer, 32, max_blocks=limit)
    texts = []
    tokenizer_call = Packer.add
    monkeypatch.setattr(Packer, "add", lambda p, t: texts.extend(t) or tokenizer_call(p, t))
    for used, _ in enumerate(running, start=1):
        state = running.state_dict()
        if state is None:
            assert used == len(blocks)  # the rest after the last full block
            continue
        if used % max(1, len(blocks) // 12) and used < len(blocks) - 2:
            continue
        before = len(texts)
        resumed = PackedStream(rows, tokenizer, 32, max_blocks=limit)
        assert resumed.load_state_dict(decode(encode(state, where="state"))) is True
        if used < len(blocks):
            assert next(iter(resumed))["input_ids"].tolist() == blocks[used]
            assert sum(map(len, texts[before:])) < 2 * (400 + max(map(len, texts)))
            resumed.load_state_dict(state)
        assert lists_of(resumed) == blocks[used:]
        assert lists_of(resumed) == blocks


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_stream_begins_inside_of_a_large_file(kind, tmp_path, tokenizer, monkeypatch):
    """What it reads to get there does not depend on where that is."""
    for module in (text_files, lines_module):
        monkeypatch.setattr(module, "SHARD_BYTES", 4000)
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr("dstrain.tasks.causal_lm.packing.STREAM_BATCH_CHARACTERS", 400)
    monkeypatch.setattr("dstrain.tasks.causal_lm.packing._READ_ROWS", 3)
    texts = [sample_text(seed, num_lines=10) for seed in range(100)]
    path = tmp_path / f"large.{'txt' if kind == 'text' else kind}"
    if kind == "text":
        path.write_text("".join(texts))
    elif kind == "jsonl":
        write_rows(path, texts)
    else:
        pq.write_table(pa.table({"text": texts}), path, row_group_size=8)
    args = DataArguments(train_file=str(path), streaming=True, validation_percentage=0)
    rows = load_documents(args).train
    assert rows.num_shards > 10
    read = []
    read_some = rows._ex_iterable
    while hasattr(read_some, "ex_iterable"):
        read_some = read_some.ex_iterable
    name = "generate_tables_fn" if kind == "parquet" else "generate_examples_fn"
    made = getattr(read_some, name)

    def counted(**kwargs):
        for key, some in made(**kwargs):
            read.append(len(some))
            yield key, some

    setattr(read_some, name, counted)
    blocks = lists_of(PackedStream(rows, tokenizer, 32))
    whole, running = sum(read), PackedStream(rows, tokenizer, 32)
    for used, _ in enumerate(running, start=1):
        if used % (len(blocks) // 7) == 0:
            resumed = PackedStream(rows, tokenizer, 32)
            resumed.load_state_dict(decode(encode(running.state_dict(), where="state")))
            read.clear()
            assert next(iter(resumed))["input_ids"].tolist() == blocks[used]
            assert sum(read) < whole / 4
            resumed.load_state_dict(running.state_dict())
            assert lists_of(resumed) == blocks[used:]


def test_stream_refuses_the_place_of_a_block_of_another_size(stream_and_blocks, tokenizer):
    stream, _ = stream_and_blocks
    next(iter(stream))
    other = PackedStream(stream._rows, tokenizer, 16)
    assert other.load_state_dict(stream.state_dict()) is False


def test_stream_is_limited_and_lazy(tmp_path, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [sample_text(seed) for seed in range(50)])
    args = DataArguments(
        train_file=path, streaming=True, block_size=16, max_train_samples=3, max_eval_samples=2
    )
    documents = load_documents(args)
    packed = prepare(documents, tokenizer, args)
    assert lists_of(packed.train) == lists_of(
        islice(PackedStream(documents.train, tokenizer, 16), 3)
    )
    assert len(packed.validation) == 2


def test_streamed_validation_split_is_measured(tmp_path, tokenizer):
    write_rows(tmp_path / "train.jsonl", [sample_text(seed) for seed in range(5)])
    held_out = [sample_text(seed) for seed in range(5, 10)]
    write_rows(tmp_path / "test.jsonl", held_out)
    args = DataArguments(
        dataset_name=str(tmp_path), validation_split="test", streaming=True, block_size=16
    )
    packed = prepare(load_documents(args), tokenizer, args)
    assert isinstance(packed.validation, PackedStream)
    num_tokens = len(tokens_of(packed.validation))
    assert packed.tokens_per_byte == pytest.approx(num_tokens / len("".join(held_out)), rel=0.01)


def test_tokenizer_of_a_stream_is_trained_on_its_first_documents(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [sample_text(seed) for seed in range(50)])
    args = DataArguments(train_file=path, streaming=True, vocab_size=300)
    assert len(prepare_tokenizer(load_documents(args), args)) == 300
