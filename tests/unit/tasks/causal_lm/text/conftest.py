"""A small tokenizer and a folder of texts."""

import pytest

from dstrain.tasks.common.tokenizer import train_tokenizer
from tests.unit.tasks.causal_lm.text.corpus import sample_text


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = [sample_text(seed) for seed in range(40)]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    for index in range(40):
        path = root / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sample_text(index))
    return root
