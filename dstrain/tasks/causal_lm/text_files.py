"""Text files: cutting them into documents, and splitting them into training and held-out side."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.tasks.common.origin import (
    SHARD_BYTES,
    Origin,
    Side,
    TextPart,
    explained,
    fingerprint_of,
    split_parts,
)

PIECE_BYTES = 256 * 1024
"""Most bytes of a document; larger files are several, so that none needs much memory."""
FEATURES = Features({"text": Value("string")})

_logger = get_logger(__name__)


def read_pieces(parts: Sequence[TextPart], *, strict: bool) -> Iterator[dict[str, str]]:
    """Yield the documents of ``parts`` in order, each of at most ``PIECE_BYTES``; skip blank ones.

    Joined, the documents of a part are its unchanged text, with its line endings. Each part can be
    read without those before it, because ``parts`` are the shards at which a stream can begin.

    Raises:
        DataError: a part is not UTF-8 and ``strict`` is true; otherwise a warning is logged and the
            part is left out.
    """
    for part in parts:
        if not strict and (problem := _undecodable(part)):
            _logger.warning("left out: %s (%s)", problem.what, problem.why)
            continue
        with open(part.path, "rb") as file:
            for start, stop in _cuts(part):
                file.seek(start)
                data = file.read(stop - start)
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(_not_utf8(part, start + error.start, error.reason)) from None
                if text.strip():
                    yield {"text": text}


def _undecodable(part: TextPart) -> Problem | None:
    """Return the problem of a part that is not UTF-8, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(part.path, "rb") as file:
        file.seek(part.start)
        for position in range(part.start, part.stop, PIECE_BYTES):
            data = file.read(min(PIECE_BYTES, part.stop - position))
            try:
                decoder.decode(data, final=position + len(data) >= part.stop)
            except UnicodeDecodeError as error:
                return _not_utf8(part, position + error.start, error.reason)
    return None


def _not_utf8(part: TextPart, position: int, reason: str) -> Problem:
    return Problem(
        f"{part.path} is not UTF-8 text",
        f"{reason} near byte {position:,}",
        "convert it, for example with iconv -f latin1 -t utf-8",
    )


def _shards(part: TextPart) -> Iterator[TextPart]:
    """Yield the shards of a part; it is cut after a line, a word or a character."""
    start = part.start
    while part.stop - start > SHARD_BYTES:
        stop = _boundary(part.path, start + SHARD_BYTES - PIECE_BYTES // 2, start + SHARD_BYTES)
        yield replace(part, start=start, stop=stop)
        start = stop
    yield replace(part, start=start)


def _cuts(part: TextPart) -> Iterator[tuple[int, int]]:
    start = part.start
    while part.stop - start > PIECE_BYTES:
        stop = _boundary(part.path, start + PIECE_BYTES // 2, start + PIECE_BYTES)
        yield start, stop
        start = stop
    yield start, part.stop


def _boundary(path: str, low: int, high: int) -> int:
    """Return where to cut between bytes ``low`` and ``high``: after a line, word or character."""
    with open(path, "rb") as file:
        file.seek(low)
        data = file.read(high - low)
    for mark in (b"\n", b" "):
        found = data.rfind(mark)
        if found >= 0:
            return low + found + 1
    # Cut before a character: step back over continuation bytes (10xxxxxx) to its first byte.
    end = len(data) - 1
    while end > 0 and data[end] & 0xC0 == 0x80:
        end -= 1
    return low + end


def split_text(origin: Origin, percentage: float, *, streaming: bool) -> tuple[Side, Side | None]:
    """Split text files into training and held-out side: by file, or a single file at a cut."""
    if origin.one_file:
        part = origin.parts[0]
        cut = part.stop
        if percentage > 0 and part.stop > 1:
            target = min(max(1, round(part.stop * (1 - percentage / 100))), part.stop - 1)
            cut = _boundary(part.path, max(0, target - PIECE_BYTES), target) or part.stop
        train = [replace(part, stop=cut)]
        held_out = [replace(part, start=cut)] if cut < part.stop else []
    else:
        train, held_out = split_parts(origin.parts, percentage)
    side = _text_side(train, origin, streaming=streaming)
    if side is None:
        raise origin.empty()
    return side, _text_side(held_out, origin)


def _text_side(parts: list[TextPart], origin: Origin, *, streaming: bool = False) -> Side | None:
    """Return the documents of ``parts`` as a side; None if all of them are blank."""
    shards = [shard for part in parts for shard in _shards(part)]
    kwargs: dict[str, Any] = {"parts": shards, "strict": origin.one_file}
    with explained(origin):
        if next(read_pieces(**kwargs), None) is None:
            return None
    num_bytes = sum(part.stop - part.start for part in parts)
    size = f"{len(parts):,} file{'s' * (len(parts) > 1)}, {num_bytes / 1e6:.1f} MB"
    if streaming:
        stream = IterableDataset.from_generator(read_pieces, features=FEATURES, gen_kwargs=kwargs)
        return Side(stream, num_bytes, None, size)
    fingerprint = fingerprint_of([astuple(shard) for shard in shards])
    with explained(origin):
        rows = Dataset.from_generator(
            read_pieces, features=FEATURES, gen_kwargs=kwargs, fingerprint=fingerprint
        )
    return Side(rows, num_bytes, fingerprint, size)
