"""What is kept on disk between runs: where, under which name, and made only once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import tokenizers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, Problem


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder that keeps packed splits and trained tokenizers."""
    return Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "dstrain").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make ``folder`` by ``build`` unless it exists; True when it was made now.

    ``build`` writes into a temporary folder beside it, which is renamed when complete, so a killed
    process leaves nothing that looks finished; the next one removes what it left. A file lock,
    which the system releases with its process, makes runs that want the same folder take turns.

    Raises:
        DataError: when the cache cannot be written, and whatever ``build`` raises.
    """
    if folder.is_dir():
        return False
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():
                return False
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            Problem(
                f"the data cache {folder.parent} cannot be written",
                str(error),
                "set HF_DATASETS_CACHE to a folder with space that you may write",
            )
        ) from error
    return True


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how ``tokenizer`` encodes a document."""
    facts: dict[str, Any] = {
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        facts["backend"] = json.loads(backend.to_str())
        # Left over from the last call, and set again by the next one.
        facts["backend"].pop("truncation", None)
        facts["backend"].pop("padding", None)
    else:
        facts["class"] = type(tokenizer).__name__
        facts["vocabulary"] = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
