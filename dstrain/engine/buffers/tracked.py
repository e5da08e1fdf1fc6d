"""Detection of buffers that training changes, and their synchronisation between ranks.

DistributedDataParallel sends the main rank's buffers to the other ranks before the first forward
pass of every global batch. Here that is done at the end of every global batch, so that evaluation,
saved model and checkpoint find the same values on all ranks; training is not affected.

Most models have only buffers that never change (rotary frequencies, masks, position ids), which are
not sent. Neither the model nor torch tells which buffers change: kernels of batch normalisation and
assignments through ``buffer.data`` do not raise a tensor's version. So each rank compares its
buffers with those at the start, after the first step and before evaluations and checkpoints. A
buffer counts as changed if it is another tensor, or has another version or checksum. From then on
it is sent in every step.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.core.errors import ModelError, Problem
from dstrain.core.ranks import broadcast_object, gather_objects, is_distributed
from dstrain.engine.buffers.broadcast import EMPTY, BroadcastBuffers, Form, form_of
from dstrain.engine.buffers.slots import Slot, empty_slots_of, slots_of

# Statistics of torch's normalisation layers. They count as changed from the start, since a layer
# need not run in every step.
_STATISTICS = frozenset(["running_mean", "running_var", "num_batches_tracked"])
_CHUNK_NUMEL = 2**20


@dataclass(frozen=True)
class _Seen:
    """A record of a buffer before training, to detect changes."""

    tensor: weakref.ref[torch.Tensor]
    version: int | None
    checksum: int | None
    form: Form


class Buffers:
    """Tracks the buffers of one module while an engine trains it.

    A buffer that changes is *state*, and is saved in checkpoints. A buffer that is in no
    ``state_dict`` and that the model replaces by another tensor (rotary frequencies for longer
    sequences) is a *cache*. A cache is neither sent nor saved: the module can compute it anew, and
    may record in other attributes for which input it was computed.
    """

    def __init__(self, module: torch.nn.Module, *, sends: bool) -> None:
        """Record the values of all buffers; a collective of all ranks.

        Args:
            module: the model, on its device.
            sends: whether to send the main rank's values to all ranks, now and in training.

        Raises:
            ModelError: ``sends``, but the names or shapes of buffers differ between ranks.
        """
        self._module, self._sends = module, sends
        self._state: set[str] = set()
        self._varying: set[str] = set()  # state without one shape for all steps and ranks
        self._reshaped: set[str] = set()  # state in another form than it was built with
        self._sent = BroadcastBuffers()
        self._state_copies: dict[str, torch.Tensor | None] = {}
        self._makes_copies = self._has_searched = False
        self._seen: dict[str, _Seen] = {}
        if sends:
            begin = [slot for slot in slots_of(module) if slot.persistent]
            _check_alike(begin)
            BroadcastBuffers(begin).send()
        self.note_values()

    def note_values(self) -> None:
        """Record the present values of all buffers, with which ``find_changed`` compares."""
        slots = slots_of(self._module)
        sums = _checksums(slots)
        self._seen = {
            slot.name: _Seen(
                weakref.ref(slot.tensor), _version(slot.tensor), sums.get(slot.name), form_of(slot)
            )
            for slot in slots
        }

    def send_changed(self) -> None:
        """Send buffers that change, at the end of a global batch; a collective of all ranks.

        The first call searches for them. A buffer that takes another form on some rank later keeps
        its value on that rank; from the next search on, it is no longer sent to any rank.
        """
        if not self._has_searched:
            self.find_changed()
        else:
            self._sent.send()
        if self._makes_copies:
            self._state_copies = self._copies()

    def find_changed(self) -> None:
        """Search for buffers that have changed, and send them; a collective of all ranks.

        Takes one exchange of a few bytes per rank, and one wait for the device if there are
        buffers that are not known to change.
        """
        self._has_searched = True
        slots = slots_of(self._module)
        new = [("state", slot.name) for slot in self._changed(slots)]
        new += [("state", name) for name in self._discarded()]
        new += [("reshaped", name) for name in self._in_another_form(slots) - self._reshaped]
        new += [("deviating", name) for name in self._sent.deviating()]
        found = _union(sorted(new))
        self._reshaped.update(name for kind, name in found if kind == "reshaped")
        self._state.update(name for kind, name in found if kind == "state")
        if any(kind != "reshaped" for kind, _ in found):
            self._choose_sent(slots)
        self._sent.send()

    def found(self) -> dict[str, list[str]]:
        """Return the names of the buffers found so far, the same on all ranks.

        Returns:
            "state": buffers that training changes; "varying": state whose shape was not the same in
            all steps and on all ranks; "reshaped": buffers whose shape or number format may differ
            from those in a newly built model.
        """
        return {
            "state": sorted(self._state),
            "varying": sorted(self._varying),
            "reshaped": sorted(self._reshaped),
        }

    def adopt(self, found: Mapping[str, Iterable[str]]) -> None:
        """Adopt the names that another engine's ``found`` returned; a collective of all ranks."""
        self._state.update(found["state"])
        self._varying.update(found["varying"])
        self._reshaped.update(found.get("reshaped", ()))
        self._has_searched = bool(self._state)  # an engine may end before its first search
        self._choose_sent(slots_of(self._module))

    def outside_state_dict(self) -> list[Slot]:
        """Return the state that is in no ``state_dict`` and is equal on all ranks."""
        return [slot for slot in self._sent if not slot.persistent and not slot.is_empty]

    def rank_state(self) -> list[Slot]:
        """Return the state whose values may differ between ranks; a slot may be empty."""
        sent = {slot.name for slot in self._sent}
        return [slot for slot in self._slots_of_state() if slot.name not in sent]

    @property
    def differ_between_ranks(self) -> bool:
        """Tell whether values of any state may differ between ranks; the same on all ranks."""
        return len(self._sent) < len(self._state)

    def caches(self) -> list[str]:
        """Return the names of caches (floating-point buffers that the model has replaced)."""
        return [
            slot.name
            for slot in slots_of(self._module)
            if not slot.persistent
            and slot.name not in self._state
            and slot.tensor.is_floating_point()
            and self._is_replaced(slot)
        ]

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Restore the state after the block, whose forward passes may change it."""
        before = [(slot, slot.owner._buffers[slot.key]) for slot in self._slots_of_state()]
        copies = self._copies()
        try:
            yield
        finally:
            for slot, present in before:
                slot.owner._buffers[slot.key] = present
                slot.replace(copies[slot.name])

    def keep_copies(self) -> None:
        """Copy the state now and after every later step, for ``restore_copies``."""
        self._makes_copies = True
        slots = slots_of(self._module)
        self._state_copies = {s.name: s.tensor.clone() for s in slots if _are_statistics(s)}

    def restore_copies(self) -> None:
        """Restore the state as it was after the last step, when a step was interrupted."""
        for slot in [*slots_of(self._module), *empty_slots_of(self._module)]:
            if slot.name in self._state_copies:
                slot.replace(self._state_copies[slot.name])

    def _changed(self, slots: Sequence[Slot]) -> Iterator[Slot]:
        """Yield buffers that have changed and are not known as state yet."""
        unknown = [slot for slot in slots if slot.name not in self._state]
        sums = _checksums(unknown)
        for slot in unknown:
            seen, tensor = self._seen.get(slot.name), slot.tensor
            if seen is None or self._is_replaced(slot):
                if slot.persistent:
                    yield slot
            elif (
                (slot.owner.training and _are_statistics(slot))
                or _version(tensor) != seen.version
                or sums.get(slot.name) != seen.checksum
            ):
                yield slot

    def _discarded(self) -> list[str]:
        """Return the names of persistent buffers that are None now and not known as state yet."""
        empty = [slot.name for slot in empty_slots_of(self._module) if slot.persistent]
        return [name for name in empty if name in self._seen and name not in self._state]

    def _in_another_form(self, slots: Sequence[Slot]) -> set[str]:
        """Return the names of buffers whose form has changed since ``note_values``."""
        kept = [slot for slot in slots if slot.persistent or slot.name in self._state]
        began = [(slot, self._seen[slot.name]) for slot in kept if slot.name in self._seen]
        return {slot.name for slot, seen in began if seen.form != form_of(slot)}

    def _is_replaced(self, slot: Slot) -> bool:
        """Tell whether the buffer is another tensor than at ``note_values``."""
        seen = self._seen.get(slot.name)
        return seen is None or seen.tensor() is not slot.tensor

    def _choose_sent(self, slots: Sequence[Slot]) -> None:
        """Decide which state is sent: buffers whose form was always the same on all ranks.

        A collective of all ranks.
        """
        by_name = {slot.name: slot for slot in [*slots, *empty_slots_of(self._module)]}
        forms: dict[str, Form | None] = {}
        for name in sorted(self._state - self._varying):
            slot, seen = by_name.get(name), self._seen.get(name)
            fits = slot is not None and (
                seen is None or slot.is_empty or seen.form == form_of(slot)
            )
            forms[name] = form_of(slot) if slot is not None and fits else None
        if not _same_on_all(forms):
            for theirs in gather_objects(forms):
                forms = {n: form if theirs.get(n) == form else None for n, form in forms.items()}
        self._varying.update(name for name, form in forms.items() if form is None)
        fixed = [by_name[name] for name, form in forms.items() if form is not None]
        self._sent = BroadcastBuffers(fixed if self._sends else ())

    def _slots_of_state(self) -> list[Slot]:
        """Return the slots of state, also those that are empty now."""
        slots = [*slots_of(self._module), *empty_slots_of(self._module)]
        return [slot for slot in slots if slot.name in self._state]

    def _copies(self) -> dict[str, torch.Tensor | None]:
        """Return copies of the state by name."""
        return {
            slot.name: None if slot.is_empty else slot.tensor.detach().clone()
            for slot in self._slots_of_state()
        }


@contextlib.contextmanager
def main_rank_buffers(module: torch.nn.Module, *, wanted: bool = True) -> Iterator[None]:
    """Give all ranks the main rank's persistent buffers inside the block; a collective.

    To be used for saving a model whose buffers may differ between ranks, since any rank may write
    any part of it. If all buffers are equal, ranks only exchange a checksum.

    Args:
        module: the model.
        wanted: False, on all ranks, does nothing: the buffers are known to be equal.
    """
    slots = [slot for slot in [*slots_of(module), *empty_slots_of(module)] if slot.persistent]
    if not wanted or not is_distributed() or _same_on_all(_comparable(slots)):
        yield
        return
    theirs = broadcast_object(
        {slot.name: None if slot.is_empty else slot.tensor.detach().cpu() for slot in slots}
    )
    before = [(slot, slot.owner._buffers[slot.key]) for slot in slots if slot.name in theirs]
    try:
        for slot, _ in before:
            slot.owner._buffers[slot.key] = None
            slot.replace(theirs[slot.name])
        yield
    finally:
        for slot, present in before:
            slot.owner._buffers[slot.key] = present


def _comparable(slots: Sequence[Slot]) -> list[Any]:
    """Return names, forms and checksums of buffers, which ranks can compare."""
    sums = _checksums([slot for slot in slots if not slot.is_empty])
    return [(slot.name, form_of(slot), sums.get(slot.name)) for slot in slots]


def _check_alike(slots: Sequence[Slot]) -> None:
    """Check that buffers have the same names and forms on all ranks; a collective.

    Raises:
        ModelError: naming the first buffer that differs; raised on every rank.
    """
    forms = {slot.name: form_of(slot) for slot in slots}
    if _same_on_all(forms):
        return
    of_ranks = gather_objects(forms)
    first = of_ranks[0]
    for rank, theirs in enumerate(of_ranks):
        for name in sorted({*first, *theirs}):
            if first.get(name) != theirs.get(name):
                raise ModelError(
                    Problem(
                        f"the buffer {name} is not the same on rank 0 and rank {rank}",
                        f"{_described(first.get(name))} and {_described(theirs.get(name))}: ranks "
                        "cannot send it to each other",
                        "build the model alike on all ranks, or set ddp_broadcast_buffers=False",
                    )
                )


def _described(form: Form | None) -> str:
    """Describe a form for a message."""
    if form is None or form == EMPTY:
        return "none"
    return f"{str(form[1]).removeprefix('torch.')} of shape {form[0]}"


def _are_statistics(slot: Slot) -> bool:
    """Tell whether a buffer has running statistics of a normalisation layer."""
    return bool(getattr(slot.owner, "track_running_stats", False)) and slot.key in _STATISTICS


def _version(tensor: torch.Tensor) -> int | None:
    """Return torch's count of in-place changes; None for a tensor made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _same_on_all(value: Any) -> bool:
    """Tell whether all ranks have the same value, by comparing hashes; a collective."""
    if not is_distributed():
        return True
    digest = hashlib.sha256(repr(value).encode()).hexdigest()
    return len(set(gather_objects(digest))) == 1


