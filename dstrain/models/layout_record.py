"""A record of the layout of a model's files, for exports from a checkpoint without the model.

When transformers saves a model, it reverts the conversions of names and weights that it applied
when it loaded the model; so they depend on how the model was made, and not on its config alone. A
checkpoint records them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.core.errors import ModelError, Problem
from dstrain.models.layout import Group, groups_of, save_conversions
from dstrain.models.skeleton import module_without_memory


def record_layout(module: Any) -> list[dict[str, Any]] | None:
    """Return the conversions that saving this model reverts, as plain values.

    Returns:
        None if neither this model nor its architecture has any conversions.
    """
    from dstrain.models.compat import described, given_patterns

    conversions = save_conversions(module)
    record = [{**described(c), "given": given_patterns(c)} for c in conversions]
    return record if record or _known_conversions(module) else None


@dataclass(frozen=True)
class RecordedLayout:
    """Layout of the files of a model that is not in memory.

    Attributes:
        groups: as ``groups_of`` returns for the model, with tensors on the meta device.
        first_names: each name of a parameter -> the parameter's first name.
    """

    groups: list[Group]
    first_names: dict[str, str]


def recorded_layout(
    folder: Path, record: list[dict[str, Any]] | None, parameters: Mapping[str, tuple[int, ...]]
) -> RecordedLayout:
    """Return the layout of a model from the ``config.json`` of a folder and a record.

    Args:
        folder: the folder with the config.
        record: as ``record_layout`` returned; None uses the conversions of a model that was built
            from its config.
        parameters: shapes of the model's parameters by their first names.

    Raises:
        ModelError: transformers does not have this architecture or this conversion, or the model
            had other parameters than its config says.
    """
    module = module_without_memory(folder)
    _untie(module, parameters)
    here = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if here != dict(parameters):
        odd = sorted({n for n, _ in here.items() ^ parameters.items()})
        raise ModelError(
            Problem(
                f"{odd[0]} is not as {folder / 'config.json'} says",
                f"{len(odd)} parameters of the model had other names or shapes",
            )
        )
    if record is not None:
        module._weight_conversions = _chosen(module, record, folder)
    first = {id(p): name for name, p in module.named_parameters()}
    names = module.named_parameters(remove_duplicate=False)
    return RecordedLayout(groups_of(module), {name: first[id(p)] for name, p in names})


def _untie(module: torch.nn.Module, parameters: Mapping[str, Any]) -> None:
    """Give separate parameters to names that were not tied in the saved model.

    Args:
        module: the model, whose config may tie them.
        parameters: first names of the saved model's parameters.
    """
    first = {id(p): name for name, p in module.named_parameters()}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name in parameters and first[id(parameter)] != name:
            path, _, attribute = name.rpartition(".")
            untied = torch.nn.Parameter(torch.empty_like(parameter))
            setattr(module.get_submodule(path), attribute, untied)


def _chosen(module: Any, record: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Return the conversions of the installed transformers that a record names.

    Raises:
        ModelError: the installed transformers does not have one of them.
    """
    from dstrain.models.compat import (
        WeightRenaming,
        described,
        get_model_conversion_mapping,
        marked_as_used,
    )

    known = get_model_conversion_mapping(module)
    chosen = []
    for wanted in record:
        given = wanted["given"]
        found = next((c for c in known if {**described(c), "given": given} == wanted), None)
        if found is None and wanted["kind"] == WeightRenaming.__name__:
            found = WeightRenaming(**given)  # from the key_mapping with which the user loaded it
        if found is None:
            raise ModelError(
                Problem(
                    f"{folder} was saved with the conversion of {wanted['sources']} to "
                    f"{wanted['targets']}",
                    "this version of transformers does not have it",
                    "use the version that stands in the manifest",
                )
            )
        chosen.append(marked_as_used(found))
    return chosen


def _known_conversions(module: Any) -> list[Any]:
    """Return the conversions that transformers has for a model's architecture."""
    if not hasattr(module, "save_pretrained"):
        return []
    from transformers import PreTrainedModel

    from dstrain.models.compat import get_model_conversion_mapping

    if not isinstance(module, PreTrainedModel):
        return []
    known: list[Any] = get_model_conversion_mapping(module, add_legacy=False)
    return known
