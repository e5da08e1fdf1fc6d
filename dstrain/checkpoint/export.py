"""Export of a checkpoint's model as a Hugging Face folder, by one process without the model's code.

Weights come from the master weights, so they can have more digits than the model trained with.
Memory holds one tensor at a time, or the tensors that transformers merges or splits together.
transformers itself is needed only for architectures whose files differ from the trained model in
names or layout.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import content, new_folder
from dstrain.checkpoint.extra_state import EXTRA_STATES, by_key
from dstrain.checkpoint.files import reading
from dstrain.checkpoint.manifest import Manifest, read_manifest, require_files
from dstrain.checkpoint.run_files import read_run
from dstrain.checkpoint.slice_index import Piece, SliceIndex, check_coverage, read_index
from dstrain.core.documents import Plain, Text, read_document
from dstrain.core.errors import CheckpointError, ModelError, Problem
from dstrain.core.files import write_json
from dstrain.core.log import get_logger
from dstrain.engine import MASTER, WEIGHT
from dstrain.models import (
    Entry,
    Portion,
    RecordedLayout,
    Stored,
    recorded_layout,
    remark_on,
    write_tensor_file,
)

logger = get_logger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
# Prefix of all parameter names in a PEFT model.
_PEFT_PREFIX = "base_model."
SHARD_BYTES = 5 * 10**9
_TRAINING_FILES = {"trainer_state.json", "training_arguments.json", "resolved_config.json"}
_WEIGHTS = re.compile(r"model[^/]*\.safetensors")
_Object: Any = Plain
_INDEX = "model.safetensors.index.json"


def export(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[str, int], None] = lambda name, num_bytes: None,
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> int:
    """Write the model of a checkpoint to ``out``; return the number of its tensors.

    All files to be read are verified first, so that no output is made from a damaged checkpoint.

    Args:
        folder: a committed checkpoint.
        out: an empty folder, or one to make.
        dtype: format of floating-point weights; None for the format of training.
        shard_bytes: size of the largest shard; a larger tensor gets a shard to itself.
        on_tensor: called with the name and bytes of each tensor once it is written.
        on_file: called with the bytes of each file that has been verified.

    Raises:
        CheckpointError: the checkpoint is damaged or of a PEFT model, ``out`` is not empty, or
            ``dtype`` is unknown.
    """
    manifest = read_manifest(folder)
    if any(name.startswith(_PEFT_PREFIX) for name in manifest.parameters):
        raise CheckpointError(
            Problem(
                f"{folder} is the checkpoint of a PEFT model",
                "without peft its adapters and the model below cannot be told apart",
                "load the adapter that is in it: peft.PeftModel.from_pretrained(model, folder)",
            )
        )
    wanted = DTYPES.get(dtype or manifest.precision)
    if wanted is None:
        raise CheckpointError(Problem(f"dtype={dtype!r}", f"one of {', '.join(DTYPES)}"))
    new_folder.check_new(out)
    source = _Source(folder, manifest, on_file)
    copied = [name for name in sorted(manifest.files) if _is_copied(name)]
    source.verify(copied)
    extra = source.extra_states()
    if remark := remark_on(sorted(k for k, s in extra.items() if not isinstance(s, torch.Tensor))):
        logger.warning("%s", remark)
    tensors = _tensors(source, wanted, extra, as_trained=dtype is None)
    first = tensors[0].dtype if tensors else wanted
    with new_folder.filled_atomically(out) as staging:
        _write(tensors, staging, shard_bytes, on_tensor)
        for name in copied:
            shutil.copyfile(folder / name, staging / name)
        _correct_config(staging, first if dtype is None and first.is_floating_point else wanted)
    return len(tensors)


def _is_copied(name: str) -> bool:
    """Tell whether an export copies a file: a config, or a file of a tokenizer or processor."""
    is_tensors = name.endswith(".safetensors") or name == _INDEX
    inside = "/" in name or name.startswith(".")
    return not (is_tensors or inside or name in _TRAINING_FILES)


class _Source:
    """Checkpoint whose files are verified before they are read, each file once."""

    def __init__(self, folder: Path, manifest: Manifest, on_file: Callable[[int], object]) -> None:
        self.folder, self.manifest, self._on_file = folder, manifest, on_file
        self._verified: set[str] = set()

    def verify(self, names: Iterable[str]) -> None:
        """Check that files are as they were written.

        Raises:
            CheckpointError: files are damaged; the message names them.
        """
        wanted = set(names) - self._verified
        require_files(self.folder, self.manifest, wanted, on_file=self._on_file)
        self._verified |= wanted

    def path(self, name: str) -> Path:
        """Verify a file and return its path."""
        self.verify([name])
        return self.folder / name

    def extra_states(self) -> dict[str, Any]:
        """Read the main rank's extra states, named by their keys in a ``state_dict``."""
        if not self.manifest.has(content.RUN):
            return {}
        self.verify([content.RUN])
        return by_key(read_run(self.folder).get(EXTRA_STATES, {}))

    def slices(self) -> SliceIndex:
        """Verify the files of slices and index them; see ``read_index``."""
        self.verify(slice_files(self.folder, self.manifest))
        return read_index(self.folder, self.manifest)


