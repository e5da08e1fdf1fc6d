"""A small tokenizer for tests of conversations."""

import pytest
from transformers import AutoTokenizer

from dstrain.tasks.common.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["colour red it is so blue answer: assistant: user: brief"] * 9, 320, folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(str(tokenizer_folder))
