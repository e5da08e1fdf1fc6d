"""Reading of the user's DeepSpeed config: a preset, a path, JSON, a dict, or none."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstrain.core.errors import ConfigError, Problem, nearest
from dstrain.core.files import expanded, told_refused
from dstrain.core.secrets import is_mask, without_secrets


def read_config(given: Mapping[str, Any] | str | None) -> tuple[dict[str, Any], str]:
    """Return a copy of the user's config, and a label of its source for messages.

    Raises:
        ConfigError: a path or preset does not exist, a text is no JSON object, a key stands twice
            in one object (of which JSON parsers keep the last without a message), or a value is
            the mask that records of runs have in place of a credential.
    """
    config, label = _read_given(given)
    masks = list(_masks(config))
    if masks:
        raise ConfigError(
            [
                Problem(
                    f"{path} = {value} in {label}",
                    "records of runs have this in the place of a credential",
                    "leave the key out where the service reads a variable of its own, such as "
                    "COMET_API_KEY; or write the credential in",
                )
                for path, value in masks
            ]
        )
    return config, label


def _masks(config: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        path = f"{inside}.{name}" if inside else str(name)
        if isinstance(value, Mapping):
            yield from _masks(value, path)
        elif is_mask(str(name), value):
            yield path, value


def _read_given(given: Mapping[str, Any] | str | None) -> tuple[dict[str, Any], str]:
    """Return the config that a user gives in any form, and its label."""
    if given is None:
        return {}, "nothing"
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given)), "your config"
    if given.lstrip().startswith("{"):
        return _parse(given, "the JSON text of `deepspeed`"), "your config"
    path, refusal = expanded(given), None
    try:
        is_file = path.is_file()
    except OSError as error:  # the text is too long for a file name, or a folder is locked
        is_file, refusal = False, error
    if is_file:
        return _parse(_read(path), str(path)), f"your config ({path.name})"
    presets = {p.stem: p for p in preset_folder().glob("*.json")}
    if given in presets:
        return _parse(_read(presets[given]), given), f"preset {given}"
    if (text := _decoded(given)) is not None:
        return _parse(text, "the JSON in `deepspeed` (base64)"), "your config"
    if isinstance(refusal, PermissionError):
        with told_refused(ConfigError):
            raise refusal
    close = nearest(given, set(presets))
    raise ConfigError(
        Problem(
            f"deepspeed={given!r}",
            f"it is neither a file nor a preset ({', '.join(sorted(presets))})",
            f"did you mean {close!r}?"
            if close
            else "give the path of a JSON file, or a preset name",
        )
    )


def preset_folder() -> Path:
    """Return the folder of presets: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"


def _decoded(text: str) -> str | None:
    """Return the JSON in base64 text, as launchers pass it through shells; None for other text."""
    try:
        decoded = base64.urlsafe_b64decode(text).decode("utf-8").strip()
    except ValueError:
        return None
    return decoded if decoded.startswith("{") else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            Problem(f"deepspeed={str(path)!r}", f"cannot be read: {error}")
        ) from error


def _parse(text: str, label: str) -> dict[str, Any]:
    """Parse a JSON object, and refuse keys that stand twice."""
    repeated: list[str] = []

    def keep_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                both = [without_secrets(v, key) for v in (seen[key], value)]
                repeated.append(f"{key!r} (values {both[0]!r} and {both[1]!r})")
            seen[key] = value
        return seen

    try:
        config = json.loads(text, object_pairs_hook=keep_once)
    except json.JSONDecodeError as error:
        raise ConfigError(
            Problem(
                f"{label} is not valid JSON",
                f"{error.msg} at line {error.lineno}, column {error.colno}",
            )
        ) from error
    except RecursionError as error:
        raise ConfigError(
            Problem(f"{label} is nested too deep", "a DeepSpeed config has a few levels")
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            Problem(f"{label} holds a JSON {type(config).__name__}", "expected an object {...}")
        )
    if repeated:
        raise ConfigError(
            [
                Problem(
                    f"key {which} stands twice in {label}",
                    "JSON keeps only the last, so one of them would be lost without a word",
                    "keep one of them",
                )
                for which in repeated
            ]
        )
    return config