def slice_files(folder: Path, manifest: Manifest) -> list[str]:
    """List the files of slices, and of their table, that are in a checkpoint's folder, if any."""
    if not manifest.has_slices:
        return []
    absent = set(manifest.not_in(folder))
    every = [content.TABLE, *map(content.slice_file, range(manifest.world_size))]
    return [name for name in every if manifest.has(name) and name not in absent]


def _tensors(
    source: _Source, dtype: torch.dtype, extra: Mapping[str, Any], *, as_trained: bool
) -> list[Stored]:
    """List all tensors of the model under their saved names; each is read when it is written.

    Args:
        source: the checkpoint.
        dtype: format of floating-point weights.
        extra: extra states by their keys; those that are tensors are exported.
        as_trained: keep the format of weights that the model trained in another format.

    Raises:
        CheckpointError: a file to be read is damaged, or a part of the model is missing.
    """
    folder, manifest = source.folder, source.manifest
    # Only names are read here; files are verified before their tensors are read.
    stored = _stored_names(folder, manifest) if manifest.has_weights else {}
    as_stored = dtype == DTYPES[manifest.precision]  # then files are kept, with buffers' formats

    def files() -> list[Stored]:
        source.verify(stored.values())
        return [
            _from_file(folder / file, name, None if as_stored else dtype)
            for name, file in sorted(stored.items())
        ]

    if stored and not manifest.has_slices:
        return files()
    record = _layout_record(source)
    beside = [Stored.of(k, s) for k, s in sorted(extra.items()) if isinstance(s, torch.Tensor)]
    has_buffers = manifest.has(content.BUFFERS)
    persistent = _file_names(source.path(content.BUFFERS)) if has_buffers else set()
    if stored and record is None:  # files are laid out as trained, or it is an older checkpoint
        if set(stored) != {*manifest.parameters, *persistent, *(s.name for s in beside)}:
            return files()
    elif stored and as_stored:
        return files()
    index = source.slices()  # raises where the checkpoint has no slices either
    if missing := check_coverage(index, manifest):
        raise CheckpointError(Problem(f"{folder} is damaged", "\n".join(missing)))
    source.verify([content.RUN])
    formats = read_run(folder).get("formats", {})

    def format_of(name: str) -> torch.dtype:
        own = getattr(torch, formats[name]) if name in formats else dtype
        return own if as_trained or not own.is_floating_point else dtype

    if not stored or record is not None:
        try:
            layout = recorded_layout(folder, record, manifest.parameters)
            return _converted(folder, layout, manifest, index, dtype, format_of) + beside
        except ModelError:
            if stored:
                return files()
    tensors = [
        _master(index, name, shape, format_of(name)) for name, shape in manifest.parameters.items()
    ]
    path = folder / content.BUFFERS
    return tensors + [_from_file(path, name, None) for name in sorted(persistent)] + beside


@dataclass(frozen=True)
class _Patterns:
    """Name patterns with which a conversion of transformers is constructed."""

    source_patterns: list[Text]
    target_patterns: list[Text]


@dataclass(frozen=True)
class _Conversion:
    """Entry of ``layout.json``: a conversion of transformers that saving reverts."""

    kind: Text
    sources: list[Text]
    targets: list[Text]
    scope: Text | None
    base: Text | None
    given: _Patterns


_Conversions: Any = list[_Conversion]


def _layout_record(source: _Source) -> list[dict[str, Any]] | None:
    if not source.manifest.has(content.LAYOUT):
        return None
    record: list[_Conversion] = read_document(source.path(content.LAYOUT), _Conversions)
    return [asdict(conversion) for conversion in record]


