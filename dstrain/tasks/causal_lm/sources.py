"""Raw text of the causal language model task: what is read, and which part is held out.

Every source becomes one or two ``datasets`` objects with one column ``text``, a document per row.
What is held out depends only on names and contents, through a hash, so the split is the same on
every run and machine, and equal rows never fall on both sides.

| source | a document is | held out when no validation data is named |
|---|---|---|
| nothing: standard library | a file | files by hash of their relative path |
| folder | a file (pieces of 256 KiB where it is larger) | files by hash of their relative path |
| one text file | a piece of at most 256 KiB | the tail, cut at a line boundary |
| jsonl, parquet, dataset | a row that is not blank | rows by hash of their text |
| the same, streamed | a row that is not blank | the first 1,000, left out of training |

Only the training text and a named ``validation_split`` are ever streamed.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
import sysconfig
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from pyarrow import parquet

from dstrain.core.errors import DataError, Problem, nearest
from dstrain.core.log import get_logger
from dstrain.tasks.causal_lm.arguments import DataArguments

TEXT_SUFFIXES = (".txt", ".text", ".md")
ROW_BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
SHARD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""A folder with nothing but files of one of these suffixes is read as rows, not as text."""
PIECE_BYTES = 256 * 1024
"""Larger files become several documents, so that no single text has to fit in memory."""
STREAM_VALIDATION_DOCUMENTS = 1000
"""Documents held out from a stream; a stream of less than twice as many gives up its percentage."""
LIBRARY_SKIPPED = frozenset(
    # Tests are absent from the Python of Debian and of slim containers; encodings and pydoc_data
    # are generated tables. Without them the text is about the same on every machine.
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_SNIFF_BYTES = 64 * 1024
_VERSION = 1  # of this module's output; raise it when the same input gives other documents
_FEATURES = Features({"text": Value("string")})

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Documents:
    """Raw text, split; every row of both sides is ``{"text": str}``.

    Attributes:
        train: training documents; an ``IterableDataset`` when streaming was asked for.
        validation: held-out documents, or None when there are none. Streamed only where
            ``validation_split`` of a streamed dataset was named.
        description: what was read, for the log.
        train_bytes: UTF-8 bytes of ``train`` where known without reading it, else None.
        validation_bytes: the same for ``validation``.
        train_fingerprint: changes when ``train`` does; None for a stream, which is not cached.
        validation_fingerprint: the same for ``validation``.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None
    description: str
    train_bytes: int | None = None
    validation_bytes: int | None = None
    train_fingerprint: str | None = None
    validation_fingerprint: str | None = None


@dataclass(frozen=True)
class TextPart:
    """Bytes ``start`` to ``stop`` of a text file.

    Attributes:
        path: the file.
        name: what the split hashes: the path relative to the folder, with ``/``.
        start: first byte.
        stop: byte after the last.
        mtime_ns: modification time in nanoseconds, for the fingerprint.
    """

    path: str
    name: str
    start: int
    stop: int
    mtime_ns: int


@dataclass(frozen=True)
class _Side:
    rows: Dataset | IterableDataset
    num_bytes: int | None
    fingerprint: str | None
    size: str


@dataclass(frozen=True)
class _Origin:
    """Where text comes from: its name in messages, and what is read."""

    label: str
    parts: tuple[TextPart, ...] = ()
    one_file: bool = False
    num_skipped: int = 0
    builder: str | None = None
    files: tuple[str, ...] = ()
    split: str = "train"

    def empty(self) -> DataError:
        why = "there is not one document with anything but white space in it"
        return DataError(Problem(f"{self.label} holds no text", why, "give data with text in it"))


def load_documents(
    args: DataArguments,
    *,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Documents:
    """Read the text that ``args`` names and hold out a validation part.

    Files are read into the cache of ``datasets`` once and memory-mapped from then on.

    Args:
        args: which text, and how much to hold out.
        main_first: called for a context in which the main rank of a machine runs before the
            others, which then find its cache.

    Raises:
        DataError: for text that is missing, empty, unreadable or without the named column.
    """
    with main_first():
        origin, held_out_origin = _origins(args)
        percentage = 0.0 if held_out_origin else args.validation_percentage
        if origin.builder:
            train, held_out = _split_rows(_load_rows(origin, args), percentage, origin, args)
        else:
            train, held_out = _split_text(origin, percentage, streaming=args.streaming)
        if held_out_origin:
            held_out = _read_whole(held_out_origin, args)
    skipped = f" ({origin.num_skipped} files are not UTF-8 text)" if origin.num_skipped else ""
    return Documents(
        train=train.rows,
        validation=held_out.rows if held_out else None,
        description=f"{train.size}: {origin.label}{skipped}; "
        f"validation: {held_out.size if held_out else 'none'}",
        train_bytes=train.num_bytes,
        validation_bytes=held_out.num_bytes if held_out else None,
        train_fingerprint=train.fingerprint,
        validation_fingerprint=held_out.fingerprint if held_out else None,
    )


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone, the same on every machine."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _origins(args: DataArguments) -> tuple[_Origin, _Origin | None]:
    if args.dataset_name is not None:
        label = f"--dataset_name {args.dataset_name}"
        train = _Origin(label, builder=args.dataset_name, split=args.train_split)
        if args.validation_split is not None:
            return train, replace(train, split=args.validation_split)
    elif args.train_file is not None:
        train = _file_origin(args.train_file, "train_file")
    else:
        train = _library_origin()
    if args.validation_file is not None:
        return train, _file_origin(args.validation_file, "validation_file")
    return train, None


# --- files: which there are, and their text ------------------------------------------------------


def _library_origin() -> _Origin:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in _list_files(root, LIBRARY_SKIPPED)
        # _sysconfigdata_*.py is written when Python is built and differs on every machine.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
    ]
    parts, skipped = _text_parts(files, root)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not parts:
        raise DataError(
            Problem(
                "there is no training text",
                f"no data was named, and the Python standard library has no source at {root}",
                "give --train_file or --dataset_name",
            )
        )
    label = f"source of the Python {version} standard library ({root})"
    return _Origin(label, parts=parts, num_skipped=skipped)


def _file_origin(name: str, flag: str) -> _Origin:
    """What the path given as ``--flag`` holds: text, or shards of rows."""
    path, label = Path(name).expanduser(), f"--{flag} {name}"
    if not path.exists():
        raise DataError(
            Problem(
                f"{label} does not exist",
                f"looked for {path.absolute()}",
                "check the path; a dataset of the Hub goes into --dataset_name",
            )
        )
    if path.is_dir():
        return _folder_origin(path, label)
    suffix = path.suffix.lower()
    if suffix not in (*TEXT_SUFFIXES, *ROW_BUILDERS):
        raise DataError(
            Problem(
                f"{label} has the unknown suffix {suffix!r}",
                f"text: {', '.join(TEXT_SUFFIXES)}; rows: {', '.join(ROW_BUILDERS)}",
                "rename or convert the file, or give the folder that holds it",
            )
        )
    if path.stat().st_size == 0:
        raise _Origin(label).empty()
    if suffix in ROW_BUILDERS:
        return _rows_origin([path], suffix, label)
    return _Origin(label, parts=(_part(path, path.name),), one_file=True)


def _folder_origin(path: Path, label: str) -> _Origin:
    files = _list_files(path)
    suffixes = {p.suffix.lower() for p in files}
    if len(suffixes) == 1 and (suffix := suffixes.pop()) in SHARD_SUFFIXES:
        return _rows_origin(files, suffix, label)
    parts, skipped = _text_parts(files, path)
    if not parts:
        raise DataError(
            Problem(
                f"{label} holds no readable text",
                f"of its {len(files)} files, {skipped} are not readable UTF-8 text and "
                f"{len(files) - skipped} are empty",
                "give a folder of text files, or of nothing but .jsonl or .parquet files",
            )
        )
    return _Origin(label, parts=parts, one_file=len(parts) == 1, num_skipped=skipped)


def _rows_origin(files: Sequence[Path], suffix: str, label: str) -> _Origin:
    # datasets fails on a shard without rows, which is common among many.
    found = tuple(str(path) for path in files if _has_rows(path, suffix))
    if not found:
        raise _Origin(label).empty()
    return _Origin(label, builder=ROW_BUILDERS[suffix], files=found)


def _has_rows(path: Path, suffix: str) -> bool:
    if suffix != ".parquet" or not path.stat().st_size:
        return path.stat().st_size > 0
    try:
        return parquet.read_metadata(path).num_rows > 0
    except (OSError, pa.ArrowException):
        return True  # not parquet: reading it says so


def _list_files(root: Path, skipped_folders: frozenset[str] = frozenset()) -> list[Path]:
    """Files under ``root`` in order, without hidden ones and what Python compiled."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name != "__pycache__" and name not in skipped_folders
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _text_parts(files: Sequence[Path], root: Path) -> tuple[tuple[TextPart, ...], int]:
    """Those of ``files`` that hold text, and how many are not readable UTF-8 text."""
    parts, skipped = [], 0
    for path in files:
        try:
            with path.open("rb") as file:
                start = file.read(_SNIFF_BYTES)
            if b"\0" in start:
                raise ValueError("a NUL byte")
            codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < _SNIFF_BYTES)
        except (OSError, ValueError):
            skipped += 1
            continue
        if start:
            parts.append(_part(path, path.relative_to(root).as_posix()))
    return tuple(sorted(parts, key=lambda part: part.name)), skipped


