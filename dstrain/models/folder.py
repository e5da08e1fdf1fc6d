"""Checks of the config and weight files in a model folder, before anything expensive.

The files are not trusted: only headers and tables of contents are read, and nothing is executed.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.config.memory.model_spec import check_sizes, read_config_file
from dstrain.core.documents import loaded, parsed
from dstrain.core.errors import DstrainError, ModelError, Problem, raise_problems
from dstrain.core.files import check_utf8, expanded, told_refused

# Names of weight files, in the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DAMAGED = "get the file again: it was cut short, or is none of a model"
_LONGEST_REASON = 600
_QUANTISED = ("quantization_config", "compression_config")
_FLOATS = ("F", "BF")
_WITHOUT = "correct it, or remove the file: the model's own defaults serve then"
# Keys of a generation config that must be numbers. Names of token ids end in "token_id".
_GENERATION: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "num_return_sequences", "max_length", "max_new_tokens",
         "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"),
        (int,),
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty",
         "epsilon_cutoff", "eta_cutoff", "max_time"),
        (int, float),
    ),
}  # fmt: skip


@told_refused(ModelError)
def check_model_folder(folder: str) -> None:
    """Check that a local folder contains a model that can be loaded.

    Accepts any name that can be one of a hub model.

    Raises:
        ModelError: there is no such folder, it cannot be read, or config.json or weights are
            missing or damaged.
    """
    raise_problems(check_utf8("model_name_or_path", folder), error=ModelError)
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
    config = read_config_file(path / "config.json", folder)
    check_sizes(config, folder)
    problems = _wrong_generation(path / "generation_config.json")
    for file in _files_of_weights(path):
        problems += _damage(file) or ([] if _is_quantised(config) else _whole_numbers(file))
    if problems:
        raise ModelError(problems)


def _is_quantised(config: Mapping[str, Any]) -> bool:
    """Tell whether a config, or a config of a part in it, names a quantisation."""
    parts = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    return any(part.get(key) for part in parts for key in _QUANTISED)


def _whole_numbers(file: Path) -> list[Problem]:
    """List a problem if weights or biases are stored as integers."""
    if file.suffix != ".safetensors":
        return []
    from safetensors import safe_open

    wrong = []
    with safe_open(str(file), framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            if name.endswith((".weight", ".bias")):
                stored = tensors.get_slice(name).get_dtype()
                if not stored.startswith(_FLOATS):
                    wrong.append(f"{name} is {stored}")
    if not wrong:
        return []
    more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
    return [
        Problem(
            f"{len(wrong)} weights of {file} are no floating-point numbers",
            f"{', '.join(wrong[:3])}{more}; config.json names no quantisation that they are of",
            "give the weights as they were trained, or the config.json that they were saved with",
        )
    ]


def _wrong_generation(file: Path) -> list[Problem]:
    """List problems with a generation config, which would end the run only when it generates."""
    if not file.exists():
        return []
    try:
        content = parsed(loaded(file))
    except (OSError, ValueError) as error:
        return [Problem(f"{file} cannot be read", str(error), _WITHOUT)]
    if not isinstance(content, dict):
        return [Problem(f"{file} cannot be read", "it is no JSON object", _WITHOUT)]
    problems = []
    for name, value in content.items():
        parts = value if isinstance(value, list) and name.endswith("token_id") else [value]
        kinds = _GENERATION.get(name, (int,) if name.endswith("token_id") else ())
        fits = all(isinstance(p, kinds) and not isinstance(p, bool) for p in parts)
        if kinds and value is not None and not (fits and (value or name != "num_beams")):
            wanted = "a number" if float in kinds else "a whole number"
            shown = json.dumps(value, default=str)
            problems.append(Problem(f"{name}={shown} in {file}", f"{wanted} is needed", _WITHOUT))
    return problems


@contextlib.contextmanager
def library_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any error of a model library in the block into a ``ModelError``.

    Constructors and loaders of transformers raise exceptions of any class for invalid configs and
    files.

    Args:
        what: what was attempted, for the message.
        remedy: what the user can do.

    Raises:
        ModelError: instead of the library's error.
    """
    try:
        yield
    except DstrainError:
        raise
    except Exception as error:  # libraries raise exceptions of any class for invalid files
        # Cuts off the C++ frames that torch appends to some of its messages.
        text = str(error).partition("\nException raised from ")[0].strip() or "no reason given"
        if len(text) > _LONGEST_REASON:
            text = f"{text[:_LONGEST_REASON]} ..."
        if not isinstance(error, (OSError, ValueError, ImportError)):
            text = f"{type(error).__name__}: {text}"
        raise ModelError(Problem(what, text, remedy)) from error


def _files_of_weights(folder: Path) -> list[Path]:
    """Return the weight files that transformers will load.

    Raises:
        ModelError: an index cannot be read, or names files that do not exist.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _files_of_index(index)
    return []


def _files_of_index(index: Path) -> list[Path]:
    """Return the weight files that an index names.

    Raises:
        ModelError: the index cannot be read, or names files that do not exist.
    """
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
    """List problems that keep a weight file from being loaded, judging by its header."""
    try:
        with library_errors(f"the weights {file} cannot be read", _DAMAGED):
            (_look_at_safetensors if file.suffix == ".safetensors" else _look_at_archive)(file)
    except ModelError as error:
        return list(error.problems)
    return []


def _look_at_safetensors(file: Path) -> None:
    """Check the header of a safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ValueError(f"{error} ({file.stat().st_size} bytes)") from error


def _look_at_archive(file: Path) -> None:
    """Check which classes a file of ``torch.save`` needs, without executing or loading it.

    Of files in torch's old format, which are no zip archives, only the first bytes are checked.

    Raises:
        ValueError: the file is damaged.
        ModelError: the file needs classes that are not part of tensors.
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
    """Check that a model's checkpoint had all of its weights.

    Args:
        info: transformers' report of loading.
        folder: folder or name of the model.
        ignore_missing: whether to accept random weights instead of missing ones.

    Returns:
        the names of missing weights, if these are accepted.

    Raises:
        ModelError: weights are missing, or have another shape.
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
    # transformers leaves out tied weights, and weights that the class says may be missing.
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
