"""What the resolver must know about the world and the model; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model's parameters, counted in elements.

    Attributes:
        num_parameters: all parameters, shared ones once.
        num_trainable: those with gradients.
        largest: elements of the largest parameter.
        largest_vector: elements of the largest parameter with one dimension (a norm or a bias).
    """

    num_parameters: int
    num_trainable: int
    largest: int
    largest_vector: int

    @staticmethod
    def of_shapes(shapes: Iterable[tuple[tuple[int, ...], bool]]) -> ModelFacts:
        """Facts of a sequence of (shape, requires gradient)."""
        total = trainable = largest = vector = 0
        for shape, requires_grad in shapes:
            numel = 1
            for side in shape:
                numel *= side
            total += numel
            trainable += numel if requires_grad else 0
            largest = max(largest, numel)
            if len(shape) <= 1:
                vector = max(vector, numel)
        return ModelFacts(total, trainable, largest, vector)


@dataclass(frozen=True)
class Facts:
    """What is known when a config is resolved; None stands for "not known yet".

    Attributes:
        world_size: ranks over all machines.
        device: "cpu", "cuda" or another torch device type.
        num_training_steps: optimizer steps of the run.
        model: sizes of the parameters.
        own_optimizer: the user passes an optimizer object.
        own_scheduler: the user passes a schedule object.
        packages: optional packages of optimizers that can be imported.
    """

    world_size: int = 1
    device: str = "cuda"
    num_training_steps: int | None = None
    model: ModelFacts | None = None
    own_optimizer: bool = False
    own_scheduler: bool = False
    packages: Set[str] | None = None
