"""Every architecture of the Auto mappings: built and loaded in parts, saved as transformers does.

``save_pretrained`` of a whole model with the same state is the reference throughout.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.weights import differences, in_files, whole_state

MAPPINGS = [
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
]
SMALL_SHARDS = 200_000
TOGETHER = 25  # models have cycles, and looking for these takes longer than a model


def classes(mapping: str) -> Iterator[tuple[str, Any]]:
    """Yield (model type, class) for the classes of a mapping.

    Of an architecture (a module of transformers) that an earlier mapping has, only classes with
    conversions of their own.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from tests.families.tiny import tiny_models

    seen = {cls for other in MAPPINGS[: MAPPINGS.index(mapping)] for _, cls in tiny_models(other)}
    architectures = {cls.__module__ for cls in seen}
    for model_type, cls in tiny_models(mapping):
        own = get_checkpoint_conversion_mapping(cls.__name__) is not None
        if cls not in seen and (own or cls.__module__ not in architectures):
            seen.add(cls)
            yield model_type, cls


def saved_whole(cls: Any, config: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Save, by transformers, a model with this state that was built whole."""
    with torch.device("meta"):
        model = cls(config)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=900)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_models_of_stage_3_are_loaded_and_saved_exactly(
    mapping: str, tmp_path: Path, rank: int
) -> None:
    """Built inside the block and saved, loaded inside the block from that and saved again."""
    import dstrain
    from dstrain import TrainingArguments
    from dstrain.core.ranks import Ranks, barrier, gather_objects
    from dstrain.models import save_model
    from tests.families.tiny import config_of

    args = TrainingArguments(str(tmp_path), zero_stage="3", report_to="none")
    ranks, wrong = Ranks(rank, rank, 2, 2), {}
    for number, (model_type, cls) in enumerate(classes(mapping)):
        folder = tmp_path / model_type
        with dstrain.partitioned(args):
            built = cls._from_config(config_of(cls, model_type))
        state = whole_state(built)
        save_model(built, folder / "built", ranks)
        if rank == 0:
            saved_whole(cls, config_of(cls, model_type), state, folder / "whole")
        barrier()
        del built
        with dstrain.partitioned(args):
            loaded = cls.from_pretrained(folder / "whole")
        found = [f"loaded: {line}" for line in differences(state, whole_state(loaded))]
        save_model(loaded, folder / "loaded", ranks, shard_bytes=SMALL_SHARDS)
        if rank == 0:
            expected = in_files(folder / "whole")
            for name in ("built", "loaded"):
                lines = differences(expected, in_files(folder / name))
                found += [f"saved as {name}: {line}" for line in lines]
            shutil.rmtree(folder)
        del loaded, state
        if number % TOGETHER == 0:
            gc.collect()
        found = sum(gather_objects(found), [])
        if found:
            wrong[cls.__name__] = found[:4]
    assert not wrong
