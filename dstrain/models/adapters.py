"""PEFT models at every ZeRO stage: saving the small trained parts alone, and merging them.

Saving gathers only the adapter's own parameters, as ``peft`` reads them; the frozen model below
stays partitioned. Merging gathers the model one layer at a time.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dstrain.core.adapters import has_adapters, inner_model
from dstrain.core.errors import ModelError, Problem
from dstrain.core.files import unwritten
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, gather_objects
from dstrain.engine import gathered, kept_gathered
from dstrain.models.tensor_file import Stored, write_tensor_file

logger = get_logger(__name__)

WEIGHTS = "adapter_model.safetensors"


def save_adapters(model: Any, target: Path, ranks: Ranks) -> None:
    """Write an adapter's config, weights and model card; a collective of all ranks.

    The adapter called "default" lies in ``target`` itself, another one in a folder of its name
    there. They go through the main rank's memory.

    Raises:
        ModelError: the folder cannot be written; raised on every rank.
    """
    with all_or_none():
        if ranks.is_main:
            with _named_errors(target):
                target.mkdir(parents=True, exist_ok=True)
                _write_card(model, target)
    for adapter in model.peft_config:
        folder = target if adapter == "default" else target / adapter
        held = _gathered_adapter(model, adapter, ranks)
        with all_or_none():
            if ranks.is_main:
                with _named_errors(folder):
                    _write(model, adapter, held, folder)


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError of the body into an error that names the folder.

    Raises:
        ModelError: in the place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise ModelError(
            unwritten(f"the adapter cannot be written into {str(folder)!r}", folder, error)
        ) from error


def _write_card(model: Any, folder: Path) -> None:
    """Write peft's model card, or add to the one that is there, as peft's own saving does.

    A ``README.md`` that is no model card stays as it is: it is the user's, and no reason to lose
    weights.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        model.create_or_update_model_card(str(folder))
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s is left as it is: %s", folder / "README.md", error)


def _gathered_adapter(model: Any, adapter: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by their saved names, in host memory of the main rank; else {}.

    Which they are, and what they are called, is peft's to say: it is handed the parameters
    themselves, partitioned or not.
    """
    named = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in named.items()}
    chosen: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    for key, tensor in _named_by_peft(model, adapter, named, ranks).items():
        if id(tensor) in names:
            chosen[key] = names[id(tensor)]
        elif ranks.is_main:
            held[key] = _copied(tensor)
    for key, name in gather_objects(chosen)[0].items():
        tensor = named[name]
        whole = isinstance(tensor, torch.nn.Parameter)
        with gathered([tensor]) if whole else contextlib.nullcontext():
            if ranks.is_main:
                held[key] = _copied(tensor)
    return held


def _named_by_peft(
    model: Any, adapter: str, named: dict[str, Any], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """Return the tensors that peft saves of an adapter, by name; on the main rank.

    Prompts come out of a forward pass, which all ranks make together: at stage 3 each gathers, and
    DeepSpeed compares the modules that ran.
    """
    from peft import get_peft_model_state_dict

    if not model.peft_config[adapter].is_prompt_learning:
        if not ranks.is_main:
            return {}
        return dict(get_peft_model_state_dict(model, state_dict=named, adapter_name=adapter))
    encoder = model.prompt_encoder[adapter]
    with kept_gathered(encoder), _evaluating(encoder), torch.no_grad():
        saved = get_peft_model_state_dict(
            model,
            state_dict=named,
            adapter_name=adapter,
            # Whether it was resized may take a look at the hub, which one rank has.
            save_embedding_layers="auto" if ranks.is_main else False,
        )
        return dict(saved)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off inside: saved values must not be random, nor change later random numbers."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(model: Any, adapter: str, held: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    try:
        tensors = [Stored.of(name, tensor) for name, tensor in held.items()]
        write_tensor_file(partial, tensors, {"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    inner = inner_model(model)
    config = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(inner, "name_or_path", None) or None
    mapping = None
    if config.task_type is None:  # peft finds the class of the model by these then
        kind = type(inner)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)


# --- merging -------------------------------------------------------------------------------------


def merge_adapters(model: Any) -> None:
    """Add the active adapters to the weights below, in place; a collective of all ranks.

    At stage 3 a rank holds one layer whole at a time.

    Raises:
        ModelError: not a PEFT model, or one whose adapter is not a part of its weights.
    """
    if not hasattr(getattr(model, "base_model", None), "merge_and_unload"):
        kind = type(model).__name__
        raise ModelError(
            Problem(
                f"merge_and_unload() with {kind}",
                "its adapter is no change of weights" if has_adapters(model) else "no PEFT model",
                "merge LoRA and its like; save_model() saves other adapters",
            )
        )
    for layer in _outermost(model):
        with gathered(layer.parameters(), write_from=0):
            layer.merge()


def without_adapters(model: Any) -> torch.nn.Module:
    """Return the model inside PEFT's, after ``merge_adapters``; do not use PEFT's any more."""
    tuner = model.base_model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        below: torch.nn.Module = type(tuner).merge_and_unload(tuner)
    return below


def _outermost(module: torch.nn.Module) -> Iterator[Any]:
    """Yield the layers that adapters change, without those inside of such a layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for child in module.children():
        if isinstance(child, BaseTunerLayer):
            yield child
        else:
            yield from _outermost(child)
