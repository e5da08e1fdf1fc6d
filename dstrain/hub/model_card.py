"""Writing the model card of a run: results, data, arguments and versions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.config import ResolvedConfig
from dstrain.config.resolution.running import running_arguments
from dstrain.core.files import write_record
from dstrain.core.secrets import without_secrets
from dstrain.core.versions import installed, python_version

_LIBRARIES = ("dstrain", "deepspeed", "torch", "transformers", "datasets", "tokenizers", "peft")
# Not what describes a training: where it wrote, whom it told, what a launcher set.
_LEFT_OUT = {
    *("output_dir", "logging_dir", "run_name", "report_to", "local_rank", "do_train", "do_eval"),
    *("do_predict", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "disable_tqdm"),
    *("hub_private_repo", "hub_always_push", "resume_from_checkpoint", "overwrite_output_dir"),
    *("project", "log_level", "log_level_replica"),
}


@dataclass(frozen=True)
class CardWishes:
    """Holds the arguments of ``create_model_card``: what a user says about a model."""

    language: str | list[str] | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset: str | list[str] | None = None
    dataset_args: str | list[str] | None = None


@dataclass(frozen=True)
class CardFacts:
    """Holds the facts of a run that a card tells.

    Attributes:
        output_dir: the run's folder.
        model: the model that was trained.
        train_dataset: the data that it was trained on.
        log_history: ``log_history`` of ``TrainerState``.
        arguments: the values that ran, by name; see ``arguments_that_ran``.
    """

    output_dir: Path
    model: object
    train_dataset: object
    log_history: Sequence[dict[str, Any]]
    arguments: Mapping[str, object]


def write_card(facts: CardFacts, wishes: CardWishes) -> None:
    """Write ``README.md`` into the run's folder; tags and library of one that is there stay."""
    path = facts.output_dir / "README.md"
    write_record(path, card_of(facts, wishes, ask_hub=True))


def card_of(facts: CardFacts, wishes: CardWishes, *, ask_hub: bool = False) -> str:
    """Write the text of the model card, with its metadata on top.

    Args:
        facts: the facts of the run.
        wishes: what the user says.
        ask_hub: look up the licence of the model that this one came from.
    """
    from huggingface_hub import ModelCard, ModelCardData

    existing: Any = None
    before = facts.output_dir / "README.md"
    if before.is_file():
        with contextlib.suppress(Exception):  # a card of the user's that is no card for the hub
            existing = ModelCard.load(before).data
    base = wishes.finetuned_from or _base_model(facts.model)
    name = wishes.model_name or facts.output_dir.absolute().name
    datasets = _listed(wishes.dataset) or _dataset_names(facts.train_dataset)
    results = last_evaluation(facts.log_history)
    data = ModelCardData(
        language=wishes.language,
        license=wishes.license or (_license(base) if ask_hub else None),
        library_name=getattr(existing, "library_name", None) or _library(facts.model),
        tags=_tags(wishes, facts.model, existing),
        base_model=base,
        datasets=_listed(wishes.dataset_tags) or None,
        metrics=sorted(n for n in results if n != "loss") or None,
        pipeline_tag=None,
        model_name=name,
        eval_results=_index(wishes, datasets, results),
    )
    origin = "trained from scratch"
    if base is not None:
        origin = f"a fine-tuned version of [{base}](https://huggingface.co/{base})"
    on = f" on {', '.join(datasets)}" if datasets else ""
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {name}\n", f"This model is {origin}{on}.\n"]
    if results:
        parts.append("On the evaluation set it achieves:\n")
        parts.append("".join(f"- {_title(n)}: {_number(v)}\n" for n, v in results.items()))
    parts.append("## Training\n")
    parts.append(_table(("Argument", "Value"), _argument_rows(facts.arguments)))
    if rows := _curve(facts.log_history):
        columns = list(dict.fromkeys(column for row in rows for column in row))
        parts.append("## Results\n")
        parts.append(_table(columns, [[row.get(c, "") for c in columns] for row in rows]))
    versions = {"Python": python_version(), **installed(_LIBRARIES)}
    parts.append("## Versions\n")
    parts.append("".join(f"- {library} {version}\n" for library, version in versions.items()))
    return "\n".join(parts)