def _converted(
    folder: Path,
    layout: RecordedLayout,
    manifest: Manifest,
    index: SliceIndex,
    dtype: torch.dtype,
    format_of: Callable[[str], torch.dtype],
) -> list[Stored]:
    """List tensors in the layout of ``save_pretrained``; each group is converted on writing."""

    def load(entry: Entry) -> torch.Tensor:
        name = layout.first_names.get(entry.name, entry.name)
        if name in manifest.parameters:
            return _master(index, name, manifest.parameters[name], format_of(name)).load()
        return _from_file(buffers, name, dtype).load()

    buffers = folder / content.BUFFERS
    tensors: list[Stored] = []
    for group in layout.groups:
        if group.is_as_trained and not isinstance(group.entries[0].tensor, torch.nn.Parameter):
            found = _from_file(buffers, group.entries[0].name, None)
            tensors.append(replace(found, name=group.saved[0].name))
            continue
        first = layout.first_names.get(group.entries[0].name, group.entries[0].name)
        own = format_of(first) if group.is_as_trained else dtype
        saved = tuple(replace(saved, dtype=own) for saved in group.saved)
        tensors += Portion(group, saved).stored(partial(_load_all, load, group.entries))
    return tensors


def _load_all(
    load: Callable[[Entry], torch.Tensor], entries: Iterable[Entry]
) -> list[torch.Tensor]:
    return [load(entry) for entry in entries]


def _master(index: SliceIndex, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
    key = MASTER if MASTER in index.keys_of(name) else WEIGHT
    return assembled(index, key, name, shape, dtype)


def assembled(
    index: SliceIndex, key: str, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Stored:
    """Describe a whole tensor that is put together from its pieces when it is written."""
    pieces = index.pieces(key, name)  # none of a parameter without elements

    def load() -> torch.Tensor:
        whole = torch.empty(torch.Size(shape).numel(), dtype=dtype)
        for piece in pieces:
            whole[piece.start : piece.start + piece.numel] = _read(piece, f"{key}/{name}")
        return whole.view(shape)

    return Stored(name, shape, dtype, load)


def _read(piece: Piece, tensor: str) -> torch.Tensor:
    with reading(piece.path) as file:
        return file.read(tensor, 0, piece.numel)


def _from_file(path: Path, name: str, dtype: torch.dtype | None) -> Stored:
    with reading(path) as file:
        shape, sample = file.shape(name), file.read(name, 0, 0)
    stored = sample.dtype if dtype is None or not sample.is_floating_point() else dtype

    def load() -> torch.Tensor:
        with reading(path) as file:
            return file.whole(name).to(stored)

    return Stored(name, shape, stored, load)


def _stored_names(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Map each tensor in the checkpoint's Hugging Face files to its file."""
    names: dict[str, str] = {}
    for file in sorted(name for name in manifest.files if _WEIGHTS.fullmatch(name)):
        names |= dict.fromkeys(_file_names(folder / file), file)
    return names


def _file_names(path: Path) -> set[str]:
    with reading(path) as file:
        return set(file.keys())


def _write(
    tensors: list[Stored], out: Path, shard_bytes: int, on_tensor: Callable[[str, int], None]
) -> None:
    shards: list[list[Stored]] = [[]]
    for stored in tensors:
        filled = sum(s.num_bytes for s in shards[-1])
        if shards[-1] and filled + stored.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(_counted(stored, on_tensor))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        write_tensor_file(out / name, shard, {"format": "pt"})
        weight_map |= {stored.name: name for stored in shard}
    if len(shards) > 1:
        total = sum(stored.num_bytes for stored in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / _INDEX, index)


def _counted(stored: Stored, on_tensor: Callable[[str, int], None]) -> Stored:
    def load() -> torch.Tensor:
        values = stored.load()
        on_tensor(stored.name, stored.num_bytes)
        return values

    return Stored(stored.name, stored.shape, stored.dtype, load)


def _correct_config(out: Path, dtype: torch.dtype) -> None:
    """Set ``dtype`` in ``config.json`` to the format of the exported weights."""
    path = out / "config.json"
    if not path.exists():
        return
    config: Mapping[str, Any] = read_document(path, _Object)
    write_json(path, {**config, "dtype": str(dtype).removeprefix("torch.")})
