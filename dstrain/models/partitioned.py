"""Building and loading of partitioned models of transformers, without a whole model on any rank.

Both use the code of transformers, so that weights, names and initialisation are the same;
parameters are partitioned on the way.

To load a model, it is built without memory and filled tensor by tensor; each parameter is
partitioned as soon as it has its values. Each rank reads the checkpoint itself: only its partition
of a tensor that is stored in the form in which it is trained, and whole weights, one group at a
time, where they must be merged or reordered. To build a model from a config, it is partitioned
module by module; each module is gathered again to be initialised.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import ModelError, Problem
from dstrain.core.ranks import gather_objects, require_equal
from dstrain.engine import (
    BuildRegistration,
    Partitioner,
    building_whole_models,
    fill_with_placeholder,
    gathered,
    is_partitioned,
    is_whole,
    scalars_as_bytes,
    with_full_shapes,
)
from dstrain.models import compat
from dstrain.models.constructors import ValuesForConstructors
from dstrain.models.guard import guard_partitioned


@contextlib.contextmanager
def building_partitioned(resolved: ResolvedConfig) -> Iterator[None]:
    """Let transformers build and load partitioned models inside the block, if the stage is 3.

    At any other stage models are whole inside, even within an outer block of stage 3.
    """
    with BuildRegistration(resolved) as mark, scalars_as_bytes(wanted=resolved.stage == 3):
        if resolved.stage != 3:
            steps = dict.fromkeys(compat.LOADING_STEPS, _unchanged)
            with compat.with_loading_steps(steps if compat.has_loading_steps() else {}):
                yield
            return
        loader = _Loader(Partitioner(mark.config))
        steps = {
            "from_pretrained": loader.from_pretrained,
            "_from_config": loader.from_config,
            "_load_pretrained_model": loader.load,
            "_finalize_model_loading": loader.finalize,
            "set_param_for_module": loader.set_parameter,
            "initialize_weights": loader.initialize,
            "_initialize_weights": loader.initialize_module,
        }
        try:
            with compat.with_loading_steps(steps), ValuesForConstructors():
                yield
        finally:
            loader.is_open = False


def _unchanged(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a step of transformers unchanged."""
    return original(*args, **kwargs)


