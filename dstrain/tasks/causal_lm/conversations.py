"""Conversations: the forms of a row, and reading rows with the place of every mistake.

A row has one of three forms:

* ``{"messages": [{"role": ..., "content": ...}, ...]}``, with roles of ``ROLES``;
* ``{"conversations": [...]}`` with such messages or those of ShareGPT, ``{"from": ..., "value":
  ...}``;
* ``{"prompt": "...", "completion": "..."}``: a message of the user, and the answer to it.

Other keys of a row are ignored. A conversation must have an answer: a message of the assistant that
has text and follows another message. A greeting, a first message of the assistant, is read by the
model but not learned.

Rows that are no conversation are refused before training, in one error. A stream is not read before
training: its bad rows are left out, each with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset

from dstrain.core.errors import DataError, Problem, nearest
from dstrain.core.log import get_logger
from dstrain.core.ranks import launched_ranks
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.sources import Documents
from dstrain.tasks.common.files import origins
from dstrain.tasks.common.lines import Span, placed_values, spans_of
from dstrain.tasks.common.origin import ROW_BUILDERS, Origin, explained, fingerprint_of
from dstrain.tasks.common.rows import rows_side, split_rows, text_options

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
MOST_PROBLEMS = 10
"""Number of bad rows after which reading stops; one error lists them."""
STREAM_TRIED_ROWS = 1000
"""First rows of a stream of which at least one must be a conversation."""
FEATURES = Features({"conversation": Value("string"), "place": Value("string")})

Messages = list[dict[str, str]]


logger = get_logger(__name__)


class LeftOut:
    """Warnings about rows left out of a stream, each logged once although rows are read again."""

    def __init__(self) -> None:
        """Begin without a logged warning."""
        self._said: set[str] = set()

    def __call__(self, what: str) -> None:
        """Log on the main rank that ``what`` is left out, unless that was logged before."""
        if what not in self._said and launched_ranks().is_main:
            logger.warning("left out: %s", what)
        self._said.add(what)


def load_conversations(
    args: DataArguments,
    *,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Documents:
    """Read the conversations that ``args`` names; hold out a part by the hash of their content.

    Returns:
        rows ``{"conversation": messages as JSON, "place": file and line, or number of the row}``;
        streams if ``args.streaming``.

    Raises:
        DataError: the data is missing, empty or unreadable, or has rows that are no conversation,
            which are listed with file and line.
    """
    with main_first():
        origin, held_out_origin = origins(args)
        percentage = 0.0 if held_out_origin else args.validation_percentage
        train, held_out = split_rows(
            _load(origin, args), percentage, origin, args, key="conversation"
        )
        if held_out_origin:
            whole = replace(args, streaming=args.streaming and not held_out_origin.files)
            held_out = rows_side(_load(held_out_origin, whole))
    return Documents(
        train=train.rows,
        validation=held_out.rows if held_out else None,
        description=f"{train.size} of conversations: {origin.label}; "
        f"validation: {held_out.size if held_out else 'none'}",
        train_fingerprint=train.fingerprint,
        validation_fingerprint=held_out.fingerprint if held_out else None,
    )


def messages_of(row: dict[str, str]) -> Messages:
    """Return the messages of a row from ``load_conversations``."""
    messages: Messages = json.loads(row["conversation"])
    return messages


def _load(origin: Origin, args: DataArguments) -> Dataset | IterableDataset:
    """Load the rows of an origin, each with its conversation and its place."""
    if origin.builder is None:
        raise DataError(
            Problem(
                f"{origin.label} is text without rows",
                "a conversation is a row with messages",
                f"give a file of rows: {', '.join(ROW_BUILDERS)}",
            )
        )
    if args.streaming:
        return _stream(origin, args)
    with explained(origin):
        rows = None
        if origin.builder == "json" and origin.files:
            paths = [Path(file) for file in origin.files]
            facts = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
            fingerprint = fingerprint_of(["conversations", facts])
        else:
            rows = _load_rows(origin, args)
            fingerprint = fingerprint_of(["conversations", rows._fingerprint])
        found = Dataset.from_generator(
            read_conversations,
            features=FEATURES,
            gen_kwargs={"origin": origin, "rows": rows},
            fingerprint=fingerprint,
        )
    if not len(found):
        raise origin.empty()
    return found


def _load_rows(origin: Origin, args: DataArguments) -> Any:
    """Load the rows of an origin by ``datasets``, as they are in the data."""
    assert origin.builder is not None
    return load_dataset(
        origin.builder,
        None if origin.files else args.dataset_config_name,
        data_files=list(origin.files) or None,
        split=origin.split,
        streaming=args.streaming,
        **text_options(origin, ("prompt", "completion")),
    )


def _stream(origin: Origin, args: DataArguments) -> IterableDataset:
    """Return a stream of the conversations of ``origin``; other rows are left out with a warning.

    Raises:
        DataError: none of the first ``STREAM_TRIED_ROWS`` rows is a conversation.
    """
    with explained(origin):
        if origin.builder == "json" and origin.files:
            judged = IterableDataset.from_generator(
                _judged_json,
                gen_kwargs={"spans": [span for file in origin.files for span in spans_of(file)]},
            )
        else:
            rows = _load_rows(origin, args)
            if origin.builder == "parquet" and origin.files:
                rows = rows.reshard()  # a shard per row group; the stream can begin at each
            judged = rows.map(
                _judged_row,
                with_indices=True,
                fn_kwargs={"label": origin.label},
                remove_columns=list(next(iter(rows), {})),
            )
        problems = []
        for row in judged.take(STREAM_TRIED_ROWS):
            if row["conversation"]:
                break
            problems.append(Problem(row["problem"]))
        else:
            raise DataError(problems[:MOST_PROBLEMS]) if problems else origin.empty()
    conversations: IterableDataset = judged.filter(
        _is_kept, input_columns=["conversation", "problem"], fn_kwargs={"left_out": LeftOut()}
    ).select_columns(list(FEATURES))
    return conversations


def _judged(row: Any, place: str) -> dict[str, str]:
    """Convert a row of a stream to its conversation, or to the text of its problem."""
    messages = messages_in(row, place)
    if isinstance(messages, Problem):
        return {"conversation": "", "place": place, "problem": str(messages)}
    conversation = json.dumps(messages, ensure_ascii=False)
    return {"conversation": conversation, "place": place, "problem": ""}


def _judged_json(spans: list[Span]) -> Iterator[dict[str, str]]:
    for place, row in _placed_json(spans):
        yield _judged(row, place)


def _judged_row(row: dict[str, Any], index: int, *, label: str) -> dict[str, str]:
    return _judged(row, f"row {index + 1} of {label}")


def _is_kept(conversation: str, problem: str, *, left_out: LeftOut) -> bool:
    if problem:
        left_out(problem)
    return bool(conversation)


def read_conversations(origin: Origin, rows: Dataset | None) -> Iterator[dict[str, str]]:
    """Yield the conversations of the JSON files of ``origin``, or of ``rows`` if they are given.

    Raises:
        DataError: rows are no conversation; the first ``MOST_PROBLEMS`` are listed with place.
    """
    problems: list[Problem] = []
    spans = ((file, 0, Path(file).stat().st_size) for file in origin.files)
    placed = _placed_json(spans) if rows is None else _placed_rows(rows, origin)
    for place, row in placed:
        messages = messages_in(row, place)
        if isinstance(messages, Problem):
            problems.append(messages)
            if len(problems) == MOST_PROBLEMS:
                break
        elif not problems:
            conversation = json.dumps(messages, ensure_ascii=False)
            yield {"conversation": conversation, "place": place}
    if problems:
        raise DataError(problems)


def _placed_json(spans: Iterable[Span]) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each line of JSON files, or of each item of a file's one array."""
    for span in spans:
        file, start, _ = span
        if start == 0:
            with open(file, encoding="utf-8") as text:
                if text.read(1) == "[":
                    text.seek(0)
                    values = json.load(text)
                    yield from ((f"item {n} of {file}", v) for n, v in enumerate(values, start=1))
                    continue
        yield from placed_values(span)


