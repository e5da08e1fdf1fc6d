"""Parameters of a model from its config alone: shapes, counts, and the form of a layer.

Closed forms are in ``closed_forms.py``; for every other architecture ``dstrain.models.count``
builds the model without memory in a process of its own and reports in the same form.
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
        part: where in the model, one of ``PARTS``.
        shape: of each of them.
        count: how many there are in the model.
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
    """The form of a transformer's layers, as far as activations depend on it.

    Attributes:
        layers: how many, those of an encoder and of a decoder together.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        ffn: width inside the feed-forward part (of one expert).
        gated: the feed-forward part multiplies two projections.
        rms_norm: RMSNorm in transformers' form (computed in fp32) and not LayerNorm.
        norms: normalisations of width ``hidden`` per layer.
        qk_norm: queries and keys are normalised.
        activation_tensors: tensors of width ``ffn`` that the activation function keeps.
        experts_per_token: experts that each token passes.
        dropout: whether masks are kept.
        cross_layers: layers with a second, cross attention (a decoder's).
        fp32_loss: logits are turned into fp32 before the loss.
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
        """Return the facts of a sequence of (shape, requires gradient)."""
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
    """Sizes of a model that planning needs.

    Attributes:
        model_type: transformers' name of the architecture.
        source: how the sizes were found.
        tensors: the parameters; shared ones once.
        vocab_size: entries of the logits; 0 for a model without a vocabulary.
        block: the form of its layers; None where it is not known.
        text_only: ``block`` is that of a text model among other parts, such as a vision tower,
            whose activations are not known.
    """

    model_type: str
    source: str
    tensors: tuple[Tensors, ...]
    vocab_size: int
    block: Block | None
    text_only: bool = False

    @property
    def facts(self) -> ModelFacts:
        """Return the facts that ``ModelFacts.of_shapes`` would find in the built model."""
        return ModelFacts(
            num_parameters=self.elements(),
            num_trainable=sum(t.elements for t in self.tensors if t.trainable),
            largest=max((prod(t.shape) for t in self.tensors), default=0),
            largest_vector=max(
                (prod(t.shape) for t in self.tensors if len(t.shape) <= 1), default=0
            ),
        )

    def elements(self, *parts: str) -> int:
        """Return the elements of the named parts, of the whole model without a name."""
        return sum(t.elements for t in self.tensors if not parts or t.part in parts)

    @property
    def layer_elements(self) -> int:
        """Return the elements of one layer, on average."""
        return self.elements("layer") // max(1, self.block.layers if self.block else 1)

    def elements_up_to(self, threshold: int) -> int:
        """Return the elements of all parameters that have at most ``threshold`` elements."""
        return sum(t.elements for t in self.tensors if prod(t.shape) <= threshold)

    def partition_elements(self, num_ranks: int) -> int:
        """Return the elements of one rank at stage 3, each parameter padded for itself."""
        return sum(-(-prod(t.shape) // num_ranks) * t.count for t in self.tensors)

    def trainable_shard(self, num_ranks: int, stage: int) -> int:
        """Return the trainable elements whose optimizer states one rank has."""
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
        """Return expected elements of a parameter that a partition's boundary cuts."""
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
    """Return the same parameters with equal ones counted together."""
    counts: dict[tuple[str, tuple[int, ...], bool], int] = {}
    for t in tensors:
        key = (t.part, t.shape, t.trainable)
        counts[key] = counts.get(key, 0) + t.count
    return tuple(Tensors(p, s, n, trainable) for (p, s, trainable), n in counts.items() if n)
