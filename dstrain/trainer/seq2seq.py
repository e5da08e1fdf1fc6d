"""``Seq2SeqTrainer``: evaluation and prediction on generated text."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.arguments import Seq2SeqTrainingArguments
from dstrain.core.errors import ConfigError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none, gather_objects
from dstrain.data import to_device
from dstrain.engine import bytes_to_gather, device_name, free_memory_bytes, kept_gathered
from dstrain.trainer.generation_config import why_not_saved
from dstrain.trainer.trainer import Trainer
from dstrain.training.types import Batch, Dataset, Nested, PlainState

logger = get_logger(__name__)

_DEFAULT_MAX_LENGTH = 20  # of generate(), where nothing else is said


class Seq2SeqTrainer(Trainer):
    """A ``Trainer`` that can evaluate what the model generates (``predict_with_generate``)."""

    args: Seq2SeqTrainingArguments
    _gen_kwargs: PlainState | None = None
    _synced = False  # whether ranks must generate in step, token by token

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any) -> None:
        """Begin as ``Trainer`` does, with ``Seq2SeqTrainingArguments``.

        Args:
            model: the model, as for ``Trainer``.
            args: ``Seq2SeqTrainingArguments``.
            *others: further arguments of ``Trainer`` by position.
            **kwargs: further arguments of ``Trainer`` by name.

        Raises:
            ConfigError: other arguments, a model that cannot generate, or a generation config that
                could not be saved with the model.
        """
        args = Seq2SeqTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise ConfigError(
                Problem(
                    f"Seq2SeqTrainer with {type(args).__name__}",
                    "it has no arguments about generation",
                    "pass Seq2SeqTrainingArguments",
                )
            )
        super().__init__(model, args, *others, **kwargs)
        if args.predict_with_generate and not hasattr(self.model, "generate"):
            raise ConfigError(
                Problem(
                    "predict_with_generate=True",
                    f"{type(self.model).__name__} has no method generate",
                    "use a model that can generate, or leave it out",
                )
            )
        if args.generation_config is not None:
            with all_or_none():
                config = self.load_generation_config(args.generation_config)
            self.model.generation_config = config

    @staticmethod
    def load_generation_config(gen_config_arg: Any) -> Any:
        """Load the ``GenerationConfig`` of the argument ``generation_config``.

        Args:
            gen_config_arg: a ``GenerationConfig``, or a file, folder or model to load one from.

        Raises:
            ConfigError: it cannot be read, or contradicts itself.
        """
        from transformers import GenerationConfig

        if isinstance(gen_config_arg, GenerationConfig):
            config = copy.deepcopy(gen_config_arg)
        else:
            path, name = Path(gen_config_arg), None
            if path.is_file():
                path, name = path.parent, path.name
            place = path if path.is_dir() else gen_config_arg
            try:
                config = GenerationConfig.from_pretrained(place, name)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    Problem(
                        f"generation_config={str(gen_config_arg)!r} cannot be read",
                        str(error),
                        "give a file or folder that save_pretrained wrote, or a model's name",
                    )
                ) from error
        if (why := why_not_saved(config)) is not None:  # with the model, after training
            raise ConfigError(
                Problem("generation_config contradicts itself", str(why), "mend these values")
            )
        return config

    def evaluate(
        self,
        eval_dataset: Dataset = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate as ``Trainer`` does; with ``predict_with_generate`` on generated tokens.

        Args:
            eval_dataset: see ``Trainer.evaluate``.
            ignore_keys: see ``Trainer.evaluate``.
            metric_key_prefix: see ``Trainer.evaluate``.
            **gen_kwargs: for ``generate``; ``max_length`` and ``num_beams`` default to
                ``generation_max_length`` and ``generation_num_beams``.
        """
        if self._named_parts(eval_dataset) is None:
            self._gen_kwargs = self._with_defaults(gen_kwargs)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        results: dict[str, float] = {}
        for name, part in (self._named_parts(eval_dataset) or {}).items():
            prefix = f"{metric_key_prefix}_{name}"
            results |= self.evaluate(part, ignore_keys, prefix, **gen_kwargs)
        return results

    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> Any:
        """Predict as ``Trainer`` does; with ``predict_with_generate`` generated tokens.

        Args:
            test_dataset: map-style dataset or stream; columns that the model does not use go.
            ignore_keys: outputs of the model that are no predictions; those that its config names
                if left out.
            metric_key_prefix: begins the name of each metric.
            **gen_kwargs: arguments for ``generate``, as in ``evaluate``. With
                ``num_return_sequences`` a sample has as many rows, one after the other.
        """
        self._gen_kwargs = self._with_defaults(gen_kwargs)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[torch.Tensor | None, Nested, Nested]:
        """Return loss, generated tokens and labels of one batch.

        Tokens and labels are padded with the pad token to the generation config's ``max_length``
        (or ``max_new_tokens`` + 1) where they are shorter.

        Args:
            model: what runs the forward pass for the loss.
            inputs: the batch, as the collator made it.
            prediction_loss_only: return the loss alone, and do not generate.
            ignore_keys: outputs that are no predictions, where nothing is generated.
            **gen_kwargs: for ``generate``, instead of those of ``evaluate`` or ``predict``.
        """
        if prediction_loss_only or not self.args.predict_with_generate:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not gen_kwargs:
            known = self._gen_kwargs
            gen_kwargs = self._with_defaults({}) if known is None else dict(known)
        gen_kwargs = {k: v for k, v in gen_kwargs.items() if v is not None}
        gen_kwargs.setdefault("synced_gpus", self._synced)
        labels = inputs.get("labels")
        with torch.no_grad():
            given = self._prepare_inputs(self._to_generate_from(inputs))
            generate: Callable[..., torch.Tensor] = getattr(self.model, "generate")  # noqa: B009
            tokens = self._padded(generate(**given, **gen_kwargs))
        if labels is None:
            return None, tokens, None
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        return loss, tokens, self._padded(to_device(labels, device_name(), float_dtype=None))

    def _to_generate_from(self, inputs: Mapping[str, Any]) -> dict[str, object]:
        """Return the batch without labels, and without decoder inputs that were made of them."""
        left_out = set(self.label_names) | {"labels"}
        labels, start = inputs.get("labels"), inputs.get("decoder_input_ids")
        if labels is not None and start is not None and labels.shape == start.shape:
            left_out |= {"decoder_input_ids", "decoder_attention_mask"}
        return {k: v for k, v in inputs.items() if k not in left_out}

    def _with_defaults(self, gen_kwargs: Mapping[str, object]) -> PlainState:
        kwargs, args = dict(gen_kwargs), self.args
        said = kwargs.get("max_length") or kwargs.get("max_new_tokens")
        if said is None and args.generation_max_length is not None:
            kwargs["max_length"] = args.generation_max_length
        if kwargs.get("num_beams") is None and args.generation_num_beams is not None:
            kwargs["num_beams"] = args.generation_num_beams
        return kwargs

    def _padded(self, tokens: torch.Tensor) -> torch.Tensor:
        config: Any = self.model.generation_config
        limit = _DEFAULT_MAX_LENGTH if config.max_length is None else config.max_length
        if tokens.shape[-1] >= limit and config.max_new_tokens is not None:
            limit = config.max_new_tokens + 1
        missing = limit - tokens.shape[-1]
        if missing <= 0:
            return tokens
        return torch.nn.functional.pad(tokens, (0, missing), value=self._pad_token_id())

    def _pad_token_id(self) -> int:
        """Return the token that fills short rows.

        Raises:
            ConfigError: neither the tokenizer nor the model knows one.
        """
        for source in (self.processing_class, getattr(self.model, "config", None)):
            for name in ("pad_token_id", "eos_token_id"):
                found = getattr(source, name, None)
                if isinstance(found, int):
                    return found
        raise ConfigError(
            Problem(
                "generated rows are of different lengths, and there is no pad token",
                "neither processing_class nor the model's config has pad_token_id",
                "set pad_token_id in the model's config",
            )
        )

    @contextlib.contextmanager
    def _model_for_evaluation(self, *, generates: bool) -> Iterator[torch.nn.Module]:
        """Give the block the model to evaluate; to generate at stage 3, whole if it fits."""
        with (
            super()._model_for_evaluation(generates=generates) as model,
            contextlib.ExitStack() as stack,
        ):
            split = generates and self.args.predict_with_generate and bytes_to_gather(self.model)
            self._synced = bool(split) and self.ranks.world_size > 1
            if split and self._gathers_once(split):
                # In step all the same: at each forward pass DeepSpeed compares between ranks the
                # order of modules, until it has seen the same one twice, which generating breaks.
                stack.enter_context(kept_gathered(self.model))
            yield model

    def _gathers_once(self, needed_bytes: int) -> bool:
        """Decide, alike on all ranks, whether to gather weights once to generate."""
        wanted = self.args.generation_gather_weights
        if wanted != "auto":
            return bool(wanted == "always")
        free = min(gather_objects(free_memory_bytes(self.ranks)))
        if not (fits := 2 * needed_bytes <= free) and self.ranks.is_main:
            logger.info(
                "generating gathers the weights for each token: whole they take %.1f GB, and a "
                "rank has %.1f GB free",
                needed_bytes / 1e9,
                free / 1e9,
            )
        return fits