def last_evaluation(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the last evaluation's metrics, named without ``eval_``; no times and no memory."""
    found: dict[str, float] = {}
    last = max((e["step"] for e in history if _evaluated(e)), default=None)
    for entry in history:
        if last is not None and entry["step"] == last:
            found |= _evaluated(entry)
    return found


def _evaluated(entry: dict[str, Any]) -> dict[str, float]:
    ends = ("_runtime", "_per_second", "_preparation_time")
    return {
        name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(ends) and "_mem_" not in name
    }


def _curve(history: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Make a row for each step with an evaluation: the last training loss beside the metrics."""
    rows: dict[int, dict[str, str]] = {}
    loss = ""
    for entry in history:
        loss = _number(entry["loss"]) if "loss" in entry else loss
        if metrics := _evaluated(entry):
            row = rows.setdefault(entry["step"], {"Step": str(entry["step"])})
            if "epoch" in entry:
                row["Epoch"] = _number(entry["epoch"])
            row["Training loss"] = loss
            row |= {f"Evaluation: {_title(n)}": _number(v) for n, v in metrics.items()}
    return list(rows.values())


def arguments_that_ran(
    args: TrainingArguments,
    resolved: ResolvedConfig,
    *,
    num_steps: int,
    user_optimizer: Any,
    user_scheduler: Any,
) -> dict[str, object]:
    """Return the arguments worth showing, with the values that ran, whatever decided them.

    Args:
        args: the user's arguments.
        resolved: what ran.
        num_steps: optimizer steps done.
        user_optimizer: an optimizer of the user's own; None where the config's ran.
        user_scheduler: a schedule of the user's own; None where the config's ran.
    """
    optimizer, rate = resolved.optimizer_type, resolved.learning_rate
    schedule = resolved.schedule_type
    if user_optimizer is not None:
        optimizer = type(user_optimizer).__name__
        rate = user_optimizer.defaults.get("lr", rate)
    if user_scheduler is not None:
        schedule = type(user_scheduler).__name__
    shown: dict[str, object] = {
        "ranks": resolved.facts.world_size,
        "global batch size": resolved.global_batch_size,
        "ZeRO stage": resolved.stage,
        "precision": resolved.precision,
        "learning_rate": rate,
        "lr_scheduler_type": schedule,
        "optimizer": optimizer,
        "steps": num_steps,
    }
    values = running_arguments(args, resolved).to_dict()
    names = (args.changed_fields() | set(resolved.adopted)) - _LEFT_OUT - set(shown)
    return without_secrets(shown | {name: values[name] for name in sorted(names)})


def _argument_rows(arguments: Mapping[str, object]) -> list[list[str]]:
    return [[name, f"`{getattr(value, 'value', value)}`"] for name, value in arguments.items()]


def _index(wishes: CardWishes, datasets: list[str], results: dict[str, float]) -> Any:
    """Make the results for the Hub's ``model-index``; None without a task, a dataset or results."""
    from huggingface_hub import EvalResult

    tasks, kinds = _listed(wishes.tasks), _listed(wishes.dataset_tags) or datasets
    if not (tasks and kinds and results):
        return None
    configs = _listed(wishes.dataset_args)
    return [
        EvalResult(
            task_type=task,
            dataset_type=kind,
            dataset_name=datasets[min(place, len(datasets) - 1)] if datasets else kind,
            dataset_config=configs[place] if place < len(configs) else None,
            metric_type=name,
            metric_name=_title(name),
            metric_value=value,
        )
        for task in tasks
        for place, kind in enumerate(kinds)
        for name, value in results.items()
    ]


def _tags(wishes: CardWishes, model: Any, existing: Any) -> list[str]:
    wanted = [
        *_listed(wishes.tags),
        *_listed(getattr(model, "model_tags", None)),
        *_listed(getattr(existing, "tags", None)),
        *("generated_from_trainer", "dstrain"),
    ]
    return list(dict.fromkeys(wanted))


def _base_model(model: Any) -> str | None:
    """Find the repository a model came from; None for one from a local folder or from scratch."""
    peft = getattr(model, "peft_config", None)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if isinstance(peft, dict) and peft:
        name = next(iter(peft.values())).base_model_name_or_path or name
    return None if not name or Path(name).exists() or name.count("/") > 1 else name


def _license(base: str | None) -> str | None:
    """Ask the Hub for the licence of the base model; None where it does not answer."""
    if base is None:
        return None
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        tags = HfApi().model_info(base, timeout=5).tags or []
        return next((t.removeprefix("license:") for t in tags if t.startswith("license:")), None)
    return None


def _library(model: Any) -> str | None:
    if hasattr(model, "peft_config"):
        return "peft"
    return "transformers" if hasattr(model, "config") else None


def _dataset_names(dataset: Any) -> list[str]:
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return [name] if name else []


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: Any, rows: list[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(list(columns)), *rows]
    cells = [[str(c).replace("|", "\\|") for c in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
