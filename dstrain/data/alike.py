"""Whether ranks read the same data or each a part of its own, told by a few samples of each.

Samples of the same data may differ between ranks: augmentation draws other random numbers on each,
machines round differently, files lie elsewhere. So a field of the samples says something only if it
is the same when they are read again, and differs in most of them; floating-point numbers are
compared roughly, and text only where a sample has no other content.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
import xxhash

from dstrain.core.ranks import gather_objects
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
Look = dict[str, list[Part | None]]  # field -> what it is in each sample
Read = Callable[[bool], Sequence[Any] | None]


def looked_at(samples: Sequence[Any], columns: Sequence[str] | None = None) -> Look:
    """What a few samples say, small enough to be sent to other ranks.

    Args:
        samples: of the dataset, before they are collated.
        columns: of samples that are dicts, those that are used; None for all.
    """
    found: Look = {_COUNT: [("exact", len(samples))]}
    for index, sample in enumerate(samples):
        if columns is not None and isinstance(sample, Mapping):
            sample = {name: value for name, value in sample.items() if name in columns}
        parts = dict(islice(_parts(sample, ""), _MOST_PARTS))
        has_content = any(kind in ("content", "rough") for kind, _ in parts.values())
        for field, part in parts.items():
            if part[0] != "text" or not has_content:
                found.setdefault(field, [None] * len(samples))[index] = part
    return found


def verdict(read: Read, columns: Sequence[str] | None = None) -> tuple[str, str]:
    """Return whether ranks read the same data, and what tells; a collective of all ranks.

    One gather of a digest; only where digests differ are samples read again, twice, and looks
    gathered.

    Args:
        read: gives the first samples of this rank; when called with true, up to ``MOST_SAMPLES`` of
            them anew. None where they cannot be read (again): then all of the first reading counts.
        columns: of samples that are dicts, those that are used; None for all.
    """
    first = _look(read, columns)
    if (found := _by_digest(first)) is not None:
        return found, ""
    # Noise from this process's own generators is the same on all ranks with one seed for all.
    one, other = (_look(read, columns, seed=seed) for seed in _SEEDS)
    if any(again is None for again in gather_objects(one)):
        one = other = first
    elif (found := _by_digest(one)) is not None:
        return found, ""
    assert one is not None
    assert other is not None
    stable = {field: one[field] for field in one if _same(one[field], other.get(field))}
    looks = gather_objects(stable)
    common = sorted(set(looks[0]).intersection(*looks[1:]))  # a field that is noise on any is out
    for field in common:
        for rank, theirs in enumerate(looks):
            if _differ_mostly(theirs[field], looks[0][field]):
                what = field.lstrip(", ") or "a sample"
                return APART, f"{what} of rank {rank} is not that of rank 0"
    return (ALIKE if set(common) - {_COUNT} else UNTOLD), ""


def _by_digest(look: Look | None) -> str | None:
    """Whether ranks read the same, where that is told by all of what they saw; a collective."""
    mine = None if look is None else pickle.dumps(sorted(look.items()), protocol=4)
    digests = set(gather_objects(None if mine is None else _hash(mine)))
    # Whoever reads in earnest what could not be read here will see why.
    return ALIKE if None in digests or len(digests) == 1 else None


def _look(read: Read, columns: Sequence[str] | None, *, seed: int | None = None) -> Look | None:
    """A look at samples, without a trace in the random numbers of this process.

    Args:
        read: see ``verdict``.
        columns: likewise.
        seed: of what noise is made of meanwhile, for samples that are read again.
    """
    state = random_state()
    try:
        if seed is not None:
            seed_everything(seed)
        samples = read(seed is not None)
    except Exception:  # of a dataset of the user's own, anything
        return None
    finally:
        set_random_state(state)
    return None if samples is None else looked_at(samples, columns)


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
    return all(_close(a, b) for a, b in zip(one, other, strict=True))


def _differ_mostly(one: list[Part | None], other: list[Part | None]) -> bool:
    """Return whether a field differs in more than half of the samples: rare noise does not."""
    pairs = list(zip_longest(one, other))
    return 2 * sum(not _close(a, b) for a, b in pairs) > len(pairs)


def _close(one: Part | None, other: Part | None) -> bool:
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
