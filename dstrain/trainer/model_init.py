"""Making a new model for each training by ``model_init``."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError, ModelError, Problem
from dstrain.core.seeds import seed_everything
from dstrain.trainer import build


def check_source(
    model: object, model_init: Callable[..., object] | None, optimizers: tuple[object, object]
) -> None:
    """Refuse arguments that leave open which model is trained.

    Args:
        model: the model given to the Trainer, or None.
        model_init: the function given to the Trainer, or None.
        optimizers: optimizer and schedule given to the Trainer.

    Raises:
        ModelError: neither a model nor a function that makes one.
        ConfigError: both, or a function beside an optimizer of one model's parameters.
    """
    if model is None and model_init is None:
        raise ModelError(Problem("Trainer(model=None)", "a model, or model_init, is needed"))
    if model is not None and model_init is not None:
        raise ConfigError(
            Problem(
                "model and model_init were both passed",
                "train() starts from what model_init makes, so the model would be lost",
                "pass one of them",
            )
        )
    if model_init is not None and any(part is not None for part in optimizers):
        raise ConfigError(
            Problem(
                "model_init and optimizers were both passed",
                "each train() has a new model, and an optimizer holds the parameters of one",
                "pass optimizer_cls_and_kwargs, or override create_optimizer_and_scheduler",
            )
        )
    if model_init is not None:
        num_arguments(model_init)


def check_on_one_device(model: object) -> None:
    """Refuse a model whose layers lie on several devices.

    Raises:
        ModelError: naming the devices.
    """
    places = getattr(model, "hf_device_map", None) or {}
    devices = sorted({str(place) for place in places.values()})
    if len(devices) > 1:
        raise ModelError(
            Problem(
                f"the layers of the model lie on {', '.join(devices)}",
                "each rank drives one device; a model too large for one is partitioned by ZeRO",
                "load it without device_map, with zero_stage=3 inside dstrain.partitioned(args)",
            )
        )


def num_arguments(model_init: Callable[..., object]) -> int:
    """Count the arguments of ``model_init``: 0, or 1 where it takes the trial.

    Raises:
        ConfigError: it takes more than one.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model_init).parameters.values()
    number = len([p for p in parameters if p.kind in kinds])
    if number > 1:
        raise ConfigError(
            Problem(
                f"model_init takes {number} arguments",
                "it is called with the trial of a hyperparameter search, or with nothing",
                "give it no argument, or one; functools.partial fills the others",
            )
        )
    return number


def fresh_model(
    make: Callable[[object], torch.nn.Module | None], args: TrainingArguments, trial: object
) -> torch.nn.Module:
    """Make a new model from the run's seed, partitioned while it is built at stage 3.

    Raises:
        ModelError: the function returned none.
    """
    seed_everything(args.seed)
    with build.partitioned(args):
        model = make(trial)
    if model is None:
        raise ModelError(Problem("model_init returned None", "it must return the model"))
    return model
