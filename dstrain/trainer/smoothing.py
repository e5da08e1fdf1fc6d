"""The loss with smoothed labels, which the model itself does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.adapters import inner_model
from dstrain.core.errors import ModelError, Problem
from dstrain.core.log import get_logger
from dstrain.data import IGNORED, Targets

logger = get_logger(__name__)


@dataclass(frozen=True)
class LabelSmoothing:
    """Mean cross entropy against (1 - share) x the target + share x all classes alike.

    The same as transformers' ``LabelSmoother``, over the same targets: those that ``Targets``
    counts, so that micro-batches are weighted as ever.

    Attributes:
        share: of the probability that is spread.
        shifted: whether the model predicts token t from tokens before it.
    """

    share: float
    shifted: bool

    @staticmethod
    def of(model: Any, args: TrainingArguments, targets: Targets) -> LabelSmoothing | None:
        """What the arguments ask for; None for none, and for several labels at once."""
        if not args.label_smoothing_factor:
            return None
        config = getattr(model, "config", None)
        if getattr(config, "problem_type", None) == "multi_label_classification":
            logger.warning(
                "label_smoothing_factor=%s is off: it spreads one label over all classes, and "
                "multi-label classification has several",
                args.label_smoothing_factor,
            )
            return None
        return LabelSmoothing(args.label_smoothing_factor, targets.shifted)

    def __call__(self, model: Any, module: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
        """Run the model without labels; the smoothed loss and the outputs.

        Args:
            model: what to call.
            module: the core model, which knows how to shift labels into a decoder's inputs.
            inputs: the batch; not changed.

        Raises:
            ModelError: no labels in the batch, or none that are class indices, or no logits.
        """
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get("labels"), torch.Tensor):
            raise self._useless("the batch has no labels")
        given = dict(inputs)
        labels = given.pop("labels")
        if labels.is_floating_point():
            raise self._useless("the labels are no class indices")
        shift = getattr(inner_model(module), "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(given):
            given["decoder_input_ids"] = shift(labels=labels)
        outputs = model(**given)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
        if not isinstance(logits, torch.Tensor):
            raise self._useless("the model returned no logits")
        if self.shifted and labels.dim() > 1:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.share,
        )
        return loss, outputs

    def _useless(self, why: str) -> ModelError:
        what = f"label_smoothing_factor={self.share}"
        return ModelError(Problem(what, why, "leave it out, or compute the loss in compute_loss"))