def _part(path: Path, name: str) -> TextPart:
    facts = path.stat()
    return TextPart(str(path.absolute()), name, 0, facts.st_size, facts.st_mtime_ns)


def read_pieces(parts: Sequence[TextPart], *, strict: bool) -> Iterator[dict[str, str]]:
    """The documents of ``parts`` in order, each at most ``PIECE_BYTES`` long, blank ones left out.

    The pieces of a part joined are its text unchanged, line endings included.

    Raises:
        DataError: when ``strict`` and a part is not UTF-8; otherwise it is logged and left out.
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
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(part.path, "rb") as file:
        for position in range(0, part.stop, PIECE_BYTES):
            data = file.read(PIECE_BYTES)
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


def _cuts(part: TextPart) -> Iterator[tuple[int, int]]:
    start = part.start
    while part.stop - start > PIECE_BYTES:
        stop = _boundary(part.path, start + PIECE_BYTES // 2, start + PIECE_BYTES)
        yield start, stop
        start = stop
    yield start, part.stop


def _boundary(path: str, low: int, high: int) -> int:
    """Where to cut between bytes ``low`` and ``high``: after the last line, word or character."""
    with open(path, "rb") as file:
        file.seek(low)
        data = file.read(high - low)
    for mark in (b"\n", b" "):
        found = data.rfind(mark)
        if found >= 0:
            return low + found + 1
    # Not inside a character: step back over continuation bytes (10xxxxxx) to a first byte.
    end = len(data) - 1
    while end > 0 and data[end] & 0xC0 == 0x80:
        end -= 1
    return low + end


def _split_text(
    origin: _Origin, percentage: float, *, streaming: bool
) -> tuple[_Side, _Side | None]:
    """The two sides of text files: by file, or for one file its head and its tail."""
    if origin.one_file:
        part = origin.parts[0]
        cut = part.stop
        if percentage > 0 and part.stop > 1:
            target = min(max(1, round(part.stop * (1 - percentage / 100))), part.stop - 1)
            cut = _boundary(part.path, max(0, target - PIECE_BYTES), target) or part.stop
        train = [replace(part, stop=cut)]
        held_out = [replace(part, start=cut)] if cut < part.stop else []
    else:
        ranked = sorted(origin.parts, key=lambda part: unit_hash(part.name))
        hashes = [unit_hash(part.name) for part in ranked]
        names = {part.name for part in ranked[: _num_held_out(hashes, percentage)]}
        train = [part for part in origin.parts if part.name not in names]
        held_out = [part for part in origin.parts if part.name in names]
    side = _text_side(train, origin, streaming=streaming)
    if side is None:
        raise origin.empty()
    return side, _text_side(held_out, origin)


def _num_held_out(hashes: list[float], percentage: float) -> int:
    """How many of the sorted hashes are held out: at least one, and not all, where possible."""
    if percentage == 0:
        return 0
    return min(max(bisect_left(hashes, percentage / 100), 1), len(hashes) - 1)


def _text_side(parts: list[TextPart], origin: _Origin, *, streaming: bool = False) -> _Side | None:
    """The documents of ``parts``, or None when all of them are blank."""
    kwargs: dict[str, Any] = {"parts": parts, "strict": origin.one_file}
    with _explained(origin):
        if next(read_pieces(**kwargs), None) is None:
            return None
    num_bytes = sum(part.stop - part.start for part in parts)
    size = f"{len(parts):,} file{'s' * (len(parts) > 1)}, {num_bytes / 1e6:.1f} MB"
    if streaming:
        stream = IterableDataset.from_generator(read_pieces, features=_FEATURES, gen_kwargs=kwargs)
        return _Side(stream, num_bytes, None, size)
    fingerprint = _fingerprint([astuple(part) for part in parts])
    with _explained(origin):
        rows = Dataset.from_generator(
            read_pieces, features=_FEATURES, gen_kwargs=kwargs, fingerprint=fingerprint
        )
    return _Side(rows, num_bytes, fingerprint, size)


# --- rows: jsonl, parquet, datasets --------------------------------------------------------------


def _read_whole(origin: _Origin, args: DataArguments) -> _Side:
    """All of a named validation text."""
    if not origin.builder:
        return _split_text(origin, 0.0, streaming=False)[0]
    if origin.files:  # --validation_file
        args = replace(args, streaming=False)
    return _rows_side(_load_rows(origin, args))


def _load_rows(origin: _Origin, args: DataArguments) -> Dataset | IterableDataset:
    """Rows of one split that are not blank, with the single column ``text``."""
    assert origin.builder is not None
    num_proc = None if args.streaming else args.preprocessing_num_workers
    with _explained(origin):
        rows = load_dataset(
            origin.builder,
            None if origin.files else args.dataset_config_name,
            data_files=list(origin.files) or None,
            split=origin.split,
            streaming=args.streaming,
            num_proc=num_proc,
        )
        first = next(iter(rows), None)
        if first is None:
            raise origin.empty()
        _check_column(rows, first, origin, args.text_column)
        rows = rows.select_columns([args.text_column])
        if args.text_column != "text":
            rows = rows.rename_column(args.text_column, "text")
        if args.streaming:
            rows = rows.filter(_is_text, input_columns=["text"])
        else:
            rows = rows.filter(
                _are_texts,
                batched=True,
                input_columns=["text"],
                num_proc=num_proc,
                desc="Leaving out blank rows",
            )
        if next(iter(rows), None) is None:
            why = f"{args.text_column!r} is null, empty or white space in every row"
            remedy = "name another column with --text_column, or give other data"
            raise DataError(Problem(f"{origin.label} holds no text", why, remedy))
    return rows


def _check_column(
    rows: Dataset | IterableDataset, first: dict[str, Any], origin: _Origin, name: str
) -> None:
    if name not in first:
        raise DataError(
            Problem(
                f"{origin.label} has no column {name!r}",
                f"its columns are {', '.join(map(repr, first))}",
                f"give --text_column {nearest(name, list(first)) or next(iter(first))}",
            )
        )
    kind = rows.features[name] if rows.features else None
    dtype = getattr(kind, "dtype", type(first[name]).__name__)
    if dtype not in ("string", "large_string", "str", "NoneType", "null"):
        raise DataError(
            Problem(
                f"column {name!r} of {origin.label} holds {dtype}",
                "text is expected; json values that look like dates are read as dates",
                "name another column with --text_column, or store the values as text",
            )
        )


def _split_rows(
    rows: Dataset | IterableDataset, percentage: float, origin: _Origin, args: DataArguments
) -> tuple[_Side, _Side | None]:
    if percentage == 0:
        return _rows_side(rows), None
    if isinstance(rows, IterableDataset):
        return _split_stream(rows, percentage, origin)
    limit = percentage / 100
    if len(rows) < 20 / limit:  # so few that one side could come out empty
        hashes = sorted({unit_hash(text) for batch in rows.iter(100) for text in batch["text"]})
        limit = hashes[_num_held_out(hashes, percentage)]
    train, held_out = (
        rows.filter(
            _in_split,
            batched=True,
            input_columns=["text"],
            fn_kwargs={"limit": limit, "held_out": side},
            num_proc=args.preprocessing_num_workers,
            desc="Splitting rows",
        )
        for side in (False, True)
    )
    if not len(train):
        raise DataError(
            Problem(
                f"{origin.label} has nothing left to train on",
                "its rows are equal, and equal rows are held out together",
                "give other data, or --validation_percentage 0",
            )
        )
    return _rows_side(train), _rows_side(held_out) if len(held_out) else None


def _split_stream(
    rows: IterableDataset, percentage: float, origin: _Origin
) -> tuple[_Side, _Side | None]:
    with _explained(origin):
        texts = [row["text"] for row in rows.take(2 * STREAM_VALIDATION_DOCUMENTS)]
    count = STREAM_VALIDATION_DOCUMENTS
    if len(texts) < 2 * count:
        count = max(1, round(len(texts) * percentage / 100)) if len(texts) > 1 else 0
    texts = texts[:count]
    # By content, so that a later copy of a held-out row is left out too.
    seen = frozenset(unit_hash(text) for text in texts)
    train = rows.filter(_not_in, input_columns=["text"], fn_kwargs={"seen": seen})
    held_out = Dataset.from_dict({"text": texts}, features=_FEATURES)
    num_bytes = sum(len(text.encode()) for text in texts)
    size = f"the first {count:,} documents, {num_bytes / 1e6:.1f} MB"
    side = _Side(held_out, num_bytes, _fingerprint(texts), size)
    return _rows_side(train), side if count else None


def _rows_side(rows: Dataset | IterableDataset) -> _Side:
    if isinstance(rows, IterableDataset):
        return _Side(rows, None, None, "stream")
    return _Side(rows, None, rows._fingerprint, f"{len(rows):,} rows")


def _is_text(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def _are_texts(texts: list[str | None]) -> list[bool]:
    return [_is_text(text) for text in texts]


def _in_split(texts: list[str], *, limit: float, held_out: bool) -> list[bool]:
    return [(unit_hash(text) < limit) == held_out for text in texts]


def _not_in(text: str, *, seen: frozenset[float]) -> bool:
    return unit_hash(text) not in seen


def _fingerprint(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps([_VERSION, facts]).encode()).hexdigest()[:32]


@contextmanager
def _explained(origin: _Origin) -> Iterator[None]:
    """Turn whatever ``datasets`` raises into one error that names the flag, and the bad line."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # our own error, raised inside a generator of datasets
            if isinstance(cause, DataError):
                raise cause from None
            cause = cause.__cause__
        why = str(error.__cause__ or error).strip() or type(error).__name__
        by_name = origin.builder and not origin.files
        remedy = "check the name, the split and the network" if by_name else "mend the file"
        why = next(filter(None, map(_first_bad_line, origin.files)), why)
        raise DataError(Problem(f"{origin.label} could not be read", why, remedy)) from error


def _first_bad_line(file: str) -> str | None:
    if ROW_BUILDERS[Path(file).suffix.lower()] != "json":
        return None
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                return None  # one array, not a value per line
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} of {file} is not a JSON object"
            except ValueError as error:
                return f"line {number} of {file} is not JSON: {error}"
    return None
