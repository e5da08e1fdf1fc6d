"""Cache of prepared data on disk: its folder, its entries, and building each only once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import tokenizers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, DstrainError, Problem, raise_problems
from dstrain.core.files import check_utf8, expanded, unwritten
from dstrain.core.main_first import main_first
from dstrain.core.ranks import Ranks

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_SIGNS = ("No space left on device", "Not enough disk space", "Disk quota exceeded")


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder that keeps packed splits and trained tokenizers."""
    return expanded(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "dstrain")


@contextlib.contextmanager
def main_caches_first(ranks: Ranks) -> Iterator[None]:
    """Run a block that caches data on the main rank of a machine first, then on its other ranks.

    A failure to write the cache becomes an error that names its folder.

    Raises:
        DataError: the disk of the cache is full, or it cannot be written; on every rank.
    """
    with main_first(ranks, what="preparing the data"), cache_told():
        yield


@contextlib.contextmanager
def cache_told() -> Iterator[None]:
    """Turn a failure of a library, inside the block, to write the cache into an error about that.

    Raises:
        DataError: in place of the error of the library; or the name of the cache is no UTF-8.
    """
    cache = datasets.config.HF_DATASETS_CACHE
    raise_problems(check_utf8("HF_DATASETS_CACHE", cache), error=DataError)
    try:
        yield
    except DstrainError:
        raise
    except Exception as error:  # libraries raise different exceptions when a disk is full
        if (problem := cache_problem(error)) is not None:
            raise DataError(problem) from error
        raise


def cache_problem(error: BaseException) -> Problem | None:
    """Describe the failure to write the cache that caused ``error``; None for another cause.

    ``datasets``, pyarrow and tokenizers raise different errors for a full disk; that of
    ``datasets`` is the cause of another error.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        # The name of a file that was opened by a descriptor is a number.
        name = getattr(cause, "filename", None)
        path = cache_folder().parent
        if name and isinstance(name, (str, bytes, os.PathLike)):
            path = Path(os.fsdecode(name))
        what = f"the data cache at {path} cannot be written"
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return _with_remedy(unwritten(what, path, cause))
        if any(sign in str(cause) for sign in _SIGNS):
            return _with_remedy(unwritten(what, path, OSError(errno.ENOSPC, _first_line(cause))))
        is_refused = isinstance(cause, OSError) and cause.errno in _REFUSED
        if is_refused and path.is_relative_to(cache_folder().parent.absolute()):
            return _with_remedy(Problem(what, _first_line(cause)))
        cause = cause.__cause__ or cause.__context__
    return None


def _with_remedy(problem: Problem) -> Problem:
    remedy = "free space there, or set HF_DATASETS_CACHE to a folder with space that you may write"
    return replace(problem, remedy=remedy)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Build ``folder`` with ``build`` unless it exists; return True when it was built by this call.

    ``build`` writes into a temporary folder beside ``folder``, which is renamed when it is
    complete: a killed process leaves nothing that looks finished, and the next process removes
    what is left. Runs that need the same folder wait for each other by a file lock, which the
    system releases when its process ends.

    Raises:
        DataError: the cache cannot be written. Errors of ``build`` are passed on.
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
        what = f"the data cache {folder.parent} cannot be written"
        raise DataError(_with_remedy(unwritten(what, folder.parent, error))) from error
    return True


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all facts of ``tokenizer`` that decide how it encodes a document."""
    facts: dict[str, Any] = {
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        facts["backend"] = json.loads(backend.to_str())
        # They are set by each call, and kept after it.
        facts["backend"].pop("truncation", None)
        facts["backend"].pop("padding", None)
    else:
        facts["class"] = type(tokenizer).__name__
        facts["vocabulary"] = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
