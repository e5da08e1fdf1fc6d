"""Small texts and files of them, and what tests read from samples."""

import json

import numpy as np

from dstrain.tasks.common import tokenizer as tokenizers_module

WORDS = ["def", "return", "class", "import", "lambda", "yield", "self", "value", "index", "name"]


def sample_text(seed, num_lines=20):
    words = np.random.default_rng(seed).choice(WORDS, size=(num_lines, 6))
    return "".join(f"    {' '.join(line)} {seed}\n" for line in words)


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


def lists_of(samples):
    return [sample["input_ids"].tolist() for sample in samples]
