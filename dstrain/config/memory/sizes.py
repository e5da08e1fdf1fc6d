"""Parameters of a model from its config alone: shapes, counts, and the form of a layer.

Closed forms are in ``closed_forms.py``. For other architectures ``dstrain.models.count`` builds the
model on the meta device, in a child process, and returns sizes in the same form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

PARTS = ("embedding", "layer", "head", "other")


@dataclass(frozen=True)
class Tensors:
    """Parameters of one shape.

    Attributes:
        part: part of the model, one of ``PARTS``.
        shape: shape of each of these parameters.
        count: number of these parameters in the model.
        trainable: whether they have gradients.
    """

    part: str
    shape: tuple[int, ...]
    count: int = 1
    trainable: bool = True

    @property
    def elements(self) -> int:
        """Return the elements of all these parameters."""
        return prod(self.shape) * self.count


@dataclass(frozen=True)
class Block:
    """Form of a transformer's layers, on which the size of activations depends.

    Attributes:
        layers: number of layers, of encoder and decoder together.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        ffn: width inside the feed-forward part (of one expert).
        gated: the feed-forward part multiplies two projections.
        rms_norm: normalisation is RMSNorm as in transformers (in fp32), else LayerNorm.
        norms: normalisations of width ``hidden`` per layer.
        qk_norm: queries and keys are normalised.
        activation_tensors: tensors of width ``ffn`` that the activation function keeps.
        experts_per_token: experts that each token passes.
        dropout: layers have dropout and keep its masks.
        cross_layers: layers with cross-attention, those of a decoder.
        fp32_loss: logits are converted to fp32 before the loss.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool = True
    rms_norm: bool = True
    norms: int = 2
    qk_norm: bool = False
    activation_tensors: int = 1
    experts_per_token: int = 1
    dropout: bool = False
    cross_layers: int = 0
    fp32_loss: bool = True


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model's parameters, counted in elements.

    Attributes:
        num_parameters: elements of all parameters, of shared ones once.
        num_trainable: elements of parameters with gradients.
        largest: elements of the largest parameter.
        largest_vector: elements of the largest parameter with one dimension (a norm or a bias).
    """

    num_parameters: int
    num_trainable: int
    largest: int
    largest_vector: int

    @staticmethod
    def of_shapes(shapes: Iterable[tuple[tuple[int, ...], bool]]) -> ModelFacts:
        """Return the counts of parameters, each given as (shape, requires gradient)."""
        total = trainable = largest = vector = 0
        for shape, requires_grad in shapes:
            numel = prod(shape)
            total += numel
            trainable += numel if requires_grad else 0
            largest = max(largest, numel)
            if len(shape) <= 1:
                vector = max(vector, numel)
        return ModelFacts(total, trainable, largest, vector)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model for the memory plan.

    Attributes:
        model_type: transformers' name of the architecture.
        source: "closed form", or another way by which the sizes were found.
        tensors: parameters of the model; shared ones once.
        vocab_size: logits per token; 0 for a model without a vocabulary.
        block: form of the layers; None if it is not known.
        text_only: ``block`` is of the text model only; the model has further parts, such as a
            vision tower, with activations that are not known.
    """

    model_type: str
    source: str
    tensors: tuple[Tensors, ...]
    vocab_size: int
    block: Block | None
    text_only: bool = False

    @property
    def facts(self) -> ModelFacts:
        """Return the counts that ``ModelFacts.of_shapes`` returns for the built model."""
        return ModelFacts(
            num_parameters=self.elements(),
            num_trainable=sum(t.elements for t in self.tensors if t.trainable),
            largest=max((prod(t.shape) for t in self.tensors), default=0),
            largest_vector=max(
                (prod(t.shape) for t in self.tensors if len(t.shape) <= 1), default=0
            ),
        )

    def elements(self, *parts: str) -> int:
        """Return the elements of the named parts, or of the whole model if none is named."""
        return sum(t.elements for t in self.tensors if not parts or t.part in parts)

    @property
    def layer_elements(self) -> int:
        """Return the elements of one layer, on average."""
        return self.elements("layer") // max(1, self.block.layers if self.block else 1)

    def elements_up_to(self, threshold: int) -> int:
        """Return the elements of all parameters that have at most ``threshold`` elements."""
        return sum(t.elements for t in self.tensors if prod(t.shape) <= threshold)

    def partition_elements(self, num_ranks: int) -> int:
        """Return the elements of one rank at stage 3, where each parameter is padded."""
        return sum(-(-prod(t.shape) // num_ranks) * t.count for t in self.tensors)

    def trainable_shard(self, num_ranks: int, stage: int) -> int:
        """Return the number of trainable elements whose optimizer states one rank has."""
        trainable = [t for t in self.tensors if t.trainable]
        if stage == 3:
            return sum(-(-prod(t.shape) // num_ranks) * t.count for t in trainable)
        return -(-sum(t.elements for t in trainable) // (num_ranks if stage else 1))

    @property
    def largest_gradient(self) -> int:
        """Return the elements of the largest trainable parameter."""
        return max((prod(t.shape) for t in self.tensors if t.trainable), default=0)

    @property
    def shared_at_boundary(self) -> float:
        """Return the expected elements of the parameter at a boundary of partitions."""
        squares = sum(prod(t.shape) ** 2 * t.count for t in self.tensors if t.trainable)
        return squares / max(1, self.facts.num_trainable)

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON data; ``from_dict`` reads it."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelSizes:
        """Return the sizes that ``to_dict`` wrote."""
        tensors = tuple(Tensors(**{**t, "shape": tuple(t["shape"])}) for t in data["tensors"])
        block = Block(**data["block"]) if data["block"] else None
        return ModelSizes(
            data["model_type"],
            data["source"],
            tensors,
            int(data["vocab_size"]),
            block,
            bool(data["text_only"]),
        )


def merged(tensors: Iterable[Tensors]) -> tuple[Tensors, ...]:
    """Return parameters with the counts of equal ones added up."""
    counts: dict[tuple[str, tuple[int, ...], bool], int] = {}
    for t in tensors:
        key = (t.part, t.shape, t.trainable)
        counts[key] = counts.get(key, 0) + t.count
    return tuple(Tensors(p, s, n, trainable) for (p, s, trainable), n in counts.items() if n)
