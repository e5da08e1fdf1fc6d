"""Deciding from a few samples of each rank whether ranks read the same data, or parts of it.

Samples of the same data may differ between ranks: augmentation draws other random numbers on each,
machines round differently, paths of files differ. So a field is evidence of different data only if
it is equal when samples are read again, and differs between ranks in most samples. Floating-point
numbers are compared within rounding, and text only in samples without other content. Noise that is
equal in each reading is told from different data in ``differences``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
import xxhash

from dstrain.core.ranks import broadcast_object, gather_objects
from dstrain.core.seeds import random_state, seed_everything, set_random_state
from dstrain.data.comparison.differences import (
    Differences,
    FieldSummaries,
    Part,
    SampleSummary,
    is_close,
    is_same,
)

ALIKE, DIFFERENT, UNCLEAR = "alike", "different", "unclear"
"""Verdicts: ranks read the same data; ranks read different data; no stable field can decide."""

MOST_SAMPLES = 8
_FIRST_NUMBERS = 8
_MOST_PARTS = 256  # of one sample
_SEEDS = (20_031_123, 20_031_124)  # seeds that no run is likely to use
_COUNT = "number of samples"

Read = Callable[[bool], Sequence[Any] | None]
Finding = tuple[str, str]  # a field, and how it differs in words
Judge = Callable[[FieldSummaries, FieldSummaries], Finding | None]


@dataclass(frozen=True)
class Verdict:
    """Verdict whether ranks read the same data.

    Attributes:
        found: one of ``ALIKE``, ``DIFFERENT`` and ``UNCLEAR``.
        why: for ``DIFFERENT``, the field that differs and how.
        noisy: columns that differ between ranks, and between readings or only by rounding.
        rare: columns that differ between ranks in few samples, and equally in each reading.
    """

    found: str
    why: str = ""
    noisy: frozenset[str] = frozenset()
    rare: frozenset[str] = frozenset()


def summary_of(sample: Any, columns: Sequence[str] | None = None) -> SampleSummary:
    """Return a summary of a sample, small enough to be sent to other ranks.

    Args:
        sample: a sample before it is collated; it is not changed.
        columns: used keys of a sample that is a dict; None for all.
    """
    if columns is not None and isinstance(sample, Mapping):
        sample = {name: value for name, value in sample.items() if name in columns}
    parts: SampleSummary = {}
    with contextlib.suppress(Exception):  # users' objects may raise anything; keep fields so far
        for field, part in islice(_parts(sample, ""), _MOST_PARTS):
            parts[field] = part
    has_content = any(kind in ("content", "rough") for kind, _ in parts.values())
    return {f: part for f, part in parts.items() if part[0] != "text" or not has_content}


def by_field(summaries: Sequence[SampleSummary], without: Collection[str] = ()) -> FieldSummaries:
    """Arrange the summaries of several samples by field, without some columns."""
    found: FieldSummaries = {_COUNT: [("exact", len(summaries))]}
    for index, summary in enumerate(summaries):
        for field, part in summary.items():
            if column_of(field) not in without:
                found.setdefault(field, [None] * len(summaries))[index] = part
    return found


def column_of(field: str) -> str:
    """Return the outermost key or index that leads to a field; "" if the sample is the field."""
    return field.split(", ", 2)[1] if field.startswith(", ") else ""


def digest_of(content: Any) -> str:
    """Return a digest of plain values, the same in every process."""
    return _hash(repr(content).encode())


def compare(read: Read, columns: Sequence[str] | None = None) -> Verdict:
    """Decide whether ranks read the same data; a collective of all ranks.

    Gathers a digest of each column; only if digests differ, calls ``compare_again``.

    Args:
        read: reads the first samples of this rank; called with True, reads them again, with a few
            more. Returns None if they cannot be read (again); then the first reading is compared.
        columns: used keys of samples that are dicts; None for all.
    """
    first = _summarize(lambda: read(False), columns)
    if any(summary is None for summary in gather_objects(None if first is None else True)):
        return Verdict(ALIKE)  # the run itself will raise the error of reading
    assert first is not None
    differing = differing_columns(first)
    if not differing:
        return Verdict(ALIKE)
    found = compare_again(first, lambda: read(True), columns, judge=_differ_mostly)
    assert found is not None
    return replace(found, noisy=differing - found.rare)


def differing_columns(summary: FieldSummaries, *, group: Any = None) -> frozenset[str]:
    """Return the columns whose summaries differ between ranks; a collective.

    Gathers a digest of each column, so the gathered data grows with ranks x columns.
    """
    fields: dict[str, list[Any]] = {}
    for field in sorted(summary):
        fields.setdefault(column_of(field), []).append((field, summary[field]))
    digests = {name: digest_of(part) for name, part in fields.items()}
    everyone = gather_objects(digests, group=group)
    main = everyone[0]
    return frozenset(
        name for mine in everyone for name in {*mine, *main} if mine.get(name) != main.get(name)
    )


def compare_again(
    first: FieldSummaries,
    again: Callable[[], Sequence[Any] | None],
    columns: Sequence[str] | None,
    *,
    judge: Judge,
    without: Collection[str] = (),
    group: Any = None,
    waits: bool = False,
) -> Verdict | None:
    """Decide whether samples that differ between ranks are noisy or different data; a collective.

    Samples are read again, twice. A field that is not equal both times on all ranks is noise; the
    main rank's summary of all other fields is sent to all ranks, and each judges the differences.
    The names of fields are gathered, which grows with ranks x fields.

    Args:
        first: this rank's summaries, compared if samples cannot be read again.
        again: reads the same samples again; returns None if it cannot.
        columns: see ``summary_of``.
        judge: compares this rank's summary with the main rank's, in fields without noise; returns
            a field and how it differs if the data is different, else None.
        without: columns that are known to be noise.
        group: process group of all ranks; None for the default group.
        waits: return None if samples cannot be read again, as there will be more samples.
    """
    # With the same seed on all ranks, noise from this process's generators is equal on all ranks.
    one, other = (_summarize(again, columns, without, seed=seed) for seed in _SEEDS)
    # A field that is stable on a rank may be noise on another (which caches its random numbers,
    # say). All ranks must reach the same verdict, as they act on it: so the fields are gathered.
    gathered = gather_objects(_stable_fields(one, other), group=group)
    stable = [fields for fields in gathered if fields is not None]
    can_read = len(stable) == len(gathered)
    if not can_read and waits:
        return None
    if not can_read or one is None:
        one = first
        stable = gather_objects(sorted(first), group=group)
    common = sorted(set(stable[0]).intersection(*stable))
    has_content = bool(set(common) - {_COUNT})
    if can_read and not differing_columns(one, group=group):
        # Ranks that draw the order of samples from these generators get here, too.
        return Verdict(ALIKE if has_content else UNCLEAR)
    mine = {field: one[field] for field in common}
    theirs = broadcast_object(mine, group=group)
    differing = {column_of(f) for f in common if not is_same(mine[f], theirs[f])}
    findings = gather_objects((judge(mine, theirs), differing), group=group)
    for rank, (finding, _) in enumerate(findings):
        if finding is not None:
            field, how = finding
            return Verdict(DIFFERENT, f"{field.lstrip(', ') or 'a sample'} of rank {rank} {how}")
    rare = frozenset(name for _, names in findings for name in names)
    return Verdict(ALIKE if has_content else UNCLEAR, rare=rare)


def _stable_fields(one: FieldSummaries | None, other: FieldSummaries | None) -> list[str] | None:
    """Return the fields that are equal in two readings; None if a reading failed."""
    if one is None or other is None:
        return None
    return sorted(field for field, parts in one.items() if is_same(parts, other.get(field)))


def _summarize(
    read: Callable[[], Sequence[Any] | None],
    columns: Sequence[str] | None,
    without: Collection[str] = (),
    *,
    seed: int | None = None,
) -> FieldSummaries | None:
    """Read samples and return their summaries by field; restore this process's random state.

    Returns None where the samples cannot be read.

    Args:
        read: reads the samples; returns None if it cannot.
        columns: see ``summary_of``.
        without: columns to leave out.
        seed: seed of this process's generators during the reading; None leaves them as they are.
    """
    state = random_state()
    try:
        if seed is not None:
            seed_everything(seed)
        samples = read()
        # Summarised before the random state is restored, as lazy values may draw random numbers.
        summaries = None if samples is None else [summary_of(sample, columns) for sample in samples]
    except Exception:  # a user's dataset may raise anything
        return None
    finally:
        set_random_state(state)
    return None if summaries is None else by_field(summaries, without)


def _parts(value: Any, place: str) -> Iterator[tuple[str, Part]]:
    """Yield the fields of a sample, each with its kind and the content to compare."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _parts(part, f"{place}, {name}")
    elif isinstance(value, str):
        yield place, ("text", _hash(value.encode()))
    elif isinstance(value, (type(None), bool, int)):
        yield place, ("exact", value)
    elif isinstance(value, float):
        yield place, ("rough", [value])
    elif isinstance(value, (bytes, bytearray, memoryview)):
        yield place, ("content", _hash(bytes(value)))
    elif isinstance(value, torch.Tensor):
        yield place, _array_summary(_as_array(value))
    elif isinstance(value, (np.ndarray, np.generic)):
        yield place, _array_summary(np.asarray(value))
    elif isinstance(value, (list, tuple)):
        yield from _parts_of_list(value, place)
    elif hasattr(value, "__array__"):  # an image
        yield place, _array_summary(np.asarray(value))
    # Objects of other types cannot be compared without knowing them.


