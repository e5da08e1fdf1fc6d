"""Computing the loss with smoothed labels, in place of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dstrain.arguments import TrainingArguments
from dstrain.core.adapters import inner_model
from dstrain.core.errors import ModelError, Problem
from dstrain.core.log import get_logger
from dstrain.data import IGNORED, LossTargets
from dstrain.training.model_outputs import loss_of
from dstrain.training.types import Batch, Nested

logger = get_logger(__name__)


@dataclass(frozen=True)
class LabelSmoothing:
    """Computes the mean cross entropy against (1 - share) x target + share x uniform.

    The same as transformers' ``LabelSmoother``, over the targets of the model's own loss.

    Attributes:
        share: share of the probability that is spread over all classes.
    """

    share: float

    @staticmethod
    def of(model: object, args: TrainingArguments) -> LabelSmoothing | None:
        """Make the smoothing that the arguments ask for; None without, or with several labels."""
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
        return LabelSmoothing(args.label_smoothing_factor)

    def __call__(
        self, model: torch.nn.Module, module: torch.nn.Module, inputs: Batch, targets: LossTargets
    ) -> tuple[torch.Tensor, Nested]:
        """Run the model without labels; return the smoothed loss and the outputs.

        As long as the targets of its own loss are not known it is given the labels too.

        Args:
            model: the engine or module to call.
            module: the core model, which knows how to shift labels into a decoder's inputs.
            inputs: the batch; not changed.
            targets: of the model's own loss.

        Raises:
            ModelError: no labels in the batch, or none that are class indices, or no logits.
        """
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get("labels"), torch.Tensor):
            raise self._useless("the batch has no labels")
        given = dict(inputs)
        labels = given["labels"]
        if targets.settled:
            del given["labels"]
        if labels.is_floating_point():
            raise self._useless("the labels are no class indices")
        shift = getattr(inner_model(module), "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(given):
            given["decoder_input_ids"] = shift(labels=labels)
        outputs = model(**given)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
        if not isinstance(logits, torch.Tensor):
            raise self._useless("the model returned no logits")
        found = targets.likely_rule(loss_of(outputs)).parts[0].targets(inputs)
        if found is None:
            raise self._useless("the model's own loss is no mean over its labels")
        kept, is_target = found
        if kept.shape[-1] < labels.shape[-1] and labels.dim() > 1:
            logits = logits[..., :-1, :]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, -2),
            kept.masked_fill(~is_target, IGNORED).flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.share,
        )
        return loss, outputs

    def _useless(self, why: str) -> ModelError:
        what = f"label_smoothing_factor={self.share}"
        return ModelError(Problem(what, why, "leave it out, or compute the loss in compute_loss"))
