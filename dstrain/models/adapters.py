"""Saving and merging of PEFT adapters at every ZeRO stage.

Saving gathers only the parameters of the adapter; the frozen base model stays partitioned. Merging
gathers one layer of the model at a time.
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
from dstrain.core.ranks import Ranks, all_or_none, broadcast_object
from dstrain.engine import gathered, kept_gathered
from dstrain.models.tensor_file import Stored, write_tensor_file

logger = get_logger(__name__)

WEIGHTS = "adapter_model.safetensors"


def save_adapters(model: Any, target: Path, ranks: Ranks) -> None:
    """Write config and weights of each adapter, and the model card; a collective of all ranks.

    The adapter "default" is written into ``target``, any other into a folder of its name in
    ``target``. The main rank collects the weights in its memory and writes them.

    Args:
        model: a PEFT model.
        target: the folder.
        ranks: rank of this process, and the number of ranks.

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
        tensors = _gathered_adapter(model, adapter, ranks)
        with all_or_none():
            if ranks.is_main:
                with _named_errors(folder):
                    _write(model, adapter, tensors, folder)


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` in the block into an error that names the folder.

    Raises:
        ModelError: instead of the ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise ModelError(
            unwritten(f"the adapter cannot be written into {str(folder)!r}", folder, error)
        ) from error


def _write_card(model: Any, folder: Path) -> None:
    """Write peft's model card or update an existing one, as peft does when it saves.

    A ``README.md`` that is no model card is the user's, and is left as it is with a warning.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        model.create_or_update_model_card(str(folder))
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s is left as it is: %s", folder / "README.md", error)


def _gathered_adapter(model: Any, adapter: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return copies of an adapter's tensors by their saved names; a collective of all ranks.

    peft selects and names the tensors. It gets the parameters themselves, partitioned or not, which
    are then gathered one by one.

    Returns:
        tensors in host memory on the main rank; {} on the other ranks.
    """
    named = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in named.items()}
    chosen: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in _named_by_peft(model, adapter, named, ranks).items():
        if id(tensor) in names:
            chosen[key] = names[id(tensor)]
        elif ranks.is_main:
            tensors[key] = _copied(tensor)
    for key, name in broadcast_object(chosen).items():
        tensor = named[name]
        whole = isinstance(tensor, torch.nn.Parameter)
        with gathered([tensor]) if whole else contextlib.nullcontext():
            if ranks.is_main:
                tensors[key] = _copied(tensor)
    return tensors


def _named_by_peft(
    model: Any, adapter: str, named: dict[str, Any], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """Return the tensors that peft saves of an adapter, by name; on the main rank.

    Saved prompts are computed in a forward pass of the prompt encoder. All ranks run it, since it
    gathers parameters at stage 3.
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
            # With "auto" peft may ask the hub whether embeddings were resized; once is enough.
            save_embedding_layers="auto" if ranks.is_main else False,
        )
        return dict(saved)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Switch a module to evaluation mode inside the block.

    Dropout would make saved values random, and change the random numbers of later training.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a tensor in host memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(model: Any, adapter: str, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter's weights and config into a folder, as peft's ``save_pretrained`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    try:
        stored = [Stored.of(name, tensor) for name, tensor in tensors.items()]
        write_tensor_file(partial, stored, {"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    inner = inner_model(model)
    config = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(inner, "name_or_path", None) or None
    mapping = None
    if config.task_type is None:  # peft then needs these to find the class of the model
        kind = type(inner)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)


# --- merging -------------------------------------------------------------------------------------


def merge_adapters(model: Any) -> None:
    """Add the active adapters to the base model's weights, in place; a collective of all ranks.

    At stage 3, gathers one layer at a time.

    Raises:
        ModelError: the model is no PEFT model, or its adapters cannot be added to weights (such as
            prompts).
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
    """Return the base model of a PEFT model after ``merge_adapters``.

    The PEFT model must not be used afterwards.
    """
    tuner = model.base_model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        below: torch.nn.Module = type(tuner).merge_and_unload(tuner)
    return below


def _outermost(module: torch.nn.Module) -> Iterator[Any]:
    """Yield the layers with adapters, except those inside of another such layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for child in module.children():
        if isinstance(child, BaseTunerLayer):
            yield child
        else:
            yield from _outermost(child)