def _union(names: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the union of all ranks' names; a collective, which sends lists only if they differ."""
    if _same_on_all(names):
        return names
    return sorted({name for theirs in gather_objects(names) for name in theirs})


def _checksums(slots: Sequence[Slot]) -> Mapping[str, int]:
    """Return checksums of buffers by name.

    Leaves out integers and booleans that are in no ``state_dict``: masks and positions, which are
    large and do not change.
    """
    chosen = [s for s in slots if s.persistent or s.tensor.is_floating_point()]
    chosen = [s for s in chosen if s.tensor.numel()]
    if not chosen:
        return {}
    device = chosen[0].tensor.device
    sums = torch.stack([checksum(slot.tensor).to(device) for slot in chosen]).tolist()
    return {slot.name: int(value) for slot, value in zip(chosen, sums, strict=True)}


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return a checksum of a tensor's bits, an int64 of shape () on the tensor's device.

    Each element is multiplied by a factor that depends on its place, so order matters. Converts a
    chunk of elements at a time.
    """
    flat = tensor.detach().reshape(-1)
    width = min(4, flat.dtype.itemsize)
    integers = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[width])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, integers.numel(), _CHUNK_NUMEL):
        part = integers[start : start + _CHUNK_NUMEL].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device)
        total += ((part + 1) * (places * 0x9E3779B97F4A7C1 + 1)).sum()
    return total
