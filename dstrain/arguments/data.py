"""Arguments about the order and the loading of data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import alias, implemented, refused
from dstrain.core.errors import Problem, nearest
from dstrain.core.files import expanded

_OWN_ORDER = "the order is always seeded, sharded by rank and complete"
# Key of accelerator_config -> accepted values, and the behaviour of the loaders, for errors.
LOADING: dict[str, tuple[tuple[Any, ...], str]] = {
    "split_batches": ((True, False, None), "a batch size counts the samples of all ranks"),
    "dispatch_batches": ((True, False, None), "whether the main rank reads a stream for all"),
    "even_batches": (
        (True, False, None),
        "ranks without a sample take part with weight 0, so nothing is repeated or dropped",
    ),
    "use_seedable_sampler": ((True, None), _OWN_ORDER),
    "non_blocking": (
        (True, False, None),
        "batches in page-locked memory are copied asynchronously",
    ),
    "gradient_accumulation_kwargs": ((None, {}), "set gradient_accumulation_steps"),
    "use_configured_state": ((False, None), "there is no accelerate state to configure"),
}


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def _loading(key: str) -> Any:
    """Return a function that moves an old argument to a key of ``accelerator_config``."""

    def convert(arguments: Any, value: bool) -> dict[str, Any]:
        given = arguments.accelerator_config or {}
        if given.get(key) not in (None, value):
            raise ValueError(given[key])
        return {**given, key: value}

    return convert


@dataclass
class DataArguments:
    """Order, reading and batching of samples."""

    dataloader_drop_last: bool = arg(
        False,
        "Drop the samples at the end of an epoch that do not fill a micro-batch on every rank. "
        "Evaluation never drops samples.",
        treatment=implemented("training only"),
    )
    dataloader_num_workers: int = arg(
        0,
        "Loader processes per rank; 0 loads in the training process.",
        treatment=implemented(),
    )
    dataloader_prefetch_factor: int | None = arg(
        None,
        "Batches that each loader process prepares ahead; needs dataloader_num_workers > 0.",
        treatment=implemented(),
    )
    dataloader_pin_memory: bool = arg(
        True,
        "Put batches into page-locked host memory, which makes the copy to a GPU asynchronous.",
        treatment=implemented("off with `use_cpu`"),
    )
    dataloader_persistent_workers: bool = arg(
        False,
        "Keep loader processes alive between the epochs of a run.",
        treatment=implemented(),
    )
    remove_unused_columns: bool | None = arg(
        True,
        "Drop dataset columns that the model's forward does not take.",
        treatment=implemented(),
    )
    dataloader_multiprocessing_context: str | None = arg(
        None,
        "Start method of loader processes; none is Python's default on this system. With 'spawn' "
        "and 'forkserver' dataset and collator are pickled, so they must be importable.",
        choices=("fork", "spawn", "forkserver"),
        treatment=implemented("needs `dataloader_num_workers` above 0", own=True),
    )
    dataloader_in_order: bool = arg(
        True,
        "Hand out batches in the order in which loader processes were asked for them.",
        treatment=refused(
            "batches in the order of their loading are others in each run, so no resume could go "
            "on at the sample where a run stopped",
            "leave it out; a larger dataloader_prefetch_factor lets the other loader processes "
            "work on while one batch is late",
            own=True,
        ),
    )
    train_sampling_strategy: str = arg(
        "random",
        "Order of the training samples: 'random'; 'sequential', as the dataset has them; "
        "'group_by_length', similar lengths beside each other; 'batch_rebalance', the samples of "
        "each optimizer step dealt to ranks and micro-batches so that their padded lengths cost "
        "the same: few long samples here, many short ones there.",
        choices=("random", "sequential", "group_by_length", "batch_rebalance"),
        treatment=implemented(
            "of datasets with a length: a stream has an order of its own. What an optimizer step "
            "uses with 'batch_rebalance' is what it uses with 'random'",
            own=True,
        ),
    )
    group_by_length: bool = arg(
        False,
        "Put samples of similar length into the same batch, to pad less.",
        treatment=implemented(
            "pools of shuffled samples, each sorted; the order depends on seed and epoch alone. "
            "The older way to write train_sampling_strategy='group_by_length'"
        ),
    )
    length_column_name: str | None = arg(
        "length",
        "Dataset column with the lengths that group_by_length and 'batch_rebalance' use; without "
        "it they are measured.",
        treatment=implemented("of a `datasets.Dataset`; no sample is read for it"),
    )
    ignore_data_skip: bool = arg(
        False,
        "Resume without skipping the data already seen: the epoch begins again.",
        treatment=implemented(),
    )
    accelerator_config: dict[str, Any] | str | None = arg(
        None,
        "Data loading options of accelerate: a dict, a JSON object or the path of a JSON file.",
        treatment=implemented(
            "`split_batches` and `dispatch_batches` (of streams) are done, keys that describe what "
            "our loaders do are taken, the others are refused"
        ),
    )
    dispatch_batches: bool | None = arg(
        None,
        "Old way to write accelerator_config['dispatch_batches'].",
        treatment=alias(
            "accelerator_config", convert=_loading("dispatch_batches"), note="key dispatch_batches"
        ),
    )
    split_batches: bool | None = arg(
        None,
        "Old way to write accelerator_config['split_batches'].",
        treatment=alias(
            "accelerator_config", convert=_loading("split_batches"), note="key split_batches"
        ),
    )

    def _read_accelerator_config(self) -> Problem | None:
        """Replace an ``AcceleratorConfig``, or the path of a JSON file, by its dict."""
        given: Any = self.accelerator_config
        if isinstance(given, type):
            self.accelerator_config = None
            return Problem(
                f"accelerator_config={given.__name__}, a class",
                "an object of it says how to load data, a class does not",
                f"write {given.__name__}(...), or a dict",
            )
        if given is not None and not isinstance(given, (dict, str)) and hasattr(given, "to_dict"):
            self.accelerator_config = given.to_dict()
        elif isinstance(given, os.PathLike) or (
            isinstance(given, str) and given.strip().lower() != "none" and not _is_json(given)
        ):
            self.accelerator_config = None
            try:
                self.accelerator_config = json.loads(expanded(given).read_text())
            except (OSError, ValueError) as error:
                return Problem(f"accelerator_config={str(given)!r}", f"no JSON file: {error}")
        return None

    @property
    def sampling(self) -> str:
        """Return the order of training samples, as in ``train_sampling_strategy``."""
        return "group_by_length" if self.group_by_length else self.train_sampling_strategy

    @property
    def splits_batches(self) -> bool:
        """Tell whether a batch size counts the samples of all ranks."""
        return self._loads("split_batches")

    @property
    def dispatches_batches(self) -> bool:
        """Tell whether the main rank reads streams for all ranks."""
        return self._loads("dispatch_batches")

    def _loads(self, key: str) -> bool:
        assert not isinstance(self.accelerator_config, str), "parsed on construction"
        return bool((self.accelerator_config or {}).get(key))

    def _data_problems(self) -> list[Problem]:
        problems = []
        assert not isinstance(self.accelerator_config, str), "parsed on construction"
        for key, value in (self.accelerator_config or {}).items():
            if key not in LOADING:
                close = nearest(key, set(LOADING))
                problems.append(
                    Problem(
                        f"accelerator_config key {key!r}",
                        f"known keys are {', '.join(LOADING)}",
                        f"did you mean {close!r}?" if close else "",
                    )
                )
            elif value not in LOADING[key][0]:
                problems.append(
                    Problem(
                        f"accelerator_config[{key!r}]={value!r}", LOADING[key][1], "leave it out"
                    )
                )
        if self.dataloader_num_workers < 0:
            problems.append(
                Problem(f"dataloader_num_workers={self.dataloader_num_workers}", "0 or more")
            )
        if self.dataloader_prefetch_factor is not None and self.dataloader_prefetch_factor < 1:
            problems.append(
                Problem(
                    f"dataloader_prefetch_factor={self.dataloader_prefetch_factor}",
                    "at least 1 is needed",
                )
            )
        if self.dataloader_num_workers == 0 and self.dataloader_persistent_workers:
            problems.append(
                Problem(
                    "dataloader_persistent_workers=True with dataloader_num_workers=0",
                    "there are no loader processes to keep",
                    "set dataloader_num_workers to 1 or more, or persistent workers to false",
                )
            )
        if self.dataloader_num_workers == 0 and self.dataloader_multiprocessing_context is not None:
            problems.append(
                Problem(
                    f"dataloader_multiprocessing_context="
                    f"{self.dataloader_multiprocessing_context!r} with dataloader_num_workers=0",
                    "there are no loader processes to start",
                    "set dataloader_num_workers to 1 or more, or leave the context out",
                )
            )
        if self.group_by_length and self.train_sampling_strategy not in (
            "random",  # the default, if only group_by_length is set
            "group_by_length",
        ):
            problems.append(
                Problem(
                    "group_by_length=True with train_sampling_strategy="
                    f"{self.train_sampling_strategy!r}",
                    "each says how samples are ordered, and they contradict each other",
                    "keep train_sampling_strategy alone",
                )
            )
        if self.dataloader_num_workers == 0 and self.dataloader_prefetch_factor is not None:
            problems.append(
                Problem(
                    f"dataloader_prefetch_factor={self.dataloader_prefetch_factor} with "
                    "dataloader_num_workers=0",
                    "only loader processes prefetch",
                    "set dataloader_num_workers to 1 or more, or leave the factor out",
                )
            )
        return problems
