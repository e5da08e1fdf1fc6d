"""Every family of the zoo trains and evaluates on two ranks as plain torch does on one process.

Plain torch runs the global batch of 8 ragged rows in one forward and backward pass, clips, and
takes one step of SGD. The trainer cuts the same batch into micro-batches in three ways, over two
ranks, at ZeRO stages 0, 2 and 3: loss, gradient norm before clipping, `eval_loss`, and the keys
and values that are saved after the step are the same.

Where that is impossible, the reference is what is promised instead: each micro-batch's own mean,
weighted by its share of the global batch (see `WEIGHTED`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.families.family import Family, Sample
from tests.families.rules import counts, loss_of
from tests.families.zoo import FAMILIES

GLOBAL_BATCH, RANKS = 8, 2
LEARNING_RATE, CLIP = 1e-2, 1.0
MICRO_BATCHES = (4, 2, 1)  # with 1, 2 and 4 of them for a rank in a step

# All three cuts at one stage, the finest at the others, where labels are the most ragged: ranks and
# micro-batches are weighed before a stage comes into play, and each stage adds gradients its own
# way, with one micro-batch as with four. With all nine the file takes twice the time.
RUNS = ((2, 4), (2, 2), (2, 1), (0, 1), (3, 1))
EXPORTED_STAGE = 3  # whose checkpoint is exported as well

# Whose batches choose which modules have a part in the loss: stage 3 tells ranks that differ so
# (`tests/distributed/test_different_modules.py`).
NOT_AT_STAGE_3 = {"two_heads"}

# The weight of a micro-batch's own mean, for the families whose rows cannot be told apart: they are
# seen only together (a contrast, the statistics of a batch), or what the loss is divided by is in
# no column of the batch.
WEIGHTED = {
    "clip": "samples",
    "siglip": "samples",
    "resnet": "samples",
    "segformer": "targets",
    "vit_masked": "samples",  # a sum over hidden patches, divided by their number, written by hand
    "two_heads": "samples",  # a user's own: a head without labels is left out of the loss
}

# fp32: each number is a sum of thousands in another order. The largest difference of a plain torch
# run in micro-batches from one in a whole batch is 3e-6 (`rules.py`), and the smallest error of a
# wrong weight in the zoo 4e-3.
REL = 1e-5
# A saved value: the step is LEARNING_RATE times a clipped gradient, all within 1e-2.
VALUES_REL, VALUES_ABS = 1e-5, 1e-7


@dataclass(frozen=True)
class Expected:
    """What plain torch computes.

    Attributes:
        loss: of the global batch.
        grad_norm: before clipping.
        eval_loss: of the same rows, before the step, in evaluation mode.
        model: after the step.
    """

    loss: float
    grad_norm: float
    eval_loss: float
    model: nn.Module


def _cut(order: Sequence[int], micro_batch: int) -> list[list[int]]:
    """Cut chunks into the rows of each micro-batch of all ranks: consecutive pieces."""
    return [list(order[i : i + micro_batch]) for i in range(0, len(order), micro_batch)]


def _train_order() -> list[int]:
    """Return the trainer's own order of samples."""
    from dstrain.data import EpochOrder

    return EpochOrder(GLOBAL_BATCH, seed=42, shuffle=True).indices(0).tolist()


def _weights(family: Family, parts: Sequence[Sequence[Sample]]) -> list[float]:
    """Return the share of each part in the global batch."""
    if family.name not in WEIGHTED:
        assert len(parts) == 1
        return [1.0]
    found = [counts(family, part)[WEIGHTED[family.name]] for part in parts]
    return [count / sum(found) for count in found]


def _mean_loss(
    model: nn.Module, family: Family, rows: Sequence[Sequence[int]], *, then: Callable[[Any], None]
) -> float:
    """Compute the weighted mean of the losses of parts; call ``then`` with each weighted loss."""
    samples, total = family.samples(GLOBAL_BATCH), 0.0
    parts = [[samples[i] for i in part] for part in rows]
    for part, weight in zip(parts, _weights(family, parts), strict=True):
        if weight:  # without a target the mean is no number
            loss = loss_of(model(**family.collate(part))) * weight
            then(loss)
            total += loss.item()
    return total


