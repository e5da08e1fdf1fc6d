"""``SentenceTransformerTrainingArguments``: additional arguments of embedding models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dstrain.arguments.dicts import read_dicts
from dstrain.arguments.fields import arg
from dstrain.arguments.training_arguments import TrainingArguments
from dstrain.arguments.treatment import implemented, pending
from dstrain.core.errors import Problem, nearest

BATCH_SAMPLERS = ("batch_sampler", "no_duplicates", "no_duplicates_hashed", "group_by_label")
MULTI_DATASET_SAMPLERS = ("proportional", "round_robin")


@dataclass(repr=False)
class SentenceTransformerTrainingArguments(TrainingArguments):
    """Embedding models: prompts, batch samplers, routes and learning rates by name."""

    _VALID_DICT_FIELDS: ClassVar[tuple[str, ...]] = (
        *TrainingArguments._VALID_DICT_FIELDS,
        "router_mapping",
        "learning_rate_mapping",
    )

    # As sentence-transformers documents it: the owner's default.
    hub_private_repo: bool | None = arg(
        None,
        "Create the repository as a private one; none takes the owner's default.",
        treatment=implemented(),
    )
    prompts: dict[str, Any] | str | None = arg(
        None,
        "Text put before every text, or a dict of it by column, by dataset, or by dataset and "
        "column.",
        treatment=pending("the embedding task"),
    )
    # Any is a class of samplers, or a function that creates one.
    batch_sampler: Any | str | None = arg(
        "batch_sampler",
        f"Batch sampler: {', '.join(BATCH_SAMPLERS)}, a class or a function.",
        treatment=pending("the embedding task"),
    )
    multi_dataset_batch_sampler: Any | str | None = arg(
        "proportional",
        f"Order of datasets: {', '.join(MULTI_DATASET_SAMPLERS)}, a class or a function.",
        treatment=pending("the embedding task"),
    )
    router_mapping: dict[str, Any] | str | None = arg(
        {},
        "Route of each column, or of each column of each dataset.",
        treatment=pending("the embedding task"),
    )
    learning_rate_mapping: dict[str, float] | str | None = arg(
        {},
        "Learning rate by regular expression over parameter names.",
        treatment=pending("the embedding task"),
    )

    def _validate(self) -> None:
        for name, default in (
            ("batch_sampler", "batch_sampler"),
            ("multi_dataset_batch_sampler", "proportional"),
            ("router_mapping", {}),
            ("learning_rate_mapping", {}),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        super()._validate()

    def _read_values(self) -> dict[str, Problem]:
        return read_dicts(self, ("prompts",), texts=("prompts",)) | super()._read_values()

    def _problems(self) -> list[Problem]:
        problems = super()._problems()
        for name, known in (
            ("batch_sampler", BATCH_SAMPLERS),
            ("multi_dataset_batch_sampler", MULTI_DATASET_SAMPLERS),
        ):
            value = getattr(self, name)
            if isinstance(value, str) and value not in known:
                close = nearest(value, set(known))
                problems.append(
                    Problem(
                        f"{name}={value!r}",
                        f"expected one of {', '.join(known)}, a class or a function",
                        f"did you mean {close!r}?" if close else "",
                    )
                )
            elif not isinstance(value, str) and not callable(value):
                problems.append(Problem(f"{name}={value!r}", "expected a name, class or function"))
        assert not isinstance(self.learning_rate_mapping, str), "parsed on construction"
        for pattern, rate in (self.learning_rate_mapping or {}).items():
            if not isinstance(rate, (int, float)) or isinstance(rate, bool) or rate < 0:
                problems.append(
                    Problem(f"learning_rate_mapping[{pattern!r}]={rate!r}", "0 or more is needed")
                )
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, without samplers that are classes or functions."""
        values = super().to_dict()
        for name in ("batch_sampler", "multi_dataset_batch_sampler"):
            if callable(values[name]):
                del values[name]
        return values
