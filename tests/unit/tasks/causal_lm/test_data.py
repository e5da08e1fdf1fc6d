"""Data of the causal language model task: sources, tokenizer, packing, streams, errors."""

import json
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, HfArgumentParser

from dstrain.checkpoint.codec import decode, encode
from dstrain.core.errors import DataError
from dstrain.tasks.causal_lm import sources, text_files
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.packing import PackedStream, Packer, collate_blocks
from dstrain.tasks.causal_lm.prepare import prepare
from dstrain.tasks.causal_lm.sources import load_documents
from dstrain.tasks.common import cache as data_cache
from dstrain.tasks.common import lines as lines_module
from dstrain.tasks.common import origin
from dstrain.tasks.common import rows as rows_module
from dstrain.tasks.common import tokenizer as tokenizers_module
from dstrain.tasks.common.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("cache")

WORDS = ["def", "return", "class", "import", "lambda", "yield", "self", "value", "index", "name"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = [sample_text(seed) for seed in range(40)]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))


def sample_text(seed, num_lines=20):
    words = np.random.default_rng(seed).choice(WORDS, size=(num_lines, 6))
    return "".join(f"    {' '.join(line)} {seed}\n" for line in words)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    for index in range(40):
        path = root / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sample_text(index))
    return root


def write_rows(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts))
    return str(path)


def texts_of(rows):
    return [] if rows is None else [row["text"] for row in rows]


def tokens_of(samples):
    return [int(token) for sample in samples for token in sample["input_ids"]]


def prepare_tokenizer(documents, args, **kwargs):
    """Prepare the tokenizer as the job does."""
    return tokenizers_module.prepare_tokenizer(
        documents.train,
        name=args.tokenizer_name,
        vocab_size=args.vocab_size,
        fingerprint=documents.train_fingerprint,
        text_of=lambda row: row["text"],
        **kwargs,
    )


def message(**kwargs):
    """Return the error of reading the data that the arguments name."""
    with pytest.raises(DataError) as caught:
        load_documents(DataArguments(**kwargs))
    return str(caught.value)


# --- tokenizer -----------------------------------------------------------------------------------

