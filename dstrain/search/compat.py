"""Semi-private parts of transformers that this room uses, in one place."""

from transformers.trainer_utils import (
    BestRun,
    default_hp_space_optuna,
    default_hp_space_ray,
    default_hp_space_wandb,
)

__all__ = [
    "BestRun",
    "default_hp_space_optuna",
    "default_hp_space_ray",
    "default_hp_space_wandb",
]
