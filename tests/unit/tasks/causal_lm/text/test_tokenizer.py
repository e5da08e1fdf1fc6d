"""Training, saving and finding again the tokenizer of a text."""

import json

import pytest
from transformers import AutoTokenizer

from dstrain.core.errors import DataError
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.sources import load_documents
from dstrain.tasks.common import cache as data_cache
from dstrain.tasks.common import tokenizer as tokenizers_module
from dstrain.tasks.common.tokenizer import train_tokenizer
from tests.unit.tasks.causal_lm.text.corpus import prepare_tokenizer, sample_text

pytestmark = pytest.mark.usefixtures("cache")


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