ODD_TEXTS = [
    "",
    "def f(x):\n\treturn x  # tab\n",
    "line\r\nline\r\n\r\n   indented\rlone return",
    "emoji 👩‍👩‍👧 🎉, 漢字, العربية, combining e\u0301, \u00a0\u2003 wide spaces",
    "x = 0x1F + 1_000_000.25e-10\n        if x: pass\n\n\n",
    "\x00\x01 control, \ufeff mark, \U0010ffff last",
    " " * 1000 + "a" + "\t" * 77 + "\n" * 50 + "=" * 300,
    "ends with spaces   ",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_gives_any_text_back(tokenizer, tmp_path, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert data_cache.fingerprint_tokenizer(loaded) == data_cache.fingerprint_tokenizer(tokenizer)
    assert [loaded(text)["input_ids"] for text in ODD_TEXTS] == [
        tokenizer(text)["input_ids"] for text in ODD_TEXTS
    ]
    assert [loaded.decode(loaded(text)["input_ids"]) for text in ODD_TEXTS] == ODD_TEXTS
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 1)
    assert loaded.unk_token is None
    assert len(loaded) <= 400


def test_a_tokenizer_that_fails_where_it_is_used_is_refused(tokenizer, tmp_path):
    """A longest text that is no number: it loads, and its first use was a TypeError."""
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": "x"}))
    with pytest.raises(DataError, match=r"could not be loaded(.|\n)*'str'(.|\n)*--tokenizer_name"):
        tokenizers_module.prepare_tokenizer(
            [], name=str(tmp_path), vocab_size=0, fingerprint=None, text_of=str
        )


def test_tokenizer_training_is_deterministic(tmp_path):
    texts = [sample_text(seed) for seed in range(20)]
    for name in ("first", "second"):
        train_tokenizer(texts, 350, tmp_path / name)
    first, second = (tmp_path / name / "tokenizer.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_trained_tokenizer_is_found_again(folder, cache, monkeypatch):
    args = DataArguments(train_file=str(folder), vocab_size=300)
    documents = load_documents(args)
    first = prepare_tokenizer(documents, args)
    monkeypatch.setattr("dstrain.tasks.common.tokenizer.train_tokenizer", None)
    again = prepare_tokenizer(documents, args)
    assert again.get_vocab() == first.get_vocab()
    assert len(list(cache.glob("tokenizer-*/tokenizer.json"))) == 1


def test_pre_tokens_keep_digits_and_indentation_apart(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(
        "a1234:\n        return x\n"
    )
    lengths = [end - start for _, (start, end) in pieces]
    assert lengths == [1, 1, 1, 1, 1, 1, 9, 6, 2, 1]


# --- sources -------------------------------------------------------------------------------------


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


# --- packing -------------------------------------------------------------------------------------


def expected_tokens(rows, tokenizer):
    """Make the token stream the slow way."""
    eos = tokenizer.eos_token_id
    return [token for text in texts_of(rows) for token in [*tokenizer(text)["input_ids"], eos]]


@pytest.mark.parametrize("block_size", [5, 16, 64, 100_000])
def test_every_token_is_packed_once_and_in_order(folder, tokenizer, block_size):
    args = DataArguments(train_file=str(folder), block_size=block_size)
    documents = load_documents(args)
    packed = prepare(documents, tokenizer, args)
    for rows, samples in (
        (documents.train, packed.train),
        (documents.validation, packed.validation),
    ):
        expected = expected_tokens(rows, tokenizer)
        kept = len(expected) - (len(expected) % block_size == 1)  # one token predicts nothing
        assert tokens_of(samples) == expected[:kept]
        lengths = [len(sample["input_ids"]) for sample in samples]
        assert set(lengths[:-1]) <= {block_size}
        assert 2 <= lengths[-1] <= block_size
    assert packed.train_facts.num_tokens == len(tokens_of(packed.train))
    assert packed.train_facts.num_blocks == len(packed.train)


def test_tokens_per_byte_is_exact(folder, tokenizer):
    args = DataArguments(train_file=str(folder), block_size=16, validation_percentage=20)
    documents = load_documents(args)
    packed = prepare(documents, tokenizer, args)
    num_tokens = len(expected_tokens(documents.validation, tokenizer))
    assert packed.tokens_per_byte == num_tokens / documents.validation_bytes


def test_samples_are_limited_by_blocks(folder, tokenizer):
    args = DataArguments(
        train_file=str(folder), block_size=16, max_train_samples=5, max_eval_samples=2
    )
    everything = prepare(
        load_documents(args), tokenizer, DataArguments(train_file=str(folder), block_size=16)
    )
    packed = prepare(load_documents(args), tokenizer, args)
    assert (len(packed.train), len(packed.validation)) == (5, 2)
    assert tokens_of(packed.train) == tokens_of(everything.train)[: 5 * 16]


def test_second_call_tokenises_nothing(folder, tokenizer, monkeypatch):
    args = DataArguments(train_file=str(folder), block_size=32)
    first = prepare(load_documents(args), tokenizer, args)
    assert not first.from_cache
    monkeypatch.setattr(Packer, "add", None)
    second = prepare(load_documents(args), tokenizer, args)
    assert second.from_cache
    assert tokens_of(second.train) == tokens_of(first.train)
    assert second.train_facts == first.train_facts
    assert second.tokens_per_byte == first.tokens_per_byte
    assert second.train.cache_files  # memory-mapped


def test_rows_are_found_in_the_cache_by_another_process(tmp_path, cache, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", [sample_text(seed) for seed in range(30)])
    args = DataArguments(train_file=path, block_size=32)
    documents = load_documents(args)
    code = (
        "import sys, datasets; from pathlib import Path\n"
        "datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])\n"
        "from dstrain.tasks.causal_lm import arguments, sources\n"
        "args = arguments.DataArguments(train_file=sys.argv[1], block_size=32)\n"
        "found = sources.load_documents(args)\n"
        "print(found.train_fingerprint, found.validation_fingerprint)"
    )
    command = [sys.executable, "-c", code, path, str(cache.parent)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4]
    )
    expected = [documents.train_fingerprint, documents.validation_fingerprint]
    assert found.stdout.split() == expected


@pytest.mark.parametrize("change", ["text", "block_size", "tokenizer", "limit"])
def test_a_change_of_the_inputs_is_not_served_from_the_cache(folder, tokenizer, tmp_path, change):
    args = DataArguments(train_file=str(folder), block_size=32)
    prepare(load_documents(args), tokenizer, args)
    if change == "text":
        for path in folder.rglob("*.py"):
            path.write_text(path.read_text() + "# more\n")
    elif change == "tokenizer":
        tokenizer = train_tokenizer([sample_text(1)], 300, tmp_path / "other")
    elif change == "block_size":
        args = DataArguments(train_file=str(folder), block_size=33)
    else:
        args = DataArguments(train_file=str(folder), block_size=32, max_train_samples=1)
    documents = load_documents(args)
    packed = prepare(documents, tokenizer, args)
    assert not packed.from_cache
    expected = expected_tokens(documents.train, tokenizer)[: args.max_train_samples and 32]
    assert tokens_of(packed.train) in (expected, expected[:-1])


def test_half_a_cache_of_a_killed_run_is_ignored_and_removed(folder, tokenizer, cache, tmp_path):
    args = DataArguments(train_file=str(folder), block_size=32)
    documents = load_documents(args)
    whole = prepare(documents, tokenizer, args)
    folders = [path for path in cache.iterdir() if path.is_dir()]
    assert len(folders) == 2
    for path in folders:  # what a kill in the middle of writing leaves
        half = path.rename(f"{path}.partial")
        blocks = half / "blocks.arrow"
        blocks.write_bytes(blocks.read_bytes()[: blocks.stat().st_size // 2])
        (half / "facts.json").unlink()
    again = prepare(documents, tokenizer, args)
    assert not again.from_cache
    assert again.train_facts == whole.train_facts
    assert tokens_of(again.train) == expected_tokens(documents.train, tokenizer)
    assert not list(cache.glob("*.partial"))


def test_a_failed_build_leaves_nothing(cache):
    def build(partial):
        (partial / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        data_cache.build_once(cache / "thing", build)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_only_the_first_of_the_ranks_builds(folder, tokenizer):
    entered = []

    class Turn:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    args = DataArguments(train_file=str(folder), block_size=32)
    documents = load_documents(args, main_first=Turn)
    prepare(documents, tokenizer, args, main_first=Turn)
    prepare_tokenizer(documents, args, main_first=Turn)
    assert entered == ["in", "out"] * 3


def test_bos_is_added_where_the_tokenizer_adds_it(tokenizer, tmp_path):
    from tokenizers import processors

    tokenizer.save_pretrained(tmp_path)
    with_bos = AutoTokenizer.from_pretrained(str(tmp_path))
    with_bos.add_special_tokens({"bos_token": "<s>"})
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    packer = Packer(with_bos, 1000)
    packer.add(["def", "return"])
    plain = [tokenizer(word)["input_ids"] for word in ("def", "return")]
    assert list(packer.rest()) == [bos, *plain[0], 0, bos, *plain[1], 0]


def test_collator_pads_only_where_needed():
    full = collate_blocks([{"input_ids": np.arange(4)}, {"input_ids": [4, 5, 6, 7]}])
    assert set(full) == {"input_ids", "labels"}
    assert full["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(full["labels"], full["input_ids"])
    assert full["labels"].data_ptr() != full["input_ids"].data_ptr()

    ragged = collate_blocks([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], pad_token_id=1)
    assert ragged["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert ragged["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]
    assert ragged["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {tensor.dtype for tensor in ragged.values()} == {torch.int64}


def test_shorter_block_alone_needs_no_mask():
    assert set(collate_blocks([{"input_ids": [1, 2]}])) == {"input_ids", "labels"}


# --- streams -------------------------------------------------------------------------------------


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


def lists_of(samples):
    return [sample["input_ids"].tolist() for sample in samples]


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


# --- errors --------------------------------------------------------------------------------------


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
    root = Path(__file__).parents[4]
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