def _parts_of_list(value: Sequence[Any], place: str) -> Iterator[tuple[str, Part]]:
    kinds = {type(part) for part in value}
    if kinds <= {int, bool}:
        yield place, ("content", (len(value), _hash(repr(value).encode())))
    elif kinds <= {float, int}:
        yield place, _array_summary(np.asarray(value, dtype=np.float64))
    else:
        yield f"{place}, length", ("exact", len(value))
        for index, part in enumerate(value):
            yield from _parts(part, f"{place}, {index}")


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.numpy() if tensor.layout is torch.strided else tensor.to_dense().numpy()


def _array_summary(array: np.ndarray) -> Part:
    if array.dtype.kind == "f":
        finite = array[np.isfinite(array)].astype(np.float64)
        mean, width = (float(finite.mean()), float(finite.std())) if finite.size else (0.0, 0.0)
        first = [float(x) for x in array.reshape(-1)[:_FIRST_NUMBERS]]
        return "rough", [*map(float, array.shape), mean, width, *first]
    if array.dtype.kind in "iub":
        return "content", (array.shape, _hash(np.ascontiguousarray(array).tobytes()))
    return "exact", (str(array.dtype), array.shape)


def _differ_mostly(mine: FieldSummaries, theirs: FieldSummaries) -> Finding | None:
    """Find a field that differs in more than half of the samples, unless noise may be the reason.

    Noise is assumed if samples after the first differing one are equal again.
    """
    fields = [field for field in mine if _differs_mostly(mine[field], theirs[field])]
    if not fields:
        return None
    found = Differences(without_count(mine), without_count(theirs))
    if _COUNT not in fields and True in found.differs:
        first = found.differs.index(True)
        has_common = found.num_alike_after(first) > 0 and found.have_column_in_common()
        if has_common or found.come_together_after(first):
            return None
    return fields[0], "is not that of rank 0"


def _differs_mostly(one: list[Part | None], other: list[Part | None]) -> bool:
    pairs = list(zip_longest(one, other))
    return 2 * sum(not is_close(a, b) for a, b in pairs) > len(pairs)


def without_count(summary: FieldSummaries) -> FieldSummaries:
    """Return the summaries without the number of samples, so that each field has one per sample."""
    return {field: parts for field, parts in summary.items() if field != _COUNT}


def _hash(content: bytes) -> str:
    return xxhash.xxh3_64(content).hexdigest()
