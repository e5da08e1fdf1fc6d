"""Whether ranks read the same data or each a part of its own, told by a few samples of each.

Samples of the same data may differ between ranks: augmentation draws other random numbers on each,
machines round differently, files lie elsewhere. So a field of the samples says something only if it
is the same when they are read again, and differs in most of them; floating-point numbers are
compared roughly, and text only where a sample has no other content.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
import xxhash

from dstrain.core.ranks import broadcast_object, gather_objects
from dstrain.core.seeds import random_state, seed_everything, set_random_state

ALIKE, APART, UNTOLD = "alike", "apart", "untold"
"""All ranks read the same; each reads something else; nothing that comes back says either."""

MOST_SAMPLES = 8
_ROUGH = 1e-3  # relative difference of floating-point numbers that are taken for the same
_FIRST_NUMBERS = 8
_MOST_PARTS = 256  # of one sample
_SEEDS = (20_031_123, 20_031_124)  # that no run happens to have
_COUNT = "number of samples"

Part = tuple[str, Any]  # its kind, and what is compared
SampleLook = dict[str, Part]  # field -> what it is
Look = dict[str, list[Part | None]]  # field -> what it is in each sample
Read = Callable[[bool], Sequence[Any] | None]
Apart = Callable[[list[Part | None], list[Part | None]], str]


@dataclass(frozen=True)
class Verdict:
    """Whether ranks read the same data.

    Attributes:
        found: one of ``ALIKE``, ``APART`` and ``UNTOLD``.
        why: what tells them apart.
        noisy: columns that differ between ranks, and do so anew in each reading, or by rounding.
        rare: columns that differ between ranks in few samples, and the same way in each reading.
    """

    found: str
    why: str = ""
    noisy: frozenset[str] = frozenset()
    rare: frozenset[str] = frozenset()


def look_of(sample: Any, columns: Sequence[str] | None = None) -> SampleLook:
    """What one sample says, small enough to be sent to other ranks.

    Args:
        sample: before it is collated; it stays what it is.
        columns: of a sample that is a dict, those that are used; None for all.
    """
    if columns is not None and isinstance(sample, Mapping):
        sample = {name: value for name, value in sample.items() if name in columns}
    parts: SampleLook = {}
    with contextlib.suppress(Exception):  # objects of the user's own: what they gave so far counts
        for field, part in islice(_parts(sample, ""), _MOST_PARTS):
            parts[field] = part
    has_content = any(kind in ("content", "rough") for kind, _ in parts.values())
    return {f: part for f, part in parts.items() if part[0] != "text" or not has_content}


def joined(looks: Sequence[SampleLook], without: Collection[str] = ()) -> Look:
    """The looks of several samples as one, without some columns."""
    found: Look = {_COUNT: [("exact", len(looks))]}
    for index, look in enumerate(looks):
        for field, part in look.items():
            if column_of(field) not in without:
                found.setdefault(field, [None] * len(looks))[index] = part
    return found


def column_of(field: str) -> str:
    """The outermost key or index that leads to a field; nothing of a sample that has none."""
    return field.split(", ", 2)[1] if field.startswith(", ") else ""


def digest_of(content: Any) -> str:
    """A digest of plain values, the same in every process."""
    return _hash(repr(content).encode())


def compare(read: Read, columns: Sequence[str] | None = None) -> Verdict:
    """Return whether ranks read the same data, and what tells; a collective of all ranks.

    One gather of a digest for each column; only where digests differ there is a ``second_look``.

    Args:
        read: gives the first samples of this rank; when called with true, up to a few more of them
            anew. None where they cannot be read (again): then all of the first reading counts.
        columns: of samples that are dicts, those that are used; None for all.
    """
    first = _look(lambda: read(False), columns)
    if any(look is None for look in gather_objects(None if first is None else True)):
        return Verdict(ALIKE)  # whoever reads it in earnest will see why it could not be read here
    assert first is not None
    differing = differing_columns(first)
    if not differing:
        return Verdict(ALIKE)
    found = second_look(first, lambda: read(True), columns, apart=_differ_mostly)
    assert found is not None
    return replace(found, noisy=differing - found.rare)


def differing_columns(look: Look, *, group: Any = None) -> frozenset[str]:
    """Columns that do not look the same on all ranks; a collective.

    One gather of a digest for each column, which grows with ranks x columns.
    """
    fields: dict[str, list[Any]] = {}
    for field in sorted(look):
        fields.setdefault(column_of(field), []).append((field, look[field]))
    told = gather_objects({name: digest_of(part) for name, part in fields.items()}, group=group)
    return frozenset(
        name for mine in told for name in {*mine, *told[0]} if mine.get(name) != told[0].get(name)
    )


def second_look(
    first: Look,
    again: Callable[[], Sequence[Any] | None],
    columns: Sequence[str] | None,
    *,
    apart: Apart,
    without: Collection[str] = (),
    group: Any = None,
    waits: bool = False,
) -> Verdict | None:
    """Tell noise from other data where the same samples differ between ranks; a collective.

    Samples are read again, twice. What is not the same both times is noise; of the rest the main
    rank's look is sent to all, and of each rank a few words about every field are gathered.

    Args:
        first: what this rank has seen, which counts where it cannot be read again.
        again: reads the samples; None where that cannot be.
        columns: see ``look_of``.
        apart: says in which way a field is not that of the main rank, or nothing.
        without: columns that are known to be noise.
        group: of all ranks; None for that of the run.
        waits: return None where samples cannot be read again: there will be more.
    """
    # Noise from this process's own generators is the same on all ranks with one seed for all.
    looks = [_look(again, columns, without, seed=seed) for seed in _SEEDS]
    one, other = looks
    can_read = all(gather_objects(one is not None and other is not None, group=group))
    if not can_read and waits:
        return None
    if not can_read or one is None or other is None:
        one = other = first
    stable = {field: part for field, part in one.items() if _same(part, other.get(field))}
    if can_read and not differing_columns(one, group=group):
        # Ranks that draw the order of samples from these generators look like this, too.
        return Verdict(ALIKE if set(stable) - {_COUNT} else UNTOLD)
    theirs = broadcast_object(stable, group=group)
    mine = {field: (stable[field], theirs[field]) for field in theirs if field in stable}
    told = gather_objects(
        {field: (_same(*both), apart(*both)) for field, both in mine.items()}, group=group
    )
    common = sorted(set(theirs).intersection(*told))  # a field that is noise on any is out
    for field in common:
        for rank, said in enumerate(told):
            if said[field][1]:
                what = field.lstrip(", ") or "a sample"
                return Verdict(APART, f"{what} of rank {rank} {said[field][1]}")
    rare = {column_of(field) for field in common if not all(said[field][0] for said in told)}
    return Verdict(ALIKE if set(common) - {_COUNT} else UNTOLD, rare=frozenset(rare))


def _look(
    read: Callable[[], Sequence[Any] | None],
    columns: Sequence[str] | None,
    without: Collection[str] = (),
    *,
    seed: int | None = None,
) -> Look | None:
    """A look at samples, without a trace in the random numbers of this process.

    Args:
        read: gives the samples, or None.
        columns: see ``look_of``.
        without: columns to leave out.
        seed: of what noise is made of meanwhile, for samples that are read again.
    """
    state = random_state()
    try:
        if seed is not None:
            seed_everything(seed)
        samples = read()
        # Inside, as what is lazy draws when it is looked at.
        looks = None if samples is None else [look_of(sample, columns) for sample in samples]
    except Exception:  # of a dataset of the user's own, anything
        return None
    finally:
        set_random_state(state)
    return None if looks is None else joined(looks, without)


def _parts(value: Any, place: str) -> Iterator[tuple[str, Part]]:
    """The parts of a sample: their kind, and what to compare."""
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
        yield place, _of_array(_as_array(value))
    elif isinstance(value, (np.ndarray, np.generic)):
        yield place, _of_array(np.asarray(value))
    elif isinstance(value, (list, tuple)):
        yield from _parts_of_list(value, place)
    elif hasattr(value, "__array__"):  # an image
        yield place, _of_array(np.asarray(value))
    # What else there is cannot be compared without its own code.


def _parts_of_list(value: Sequence[Any], place: str) -> Iterator[tuple[str, Part]]:
    kinds = {type(part) for part in value}
    if kinds <= {int, bool}:
        yield place, ("content", (len(value), _hash(repr(value).encode())))
    elif kinds <= {float, int}:
        yield place, _of_array(np.asarray(value, dtype=np.float64))
    else:
        yield f"{place}, length", ("exact", len(value))
        for index, part in enumerate(value):
            yield from _parts(part, f"{place}, {index}")


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.numpy() if tensor.layout is torch.strided else tensor.to_dense().numpy()


def _of_array(array: np.ndarray) -> Part:
    if array.dtype.kind == "f":
        finite = array[np.isfinite(array)].astype(np.float64)
        mean, width = (float(finite.mean()), float(finite.std())) if finite.size else (0.0, 0.0)
        first = [float(x) for x in array.reshape(-1)[:_FIRST_NUMBERS]]
        return "rough", [*map(float, array.shape), mean, width, *first]
    if array.dtype.kind in "iub":
        return "content", (array.shape, _hash(np.ascontiguousarray(array).tobytes()))
    return "exact", (str(array.dtype), array.shape)


def _same(one: list[Part | None], other: list[Part | None] | None) -> bool:
    """Return whether a field is the same in all samples of two readings."""
    if other is None or len(one) != len(other):
        return False
    return all(is_close(a, b) for a, b in zip(one, other, strict=True))


def _differ_mostly(one: list[Part | None], other: list[Part | None]) -> str:
    """Say that a field differs in more than half of the samples: rare noise does not."""
    pairs = list(zip_longest(one, other))
    number = sum(not is_close(a, b) for a, b in pairs)
    return "is not that of rank 0" if 2 * number > len(pairs) else ""


def is_close(one: Part | None, other: Part | None) -> bool:
    """Return whether two looks at a part show the same."""
    if one is None or other is None:
        return one is other
    if one[0] != other[0]:
        return False
    if one[0] != "rough":
        return bool(one[1] == other[1])
    if len(one[1]) != len(other[1]):
        return False
    return all(
        x == y or (x != x and y != y) or math.isclose(x, y, rel_tol=_ROUGH, abs_tol=1e-6)
        for x, y in zip(one[1], other[1], strict=True)
    )


def _hash(content: bytes) -> str:
    return xxhash.xxh3_64(content).hexdigest()
