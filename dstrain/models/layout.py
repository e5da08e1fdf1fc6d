"""Layout of a model's saved files: names, shapes and conversion of the tensors in them.

transformers saves models of some architectures under other names, or with weights merged, split or
transposed (``revert_weight_conversion``). Here the same conversions are applied to one group of
related tensors at a time, usually of a single tensor, so that no rank needs the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dstrain.core.errors import ModelError, Problem
from dstrain.engine import full_numel, full_shape, is_partitioned


@dataclass(frozen=True)
class Entry:
    """A tensor of the model, with its name in the model."""

    name: str
    tensor: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return full_numel(self.tensor) * self.tensor.element_size()


@dataclass(frozen=True)
class Saved:
    """A tensor of the saved model, with its name in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes that the tensor takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """A group of tensors that are converted together when the model is saved.

    Attributes:
        entries: the tensors in the model.
        saved: the tensors in the file that they are converted to.
    """

    entries: tuple[Entry, ...]
    saved: tuple[Saved, ...]
    _conversion: _Conversion | None = field(default=None, repr=False)

    def convert(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert the model's tensors to those of the file.

        Args:
            tensors: whole tensors, in the order of ``entries``.

        Returns:
            the tensors of the file by name, which may share memory with ``tensors`` and with each
            other.
        """
        if self._conversion is None:
            return {self.saved[0].name: tensors[0]}
        converted = self._conversion.save(tensors).values()
        return {saved.name: t for saved, t in zip(self.saved, converted, strict=True)}

    @property
    def is_as_trained(self) -> bool:
        """Tell whether the group is one tensor that is saved unchanged except for its name."""
        return self._conversion is None

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Convert tensors of the file, given by name, to those of ``entries`` in their order."""
        if self._conversion is None:
            return [tensors[self.saved[0].name]]
        return self._conversion.load([tensors[saved.name] for saved in self.saved])


def groups_of(module: torch.nn.Module) -> list[Group]:
    """Return all tensors that are saved of a module, in groups.

    Names, shapes and number formats are those that ``save_pretrained`` would write. The time grows
    with the number of parameters.
    """
    entries, conversions = entries_of(module), save_conversions(module)
    if not conversions:
        return [_unchanged(entry, entry.name) for entry in entries]
    from dstrain.models.compat import WeightConverter, WeightRenaming

    pairs = [(conversion, conversion.reverse_transform()) for conversion in conversions[::-1]]
    renamings = [saving for _, saving in pairs if isinstance(saving, WeightRenaming)]
    converters = [pair for pair in pairs if isinstance(pair[1], WeightConverter)]
    return _grouped(entries, module, renamings, converters)


def unsaved_remark(module: torch.nn.Module) -> str | None:
    """Return a remark about entries of a module's ``state_dict`` that are no tensors.

    The files of a saved model cannot contain them; ``save_pretrained`` raises an AttributeError.

    Returns:
        a line that names them; None if all entries are tensors.
    """
    return remark_on([n for n, v in module.state_dict(keep_vars=True).items() if not _is_tensor(v)])


def remark_on(names: Sequence[str]) -> str | None:
    """Return a remark that a saved model cannot contain some entries of a ``state_dict``.

    Args:
        names: names of the entries that are no tensors.

    Returns:
        None without any names.
    """
    if not names:
        return None
    return (
        f"{len(names)} entries of the state_dict are no tensors ({', '.join(names[:3])}): the "
        "saved model is without them, as its files (safetensors) hold tensors alone, and loaded it "
        "has them as it is built. Checkpoints that can be resumed have extra state of plain "
        "values; to have it in a saved model let get_extra_state return a tensor"
    )


def weights_not_in_files(module: torch.nn.Module) -> list[str]:
    """Return the names of trained parameters that the files of a saved model would not contain.

    Hooks of the module have replaced them in its ``state_dict``, or removed them from it.
    """
    saved = {id(entry.tensor) for entry in entries_of(module)}
    trained = ((n, p) for n, p in module.named_parameters() if p.requires_grad)
    return [name for name, parameter in trained if id(parameter) not in saved]


def weights_hooks_compute_with(module: torch.nn.Module, *, above: int) -> list[str]:
    """Return the names of parameters that ``state_dict`` hooks replace by computed tensors.

    If such parameters are partitioned, the hooks compute with empty tensors. A tensor that a hook
    computes without gradients and under another name is not detected. The time grows with the
    number of entries.

    Args:
        module: the model, before it is partitioned.
        above: parameters with at most so many elements are left out.
    """
    known = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    with torch.enable_grad():
        state = module.state_dict(keep_vars=True)
    made = {n: t for n, t in state.items() if _is_tensor(t) and id(t) not in known}
    computes = any(tensor.grad_fn is not None for tensor in made.values())
    there = {id(value) for value in state.values()}
    return [
        name
        for name, parameter in module.named_parameters()
        if id(parameter) not in there
        and full_numel(parameter) > above
        and (computes or name in made)
    ]


def entries_of(module: torch.nn.Module) -> list[Entry]:
    """Return parameters and persistent buffers to save, each shared tensor under one name.

    Raises:
        ModelError: hooks of the module have computed tensors from partitioned parameters, which are
            empty.
    """
    unsaved = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    aliases: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if _is_tensor(tensor) and name not in unsaved:
            aliases.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    _check_made_of_whole(module, tensors)
    dropped = _dropped_aliases(module) if any(len(a) > 1 for a in aliases.values()) else None
    return [Entry(_kept_name(names, dropped), tensors[key]) for key, names in aliases.items()]


def _check_made_of_whole(module: torch.nn.Module, tensors: Mapping[int, torch.Tensor]) -> None:
    """Check that hooks have not computed tensors of a ``state_dict`` from partitioned parameters.

    Raises:
        ModelError: a partitioned parameter is missing, and there is an empty tensor instead.
    """
    absent = [n for n, p in module.named_parameters() if id(p) not in tensors and is_partitioned(p)]
    known = {id(t) for t in (*module.parameters(), *module.buffers())}
    if absent and any(key not in known and not t.numel() for key, t in tensors.items()):
        raise computed_of_parts(absent)


def computed_of_parts(names: Sequence[str]) -> ModelError:
    """Return the error for ``state_dict`` hooks that compute with partitioned parameters."""
    return ModelError(
        Problem(
            f"a saved model without {', '.join(names[:3])}",
            "hooks of the model put other tensors into its state_dict, made of the weights; at "
            "ZeRO stage 3 these are partitioned, and read as empty there",
            "train it at a stage below 3, or remove the hooks; checkpoints alone, without a saved "
            "model, are written with save_weights_with_checkpoint=False",
        )
    )


def _is_tensor(value: object) -> bool:
    """Tell whether a value is a tensor."""
    return isinstance(value, torch.Tensor)


def _kept_name(names: list[str], dropped: Any) -> str:
    """Return the name that ``save_pretrained`` keeps for a tensor with several names.

    Args:
        names: names of the tensor.
        dropped: as ``_dropped_aliases`` returns.
    """
    if len(names) == 1 or dropped is None:
        return names[0]
    return next((n for n in names if not dropped(n)), sorted(names)[-1])


def _dropped_aliases(module: Any) -> Any:
    """Return a predicate for names that are left out if a tensor has other names too.

    Returns:
        None for a module that is no model of transformers.
    """
    if not hasattr(module, "save_pretrained"):
        return None
    import re

    from dstrain.models.compat import tied_weight_keys

    patterns = [re.compile(key) for key in tied_weight_keys(module)]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def save_conversions(module: Any) -> list[Any]:
    """Return the conversions that saving reverts, in the order in which loading applies them.

    By the rule of ``revert_weight_conversion``, these are the conversions that loading this model
    has used. For a model that was built from a config, they are all conversions of its architecture
    except changes of prefix.
    """
    if not hasattr(module, "save_pretrained"):
        return []
    from transformers import PreTrainedModel

    from dstrain.models.compat import PrefixChange, get_model_conversion_mapping

    if not isinstance(module, PreTrainedModel):
        return []
    conversions = getattr(module, "_weight_conversions", None)
    if conversions is None:
        mapping = get_model_conversion_mapping(module, add_legacy=False)
        return [c for c in mapping if not isinstance(c, PrefixChange)]
    # transformers' loader for stage 3 also records conversions that were not used. Reverting an
    # unused change of prefix would add a prefix that the checkpoint did not have.
    return [c for c in conversions if c.was_used()]


def _grouped(
    entries: list[Entry], module: Any, renamings: list[Any], converters: list[tuple[Any, Any]]
) -> list[Group]:
    """Return groups of the tensors that a converter takes together; the others are only renamed.

    Args:
        entries: all tensors of the model.
        module: the model.
        renamings: renamings that saving applies.
        converters: pairs of a converter for loading and its reverse for saving.
    """
    from dstrain.models.compat import apply_converters, apply_renamings, dot_natural_key

    by_pattern = {pattern: pair for pair in converters for pattern in pair[1].source_patterns}
    saving = [converter for _, converter in converters]
    groups: dict[str, Group] = {}
    uses: dict[str, list[tuple[str, Entry]]] = {}
    for entry in sorted(entries, key=lambda e: dot_natural_key(e.name)):
        key, pattern = apply_converters(entry.name, saving)
        if pattern is not None:
            uses.setdefault(key, []).append((pattern, entry))
        else:
            name = apply_renamings(entry.name, renamings)
            groups.setdefault(name, _unchanged(entry, name))
    for key, members in uses.items():
        patterns = tuple(pattern for pattern, _ in members)
        group = tuple(entry for _, entry in members)
        names = tuple(entry.name for entry in group)
        conversion = _Conversion(key, *by_pattern[patterns[0]], patterns, names, module)
        outcome = conversion.save([_without_memory(entry.tensor) for entry in group])
        saved = tuple(
            Saved(apply_renamings(name, renamings), tuple(t.shape), t.dtype)
            for name, t in outcome.items()
        )
        groups[key] = Group(group, saved, conversion)
    return list(groups.values())


def _unchanged(entry: Entry, name: str) -> Group:
    """Return a group of one tensor that is saved unchanged under a name."""
    shape = full_shape(entry.tensor)
    return Group((entry,), (Saved(name, shape, entry.tensor.dtype),))


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same whole shape and format on the meta device."""
    return torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class _Conversion:
    """An application of a converter of transformers to some tensors of a model.

    Attributes:
        key: the name under which transformers collects these tensors.
        loading: the converter for loading.
        saving: its reverse for saving.
        patterns: for each tensor the pattern of ``saving`` that its name matches.
        names: names of the tensors in the model.
        module: the model, whose config and shapes converters may read.
    """

    key: str
    loading: Any
    saving: Any
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    module: Any = field(repr=False)

    def save(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the converted tensors for the file, in a fixed order, before renaming."""
        found = zip(self.patterns, self.names, tensors, strict=True)
        return self._run(self.saving, self.key, list(found))

    def load(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the model's tensors in the order of ``names``, the reverse of ``save``.

        Args:
            tensors: tensors of the file, in the order in which ``save`` returns them.
        """
        from dstrain.models.compat import dot_natural_key

        shapes = _Shapes(self.module)
        names = self.save([shapes.get_parameter(name) for name in self.names])
        found, key = [], ""
        pairs = zip(names, tensors, strict=True)
        for name, tensor in sorted(pairs, key=lambda pair: dot_natural_key(pair[0])):
            key, pattern = self.loading.rename_source_key(name)
            found.append((pattern, name, tensor))
        made = self._run(self.loading, key, found)
        return [made[name] for name in self.names]

    def _run(
        self, converter: Any, key: str, found: list[tuple[str, str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Apply a converter to tensors, each with its pattern and name; return tensors by name."""
        converter = copy.deepcopy(converter)  # which collects tensors
        for pattern, name, tensor in found:
            converter.add_tensor(key, name, pattern, tensor)
        made: dict[str, Any] = converter.convert(
            key, model=_Shapes(self.module), config=self.module.config
        )
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class _Shapes:
    """A stand-in for a model whose parameters have their whole shapes, also if partitioned."""

    def __init__(self, module: Any) -> None:
        """Wrap a model."""
        self._module = module

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the model."""
        return getattr(self._module, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter's whole shape and format as a tensor on the meta device."""
        return _without_memory(self._module.get_parameter(name))