class _Loader:
    """Replacements for steps of transformers that build and load models, one model at a time.

    Each method but ``open_partitioner`` gets the original step as its first argument.
    """

    def __init__(self, partitioner: Partitioner) -> None:
        """Begin while no model is being built or loaded."""
        self.is_open = True  # until the block ends
        self._partitioner = partitioner
        self._depth = 0
        self._builds = False
        self._has_exchanged_errors = False
        self._whole_modules: set[str] = set()
        self._missing: set[str] = set()
        self._loaded: set[int] = set()

    def open_partitioner(self) -> Partitioner | None:
        """Return the partitioner, which resized weights need; None once the block has ended."""
        return self._partitioner if self.is_open else None

    def from_config(self, original: Callable[..., Any], cls: Any, *args: Any, **kw: Any) -> Any:
        """Build a model from a config, partitioning each module; a collective of all ranks."""
        if self._depth:  # a part of a model that is being built
            return original(cls, *args, **kw)
        self._loaded, self._missing = set(), set()
        self._depth, self._builds = 1, True
        try:
            with compat.in_context_of_zero(_initialized), self._partitioner.building():
                model = original(cls, *args, **kw)
        finally:
            self._depth, self._builds = 0, False
        self._missing = {name for name, _ in model.named_buffers()}
        self._split_rest(model)
        guard_partitioned(model, open_partitioner=self.open_partitioner)
        return model

    def initialize(self, original: Callable[..., Any], model: Any) -> None:
        """Initialise all modules of a model."""
        shapes = with_full_shapes(model.parameters()) if self._builds else contextlib.nullcontext()
        with shapes:
            original(model)

    def initialize_module(
        self, original: Callable[..., Any], model: Any, module: torch.nn.Module, *args: Any
    ) -> None:
        """Initialise a module while its parameters are gathered; a collective of all ranks.

        All ranks take the values that the main rank draws.
        """
        if not self._builds or getattr(module, "_is_hf_initialized", False):
            original(model, module, *args)
            return
        near = _parameters_near(module)
        # Some models gather by themselves in their initialisation while stage 3 is registered.
        with gathered(near, write_from=0), building_whole_models():
            original(model, module, *args)
        for parameter in near:
            fill_with_placeholder(parameter)

    def from_pretrained(self, original: Callable[..., Any], cls: Any, *args: Any, **kw: Any) -> Any:
        """Load a model, partitioning each parameter; a collective of all ranks.

        Raises:
            ModelError: another rank could not load the model, or the arguments have a device map.
        """
        if self._depth:  # a part of a model that is being built
            return original(cls, *args, **kw)
        _check_placement(kw)
        self._has_exchanged_errors, self._missing, self._loaded = False, set(), set()
        self._depth += 1
        try:
            with building_whole_models():
                loaded = original(cls, *args, **kw)
        except Exception as error:
            if not self._has_exchanged_errors:  # the other ranks exchange errors in ``finalize``
                self._exchange_errors(error)
            raise
        finally:
            self._depth -= 1
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        self._split_rest(model)
        guard_partitioned(model, open_partitioner=self.open_partitioner)
        return loaded

    def load(self, original: Callable[..., Any], model: Any, *args: Any, **kw: Any) -> Any:
        """Read the checkpoint, and record which modules have tied weights.

        No rank waits for another.
        """
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._whole_modules = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
        return original(model, *args, **kw)

    def set_parameter(
        self, original: Callable[..., Any], model: Any, name: str, *args: Any, **kw: Any
    ) -> None:
        """Put a parameter of the checkpoint into the model, and partition it.

        Weights that may be tied stay whole until they are tied, since transformers compares them
        then, and pads the bias of the same module.
        """
        original(model, name, *args, **kw)
        if not self._depth:
            return
        path, _, attribute = name.rpartition(".")
        parameter = getattr(model.get_submodule(path), attribute, None)
        if isinstance(parameter, torch.nn.Parameter) and parameter.device.type != "meta":
            self._loaded.add(id(parameter))
            if path not in self._whole_modules:
                self._partitioner.split(parameter)

    def finalize(
        self, original: Callable[..., Any], model: Any, load_config: Any, info: Any
    ) -> Any:
        """Initialise weights that the checkpoint lacks, and tie weights; a collective.

        Raises:
            ModelError: another rank could not read the checkpoint, or ranks lack other weights.
        """
        if not self._depth:
            return original(model, load_config, info)
        self._has_exchanged_errors = True
        self._exchange_errors(None)
        self._missing = set(info.missing_and_mismatched())
        digest = hashlib.sha256("\n".join(sorted(self._missing)).encode()).hexdigest()
        require_equal("what the model's checkpoint lacks", digest, ModelError)
        # transformers initialises module by module, and some modules read their other weights.
        near = _read_by_init(model, self._missing)
        with gathered(near), with_full_shapes(model.parameters()):
            return original(model, load_config, info)

    def _exchange_errors(self, error: Exception | None) -> None:
        """Check that all ranks have read the checkpoint; a collective.

        Args:
            error: this rank's error, if it could not read the checkpoint.

        Raises:
            ModelError: another rank could not, and this one could.
        """
        message = None if error is None else f"{type(error).__name__}: {error}"
        answers = gather_objects((message, self._partitioner.next_number))
        # A rank that failed has numbered fewer parameters than the others.
        self._partitioner.next_number = max(number for _, number in answers)
        for rank, (failure, _) in enumerate(answers):
            if failure is not None and error is None:
                raise ModelError(Problem(f"the model cannot be loaded on rank {rank}", failure))

    def _split_rest(self, model: torch.nn.Module) -> None:
        """Partition parameters that are still whole, and move buffers to this rank's device.

        Parameters and buffers that the checkpoint lacks get the main rank's values, since ranks may
        have drawn different ones.
        """
        for parameter in model.parameters():
            if id(parameter) in self._loaded:
                self._partitioner.split(parameter)
            else:
                self._partitioner.split_like_main_rank([parameter])
        for name, buffer in model.named_buffers():
            if name in self._missing and buffer.is_floating_point():
                self._partitioner.send_from_main(buffer)
            else:
                buffer.data = buffer.data.to(self._partitioner.device)


def _check_placement(arguments: dict[str, Any]) -> None:
    """Check that arguments of ``from_pretrained`` have no device map."""
    if arguments.get("device_map") is None:
        return
    raise ModelError(
        Problem(
            f"from_pretrained(device_map={arguments['device_map']!r}) at ZeRO stage 3",
            "each rank keeps a share of every weight, on the device that it drives",
            "leave device_map out",
        )
    )


def _read_by_init(model: torch.nn.Module, lacking: set[str]) -> list[torch.nn.Parameter]:
    """Return the partitioned parameters that the initialisation of lacking weights may read.

    These are the parameters near the modules that lack weights, and near their parent modules.
    """
    paths = {name.rpartition(".")[0] for name in lacking}
    paths |= {path.rpartition(".")[0] for path in paths}
    found: dict[int, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        if name in paths:
            found |= {id(p): p for p in _parameters_near(module)}
    return list(found.values())


def _initialized(fill: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Initialise a tensor; a partitioned parameter on all ranks with the main rank's values.

    A collective of all ranks for a partitioned parameter.

    Args:
        fill: one of torch's functions for initialisation.
        tensor: the tensor.
        *args: further arguments of ``fill``.
        **kwargs: keyword arguments of ``fill``.
    """
    if not isinstance(tensor, torch.nn.Parameter) or is_whole(tensor):
        return fill(tensor, *args, **kwargs)
    stands_in = tensor.numel() > 0
    with gathered([tensor], write_from=0):
        fill(tensor, *args, **kwargs)
    if stands_in:
        fill_with_placeholder(tensor)
    return tensor


def _parameters_near(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the partitioned parameters of a module and its children.

    The initialisation of the module may read them.
    """
    found: dict[int, torch.nn.Parameter] = {}
    for part in (module, *module.children()):
        computed = getattr(part, "parametrizations", None)
        owners = [part] if computed is None else [part, *computed.modules()]
        for owner in owners:
            found |= {id(p): p for p in owner.parameters(recurse=False) if is_partitioned(p)}
    return list(found.values())
