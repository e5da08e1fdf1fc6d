"""The layout of a model's saved files: the tensors that they hold, their names and arrangement.

transformers stores some architectures otherwise than it trains them: under other names, or with
weights merged, split or transposed. The rules are its own (``revert_weight_conversion``); here they
are applied to groups of tensors that belong together, most of them of a single tensor, so that
nobody needs the whole model.
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
    """A tensor of the model under its name there."""

    name: str
    tensor: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return full_numel(self.tensor) * self.tensor.element_size()


@dataclass(frozen=True)
class Saved:
    """One tensor of the saved model, under its name in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return the bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors of the model that are saved together.

    Attributes:
        entries: of the model.
        saved: what becomes of them in the file.
    """

    entries: tuple[Entry, ...]
    saved: tuple[Saved, ...]
    _conversion: _Conversion | None = field(default=None, repr=False)

    def convert(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the saved tensors by name, of whole tensors in the order of ``entries``.

        They may share memory with ``tensors`` and with each other.
        """
        if self._conversion is None:
            return {self.saved[0].name: tensors[0]}
        converted = self._conversion.save(tensors).values()
        return {saved.name: t for saved, t in zip(self.saved, converted, strict=True)}

    @property
    def is_as_trained(self) -> bool:
        """Tell whether the file has the model's one tensor as it is, but for its name."""
        return self._conversion is None

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the model's tensors in the order of ``entries``, of the saved ones by name."""
        if self._conversion is None:
            return [tensors[self.saved[0].name]]
        return self._conversion.load([tensors[saved.name] for saved in self.saved])


def groups_of(module: torch.nn.Module) -> list[Group]:
    """Return everything that is saved of a module, in groups; one step per parameter.

    Names, shapes and formats are those of ``save_pretrained`` of the whole model.
    """
    entries, conversions = entries_of(module), save_conversions(module)
    if not conversions:
        return [_as_it_is(entry, entry.name) for entry in entries]
    from dstrain.models.compat import WeightConverter, WeightRenaming

    pairs = [(conversion, conversion.reverse_transform()) for conversion in conversions[::-1]]
    renamings = [saving for _, saving in pairs if isinstance(saving, WeightRenaming)]
    converters = [pair for pair in pairs if isinstance(pair[1], WeightConverter)]
    return _grouped(entries, module, renamings, converters)


def unsaved_remark(module: torch.nn.Module) -> str | None:
    """Say which entries of a module's ``state_dict`` the files of a saved model cannot hold.

    ``save_pretrained`` breaks off there with an AttributeError.

    Returns:
        a line that names it; None where all of it is tensors.
    """
    return remark_on([n for n, v in module.state_dict(keep_vars=True).items() if not _is_tensor(v)])


def remark_on(names: Sequence[str]) -> str | None:
    """Say that entries of a ``state_dict`` have no place in the files of a saved model.

    Args:
        names: of what is no tensor; without any there is nothing to say.
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
    """Find trained parameters that the files of a saved model would not hold.

    Hooks of the module have put another tensor into its ``state_dict``, or left the parameter out.

    Returns:
        their names.
    """
    saved = {id(entry.tensor) for entry in entries_of(module)}
    trained = ((n, p) for n, p in module.named_parameters() if p.requires_grad)
    return [name for name, parameter in trained if id(parameter) not in saved]


def weights_hooks_compute_with(module: torch.nn.Module, *, above: int) -> list[str]:
    """Find parameters that hooks of the ``state_dict`` replace by a tensor computed of them.

    Where such parameters are partitioned, the hooks would see nothing of them. What a hook computes
    without a gradient and under another name is not noticed. The work grows with the number of
    entries.

    Args:
        module: the model, before it is partitioned.
        above: parameters of so many elements or fewer are left out.

    Returns:
        their names.
    """
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    with torch.enable_grad():
        state = module.state_dict(keep_vars=True)
    made = {n: t for n, t in state.items() if _is_tensor(t) and id(t) not in own}
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
    """Return parameters and persistent buffers, each shared tensor under one name.

    Raises:
        ModelError: hooks of the module have made tensors out of partitioned parameters, of which
            they saw nothing.
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
    absent = [n for n, p in module.named_parameters() if id(p) not in tensors and is_partitioned(p)]
    known = {id(t) for t in (*module.parameters(), *module.buffers())}
    if absent and any(key not in known and not t.numel() for key, t in tensors.items()):
        raise computed_of_parts(absent)


def computed_of_parts(names: Sequence[str]) -> ModelError:
    """Return the error for weights that hooks of a ``state_dict`` would compute with at stage 3."""
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
    return isinstance(value, torch.Tensor)


def _kept_name(names: list[str], dropped: Any) -> str:
    """Return the one of several names that ``save_pretrained`` keeps."""
    if len(names) == 1 or dropped is None:
        return names[0]
    return next((n for n in names if not dropped(n)), sorted(names)[-1])


def _dropped_aliases(module: Any) -> Any:
    """Return a test whether a name is left out where a tensor has others; None if none is."""
    if not hasattr(module, "save_pretrained"):
        return None
    import re

    from dstrain.models.compat import tied_weight_keys

    patterns = [re.compile(key) for key in tied_weight_keys(module)]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def save_conversions(module: Any) -> list[Any]:
    """Return the conversions of loading that saving reverts, in the order of loading; or [].

    The rule of ``revert_weight_conversion``: those that loading this model has used, or, for one
    that was built from a config, all of its architecture but changes of prefix.
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
    # transformers' own loader of stage 3 keeps those that matched nothing as well. Reverted, a
    # change of prefix among them would add one that the checkpoint did not have.
    return [c for c in conversions if c.was_used()]


def _grouped(
    entries: list[Entry], module: Any, renamings: list[Any], converters: list[tuple[Any, Any]]
) -> list[Group]:
    """Group the tensors that one use of a converter takes; the rest is only renamed.

    Args:
        entries: all of the model.
        module: the model.
        renamings: of saving.
        converters: each as it loads and as it saves.
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
            groups.setdefault(name, _as_it_is(entry, name))
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


def _as_it_is(entry: Entry, name: str) -> Group:
    shape = full_shape(entry.tensor)
    return Group((entry,), (Saved(name, shape, entry.tensor.dtype),))


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")


@dataclass(frozen=True)
class _Conversion:
    """A use of a converter of transformers on some tensors of a model.

    Attributes:
        key: the name by which transformers knows this use.
        loading: the converter as it loads.
        saving: the converter as it saves.
        patterns: of saving, the one that each tensor matches.
        names: of the tensors in the model.
        module: the model, whose config and shapes operations look at.
    """

    key: str
    loading: Any
    saving: Any
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    module: Any = field(repr=False)

    def save(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what is saved, in a fixed order, under the names that renamings begin with."""
        found = zip(self.patterns, self.names, tensors, strict=True)
        return self._run(self.saving, self.key, list(found))

    def load(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the model's tensors, of the tensors that ``save`` returns, in its order."""
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
        converter = copy.deepcopy(converter)  # it collects tensors
        for pattern, name, tensor in found:
            converter.add_tensor(key, name, pattern, tensor)
        made: dict[str, Any] = converter.convert(
            key, model=_Shapes(self.module), config=self.module.config
        )
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class _Shapes:
    """A stand-in for a model that reports whole shapes: a partitioned parameter is empty."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        return _without_memory(self._module.get_parameter(name))