def _placed_rows(rows: Dataset, origin: Origin) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {origin.label}", row


def messages_in(row: Any, place: str) -> Messages | Problem:
    """Return the messages of a row in one of the three forms, or the problem of another row."""
    if not isinstance(row, dict):
        return Problem(f"{place} is not an object", f"it holds {_kind(row)}", _shapes())
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return _checked(row[key], f"{key!r} in {place}")
    if row.get("prompt") is not None and row.get("completion") is not None:
        pair = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return _checked(pair, place)
    keys = ", ".join(map(repr, row)) or "none"
    return Problem(f"{place} holds no conversation", f"its keys are {keys}", _shapes())


def _shapes() -> str:
    return "a row has 'messages', 'conversations', or 'prompt' and 'completion'"


def _checked(found: Any, place: str) -> Messages | Problem:
    """Return checked messages of a row, or the first problem of them."""
    if not isinstance(found, list):
        return Problem(
            f"{place} is {_kind(found)}", "a list of messages is expected", "mend the data"
        )
    if not found:
        return Problem(f"{place} is empty", "a conversation has a message", "leave the row out")
    messages: Messages = []
    for number, message in enumerate(found, start=1):
        checked = _message(message, f"message {number} of {place}")
        if isinstance(checked, Problem):
            return checked
        messages.append(checked)
    if all(message["role"] != "assistant" for message in messages[1:]):
        return Problem(
            f"{place} has no answer",
            "the loss is on messages of the assistant to which something led, and there is none",
            "leave the row out",
        )
    return messages


def _message(message: Any, place: str) -> dict[str, str] | Problem:
    """Return a message with the role and the content of our form, or its problem."""
    if not isinstance(message, dict):
        return Problem(
            f"{place} is {_kind(message)}",
            "an object with 'role' and 'content' is expected",
            "mend the data",
        )
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        close = nearest(role, set(ROLES)) if isinstance(role, str) else None
        return Problem(
            f"{place} has the role {role!r}",
            f"roles are {', '.join(ROLES)}",
            f"did you mean {close!r}?" if close else "rename the role",
        )
    if not isinstance(content, str):
        return Problem(
            f"{place} has a content that is {_kind(content)}",
            "text is expected; tool calls, images and lists of parts are not supported",
            "write the content as one text, or leave the row out",
        )
    if role == "assistant" and not content.strip():
        return Problem(
            f"{place} is an empty answer", "there is nothing to learn from it", "leave the row out"
        )
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__} ({str(value)[:40]!r})"
