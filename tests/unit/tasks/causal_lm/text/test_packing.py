"""Texts in blocks of tokens, their cache, and their collator."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.packing import Packer, collate_blocks
from dstrain.tasks.causal_lm.prepare import prepare
from dstrain.tasks.causal_lm.sources import load_documents
from dstrain.tasks.common import cache as data_cache
from dstrain.tasks.common.tokenizer import train_tokenizer
from tests.unit.tasks.causal_lm.text.corpus import (
    prepare_tokenizer,
    sample_text,
    texts_of,
    tokens_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("cache")


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
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[5]
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
