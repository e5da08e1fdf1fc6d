"""Short runs of the trainer for the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.models import RaggedTokens, pad_collate, tiny_llama

STAGES = (0, 1, 2, 3)


def make_trainer(
    folder: Path,
    *,
    stage: int | str = 2,
    model: torch.nn.Module | None = None,
    train: int = 16,
    evaluation: Any = 7,
    **arguments: Any,
) -> Any:
    """Make a trainer of a tiny llama on ``train`` samples, with ``evaluation`` to evaluate."""
    from dstrain import Trainer, TrainingArguments

    data = arguments.pop("data", None)
    callbacks = arguments.pop("callbacks", None)
    optimizers = arguments.pop("optimizers", (None, None))
    cls = arguments.pop("cls", Trainer)
    settings: dict[str, Any] = {
        "zero_stage": str(stage),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **arguments,
    }
    if isinstance(evaluation, int):
        evaluation = RaggedTokens(evaluation, seed=99) if evaluation else None
    return cls(
        tiny_llama() if model is None else model,
        TrainingArguments(str(folder), **settings),
        data_collator=pad_collate,
        train_dataset=RaggedTokens(train) if data is None else data,
        eval_dataset=evaluation,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def trainer_with_loss(loss_of: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Any:
    """Return a Trainer class whose loss and outputs are ``loss_of(trainer, model, inputs)``."""
    from dstrain import Trainer

    class OwnLoss(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            loss, outputs = loss_of(self, model, inputs)
            return (loss, outputs) if return_outputs else loss

    return OwnLoss


def losses(trainer: Any) -> list[float]:
    """Return the logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter, gathered at stage 3."""
    from dstrain.engine import gathered

    parameters = dict(trainer.model.named_parameters())
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def weights_digest(trainer: Any) -> str:
    """Hash the names and values of all parameters; a collective of all ranks at stage 3."""
    import xxhash

    digest = xxhash.xxh3_64()
    for name, weights in sorted(whole_weights(trainer).items()):
        digest.update(name.encode())
        digest.update(weights.float().numpy().tobytes())
    return digest.hexdigest()


_TIMES = ("tokens_per_second", "runtime", "samples_per_second", "steps_per_second")


def history(trainer: Any) -> list[dict[str, float]]:
    """Return the log history without times and speeds."""
    return [
        {k: v for k, v in entry.items() if not k.endswith(_TIMES)}
        for entry in trainer.state.log_history
    ]