@functools.cache
def _plain_torch(name: str, micro_batch: int) -> Expected:
    """Train in one process, without dstrain and DeepSpeed."""
    family = FAMILIES[name]
    model = family.build()
    everything = list(range(GLOBAL_BATCH))
    split = name in WEIGHTED
    with torch.no_grad():
        rows = _cut(everything, micro_batch) if split else [everything]
        eval_loss = _mean_loss(model.eval(), family, rows, then=lambda loss: None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    rows = _cut(_train_order(), micro_batch) if split else [everything]
    loss = _mean_loss(model.train(), family, rows, then=lambda loss: loss.backward())
    norm = float(torch.nn.utils.clip_grad_norm_(trained, CLIP))
    optimizer.step()
    return Expected(loss, norm, eval_loss, model)


def _expected(name: str, micro_batch: int) -> Expected:
    return _plain_torch(name, micro_batch if name in WEIGHTED else GLOBAL_BATCH)


def _trainer(folder: Path, family: Family, *, stage: int, micro_batch: int) -> Any:
    from dstrain import Trainer, TrainingArguments

    samples = family.samples(GLOBAL_BATCH)
    args = TrainingArguments(
        str(folder),
        zero_stage=str(stage),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=GLOBAL_BATCH // (micro_batch * RANKS),
        per_device_eval_batch_size=micro_batch,
        max_steps=1,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        label_names=list(family.labels) if family.labels else None,
        remove_unused_columns=False,
        save_strategy="steps" if stage == EXPORTED_STAGE else "no",
        save_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        family.build(),
        args,
        data_collator=family.collate,
        train_dataset=samples,
        eval_dataset=samples,
    )


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the weight files in a folder."""
    from safetensors.torch import load_file

    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def _differences(ours: Path, theirs: Path, *, parameters: set[str] | None) -> list[str]:
    """Say in what two saved models differ; only of ``parameters``, if given."""
    mine, right = _read(ours), _read(theirs)
    found = [f"missing {key}" for key in sorted(right.keys() - mine.keys())]
    found += [f"unexpected {key}" for key in sorted(mine.keys() - right.keys())]
    for key in sorted(mine.keys() & right.keys()):
        a, b = mine[key], right[key]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            found.append(f"{key}: {a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}")
        elif parameters is not None and key not in parameters:
            continue
        elif not torch.allclose(a, b, rtol=VALUES_REL, atol=VALUES_ABS):
            found.append(f"{key}: off by {float((a - b).abs().max()):.1e}")
    return found


def _wrong(what: str, ours: float | None, theirs: float) -> list[str]:
    if ours is not None and math.isclose(ours, theirs, rel_tol=REL):
        return []
    return [f"{what}: {ours} for {theirs}"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_equal_plain_torch(name: str, tmp_path: Path, rank: int) -> None:
    """Catches a wrong count of targets, a dropped batch, lost gradients, wrong keys or values."""
    from transformers import PreTrainedModel

    from dstrain.checkpoint import export

    family, wrong = FAMILIES[name], []
    for stage, micro_batch in RUNS:
        if stage == 3 and name in NOT_AT_STAGE_3:
            continue
        where = f"stage {stage}, micro-batch {micro_batch}"
        expected = _expected(name, micro_batch)
        folder = tmp_path / f"stage_{stage}_{micro_batch}"
        trainer = _trainer(folder, family, stage=stage, micro_batch=micro_batch)
        eval_loss = trainer.evaluate().get("eval_loss")
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        wrong += _wrong(f"{where}, loss", logs[0]["loss"], expected.loss)
        wrong += _wrong(f"{where}, gradient norm", logs[0].get("grad_norm"), expected.grad_norm)
        wrong += _wrong(f"{where}, eval_loss", eval_loss, expected.eval_loss)
        if isinstance(expected.model, PreTrainedModel) and micro_batch == 1:
            trainer.save_model(str(folder / "saved"))
            if rank == 0:
                saved = ["saved"]
                if stage == EXPORTED_STAGE:
                    export(folder / "checkpoint-1", folder / "exported")
                    saved.append("exported")
                expected.model.save_pretrained(folder / "right")
                # Each rank has its own running statistics of a batch; those of one process are
                # another sequence.
                own = (
                    {n for n, _ in expected.model.named_parameters()} if name in WEIGHTED else None
                )
                for way in saved:
                    found = _differences(folder / way, folder / "right", parameters=own)
                    wrong += [f"{where}, {way}: {difference}" for difference in found]
        trainer.close()
    assert not wrong, "\n".join(wrong)


def test_what_is_weighted_by_design_is_in_the_zoo() -> None:
    """And every family whose rows are coupled is weighted: no split could equal the whole."""
    coupled = {name for name, family in FAMILIES.items() if family.coupled}
    assert coupled <= set(WEIGHTED) <= set(FAMILIES)
    assert len(set(FAMILIES) - set(WEIGHTED)) >= 60
