"""Pairs from the documented functions of Python's standard library, which every machine has."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple

from datasets import Dataset, Features, IterableDataset, Value

from dstrain.tasks.common.origin import (
    Origin,
    Side,
    TextPart,
    explained,
    fingerprint_of,
    split_parts,
)

FEATURES = Features({"source": Value("string"), "target": Value("string")})


def split_library(
    origin: Origin, percentage: float, *, streaming: bool = False
) -> tuple[Side, Side | None]:
    """Split the library's pairs by file into a training side and a held-out side.

    A source that is on the training side is left out of the held-out side.
    """
    train, held_out = split_parts(origin.parts, percentage)
    side = _stream(train, origin) if streaming else _side(train, (), origin)
    if side is None:
        raise origin.empty()
    return side, _side(held_out, train, origin)


def _side(parts: list[TextPart], without: Sequence[TextPart], origin: Origin) -> Side | None:
    """Return the pairs of Python files as a side, without sources of files ``without``, or None."""
    if not parts:
        return None
    facts = ["functions", [astuple(part) for part in parts], [astuple(part) for part in without]]
    fingerprint = fingerprint_of(facts)
    with explained(origin):
        rows = Dataset.from_generator(
            read_pairs,
            features=FEATURES,
            # Tuples, because datasets takes the items of a list for shards.
            gen_kwargs={"parts": tuple(parts), "without": tuple(without)},
            fingerprint=fingerprint,
        )
    if not len(rows):
        return None
    return Side(rows, None, fingerprint, f"{len(rows):,} functions of {len(parts):,} files")


def _stream(parts: list[TextPart], origin: Origin) -> Side | None:
    """Return a stream of the pairs of Python files as a side; None if there are none."""
    kwargs = {"parts": tuple(parts), "without": ()}
    rows = IterableDataset.from_generator(read_pairs, features=FEATURES, gen_kwargs=kwargs)
    with explained(origin):
        if next(iter(rows), None) is None:
            return None
    return Side(rows, None, None, f"functions of {len(parts):,} files")


def read_pairs(
    parts: tuple[TextPart, ...], without: tuple[TextPart, ...]
) -> Iterator[dict[str, str]]:
    """Yield the pairs of Python files in order, without sources that files ``without`` have too."""
    taken = {pair["source"] for part in without for pair in functions_of(_text(part))}
    for part in parts:
        for pair in functions_of(_text(part)):
            if pair["source"] not in taken:
                yield pair


def functions_of(text: str) -> list[dict[str, str]]:
    """List pairs of the documented functions of a module, in the order of the module.

    ``source`` is the body without its docstring and without common indentation; ``target`` is the
    first line of the docstring that is not blank. A function that has only a docstring, or stands
    on one line, is skipped.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in old modules
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []  # such as the templates of lib2to3
    # Not splitlines(): it also cuts at form feeds, which the parser does not count.
    lines = text.split("\n")
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    pairs = []
    for function in sorted(functions, key=lambda node: (node.lineno, node.col_offset)):
        docstring = (ast.get_docstring(function) or "").strip()
        if not docstring or len(function.body) < 2:
            continue
        body = lines[function.body[0].end_lineno : function.end_lineno]
        source = textwrap.dedent("\n".join(body)).strip()
        if source:
            pairs.append({"source": source, "target": docstring.splitlines()[0].strip()})
    return pairs


def _text(part: TextPart) -> str:
    with open(part.path, encoding="utf-8", errors="replace") as file:
        return file.read()
