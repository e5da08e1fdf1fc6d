"""Checks of users' model folders before anything expensive: config, and files of weights.

Whatever is in them is the user's or a stranger's. Headers and tables of contents are read, never
the weights, and nothing is executed.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.config.model_spec import check_sizes, read_config_file
from dstrain.core.documents import loaded, parsed
from dstrain.core.errors import DstrainError, ModelError, Problem
from dstrain.core.files import expanded, told_refused

# In the order in which transformers takes them.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DAMAGED = "get the file again: it was cut short, or is none of a model"
_LONGEST_REASON = 600


@told_refused(ModelError)
def check_model_folder(folder: str) -> None:
    """Check, before anything expensive, that a local folder holds a model that can be loaded.

    Raises:
        ModelError: no config.json or one that cannot be, no weights beside it, weights that cannot
            be read, or a folder that may not be.
    """
    path = expanded(folder)
    if not path.is_dir():
        if path.is_absolute() or folder.startswith((".", "~")):
            raise ModelError(Problem(f"model_name_or_path={folder!r}", "there is no such folder"))
        return
    found = sorted(p.name for p in path.iterdir())
    listing = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
    problems = []
    if "config.json" not in found:
        problems.append(
            Problem(f"model folder {folder!r} has no config.json", f"it holds {listing}")
        )
    if not any(n.endswith((".safetensors", ".bin")) for n in found):
        problems.append(
            Problem(
                f"model folder {folder!r} has no weights",
                f"no *.safetensors or *.bin file; it holds {listing}",
                "give a folder written by save_pretrained, or start fresh with --model_config",
            )
        )
    if problems:
        raise ModelError(problems)
    check_sizes(read_config_file(path / "config.json", folder), folder)
    problems = [problem for file in _files_of_weights(path) for problem in _damage(file)]
    if problems:
        raise ModelError(problems)


@contextlib.contextmanager
def told_of_library(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any error of a model library inside into a ModelError that says what was asked.

    Constructors and loaders of transformers meet odd configs and files with any exception.

    Raises:
        ModelError: in the place of what was raised.
    """
    try:
        yield
    except DstrainError:
        raise
    except Exception as error:  # of libraries' own, anything: odd configs and files raise any class
        text = str(error).strip() or "no reason given"
        if len(text) > _LONGEST_REASON:
            text = f"{text[:_LONGEST_REASON]} ..."
        if not isinstance(error, (OSError, ValueError, ImportError)):
            text = f"{type(error).__name__}: {text}"
        raise ModelError(Problem(what, text, remedy)) from error


def _files_of_weights(folder: Path) -> list[Path]:
    """Return the files that transformers will load.

    Raises:
        ModelError: an index that cannot be read, or names files that are not there.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _files_of_index(index)
    return []


def _files_of_index(index: Path) -> list[Path]:
    try:
        content = parsed(loaded(index))
        names = set(content["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names something else than files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(Problem(f"{index} cannot be read", why, _DAMAGED)) from error
    files = [index.parent / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            Problem(
                f"the model folder {str(index.parent)!r} lacks files of weights",
                f"{index.name} names {', '.join(missing[:3])}{more}",
                "copy the whole folder",
            )
        )
    return files


def _damage(file: Path) -> list[Problem]:
    """Return what keeps a file of weights from being loaded, as far as its contents list tells."""
    try:
        with told_of_library(f"the weights {file} cannot be read", _DAMAGED):
            (_look_at_safetensors if file.suffix == ".safetensors" else _look_at_archive)(file)
    except ModelError as error:
        return list(error.problems)
    return []


def _look_at_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ValueError(f"{error} ({file.stat().st_size} bytes)") from error


def _look_at_archive(file: Path) -> None:
    """Check which classes a file of ``torch.save`` asks for; none of it is executed or loaded.

    Older ones are no archives and are read whole: only their first bytes are looked at.

    Raises:
        ValueError: it is damaged.
        ModelError: it asks for more than tensors are made of.
    """
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as opened:
            start = opened.read(4)
        if start[:1] != b"\x80":
            raise ValueError("it is no archive of torch.save, or its end is missing")
        return
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    if foreign:
        raise ModelError(
            Problem(
                f"the weights {file} are not loaded",
                f"they ask for {', '.join(foreign[:5])}, which only executing the file could make",
                "convert the model to safetensors where you trust it",
            )
        )


def check_loaded(info: Mapping[str, Any], folder: str, *, ignore_missing: bool) -> list[str]:
    """Refuse a model that was loaded with weights which its checkpoint does not have.

    Args:
        info: transformers' report of what was loaded.
        folder: or name, of the model.
        ignore_missing: go on with random ones in the place of missing weights.

    Returns:
        the names of missing weights, where they are ignored.

    Raises:
        ModelError: weights are missing, or of another shape.
    """
    problems = []
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        lines = [
            f"{name} is {tuple(there)} in the file, and {tuple(here)} by the config"
            for name, there, here in wrong
        ]
        problems.append(
            Problem(
                f"{len(wrong)} weights of {folder!r} have another shape than its config says",
                "\n".join([*lines[:3], *([f"and {len(wrong) - 3} more"] if wrong[3:] else [])]),
                "give the config.json that the weights were saved with",
            )
        )
    # Not among them: tied weights, and what the class says may be missing.
    missing = sorted(info["missing_keys"])
    if missing and not ignore_missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        unused = sorted(info["unexpected_keys"])
        beside = f"; not used of it: {', '.join(unused[:3])}" if unused else ""
        problems.append(
            Problem(
                f"{folder!r} lacks weights of the model, {len(missing)} in number",
                f"{', '.join(missing[:3])}{more} would be random{beside}",
                "give a whole checkpoint of this architecture; or --ignore_missing_keys to begin "
                "with random ones",
            )
        )
    if problems:
        raise ModelError(problems)
    return missing
