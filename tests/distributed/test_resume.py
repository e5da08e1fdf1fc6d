"""A resumed run against the one that never stopped: bit for bit where the topology is the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from tests.distributed.runs import STAGES, history, losses, make_trainer, whole_weights
from tests.distributed.streams import TellsPosition
from tests.models import RaggedTokens, pad_collate, tiny_llama

# 22 samples in micro-batches of 2 on 2 ranks: 6 micro-steps an epoch, the last one short.
EPOCH = {"train": 22, "num_train_epochs": 2}


@pytest.fixture(autouse=True)
def _fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def noisy_llama() -> Any:
    """Return a llama that draws random numbers in every forward pass of training."""
    return tiny_llama(attention_dropout=0.3)


def run(folder: Path, *, resume: Any = False, **settings: Any) -> dict[str, Any]:
    """Train; the weights, the history and the files of the last checkpoint."""
    from dstrain.checkpoint import committed, read_manifest

    trainer = make_trainer(folder, model=settings.pop("model", noisy_llama)(), **settings)
    trainer.train(resume)
    last = committed(folder)[-1].folder
    outcome = {
        "weights": whole_weights(trainer),
        "history": history(trainer),
        "losses": losses(trainer),
        "state": {
            name: record
            for name, record in read_manifest(last).files.items()
            if name.endswith(".safetensors")
        },
        "run": run_file(last),
        "steps": trainer.state.global_step,
    }
    trainer.close()
    return outcome


def run_file(folder: Path) -> Any:
    """Read ``run.json`` without times."""
    content = json.loads((folder / "state/run.json").read_text())
    for meter in content["position"]["meters"]:
        del meter["seconds"]
    return content


def assert_same(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    """Check, bit for bit, weights, history, master weights, optimizer state and counters."""
    for name, weights in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weights), name
    assert resumed["history"] == whole["history"]
    assert resumed["state"] == whole["state"]
    assert resumed["run"] == whole["run"]


def check(folder: Path, rank: int, at: int, **settings: Any) -> None:
    """Train through with a checkpoint at step ``at``, then from there in a folder of its own."""
    from dstrain.core.ranks import barrier

    settings = {"save_strategy": "steps", "save_steps": at, **EPOCH, **settings}
    whole = run(folder / "whole", **settings)
    start = folder / "again" / f"checkpoint-{at}"
    if rank == 0:
        shutil.copytree(folder / "whole" / start.name, start)
    barrier()
    resumed = run(folder / "again", resume=True, **settings)
    assert whole["steps"] > at
    assert_same(resumed, whole)


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}}
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"deepspeed": FP16},
}


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_run_that_never_stopped(
    stage: int, precision: str, tmp_path: Path, rank: int
) -> None:
    """In the middle of an epoch, with dropout, a schedule and two parameter groups."""
    check(tmp_path, rank, 4, stage=stage, lr_scheduler_type="cosine", **FORMATS[precision])


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_optimizer_on_the_host(stage: int, tmp_path: Path, rank: int) -> None:
    """DeepSpeed's own CPU Adam keeps its step count elsewhere."""
    check(tmp_path, rank, 4, stage=stage, bf16=True, offload_optimizer="cpu")


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_optimizer_on_the_host_after_many_steps(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """DeepSpeed's CPU Adam multiplies powers of its betas up, with a rounding error each step.

    The power of 0.999 for step 21 is not the one that ``pow`` gives.
    """
    check(tmp_path, rank, 20, stage=stage, offload_optimizer="cpu", num_train_epochs=5)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(
    ("at", "settings"),
    [
        (6, {}),  # at an epoch's end
        (
            6,
            {"logging_strategy": "epoch", "eval_strategy": "epoch"},
        ),  # whose end logs and evaluates
        (4, {"logging_steps": 3}),  # between two logs
        (4, {"eval_strategy": "steps", "eval_steps": 4}),  # after an evaluation
        (2, {"gradient_accumulation_steps": 2}),
        (3, {"gradient_accumulation_steps": 4, "num_train_epochs": 3}),  # short windows
        (4, {"dataloader_num_workers": 1}),
        (4, {"save_async": False}),
    ],
    ids=str,
)
def test_wherever_the_run_stood(
    at: int, settings: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """Position in the data, meters and what is still to be done at an epoch's end."""
    check(tmp_path, rank, at, stage=2, **settings)


@pytest.mark.ranks(2, timeout=300)
def test_saving_by_epochs(tmp_path: Path, rank: int) -> None:
    """The checkpoint is taken after the epoch's end, so the next epoch begins."""
    check(tmp_path, rank, 6, stage=1, save_strategy="epoch", logging_steps=4)


class Stream(IterableDataset[Any]):
    """The samples of ``RaggedTokens`` without a length, in another order each epoch."""

    def __init__(self, num_samples: int) -> None:
        self.samples = RaggedTokens(num_samples)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self.samples)):
            yield self.samples[(index * 5 + self.epoch) % len(self.samples)]


def masking_collate(examples: Any) -> dict[str, torch.Tensor]:
    """Drop tokens at random, as a masked-language-model collator does."""
    batch = pad_collate(examples)
    dropped = torch.rand(batch["input_ids"].shape) < 0.2
    return batch | {"input_ids": batch["input_ids"].masked_fill(dropped, 3)}


def masking_trainer() -> Any:
    """Return a trainer class with that collator."""
    from dstrain import Trainer

    class Masking(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "data_collator": masking_collate})

    return Masking


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("data", ["samples", "stream"])
@pytest.mark.parametrize(("at", "workers"), [(4, 0), (6, 0), (4, 2)])
def test_a_collator_that_draws_random_numbers(
    data: str, at: int, workers: int, tmp_path: Path, rank: int
) -> None:
    """The next micro-batch of a stream has been fetched when a checkpoint is taken.

    Loader processes are ahead too, and those of the run that goes on begin in another place.
    """
    more: dict[str, Any] = {"data": Stream(22), "max_steps": 12} if data == "stream" else {}
    check(
        tmp_path, rank, at, stage=2, cls=masking_trainer(), dataloader_num_workers=workers, **more
    )


@pytest.mark.ranks(2, timeout=300)
def test_a_loader_of_the_users_own(tmp_path: Path, rank: int, caplog: Any) -> None:
    """It can only be read from its beginning, which the log says; samples and noise are right."""
    from torch.utils.data import DataLoader, DistributedSampler

    from dstrain import Trainer

    data = RaggedTokens(24)

    class OwnLoader(Trainer):
        def get_train_dataloader(self) -> Any:
            sampler = DistributedSampler(data, seed=3)
            return DataLoader(data, batch_size=2, collate_fn=masking_collate, sampler=sampler)

    check(tmp_path, rank, 4, stage=2, cls=OwnLoader, gradient_accumulation_steps=1)
    assert ("4 micro-batches are read and dropped" in caplog.text) is (rank == 0)


@pytest.mark.ranks(2, timeout=300)
def test_a_resume_reads_no_sample_that_was_used(tmp_path: Path) -> None:
    """So the time to its first step does not grow with how far the run was.

    A few samples are looked at in any run, which tell whether all ranks have the same data.
    """
    looked_at = 16

    class Counted(RaggedTokens):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    settings = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": 1}
    run(tmp_path, data=Counted(44), **settings)
    assert Counted.reads == 22 + looked_at
    Counted.reads = 0
    run(tmp_path / "again", resume=str(tmp_path / "checkpoint-10"), data=Counted(44), **settings)
    assert Counted.reads == 2 + looked_at


class Telling(TellsPosition, Stream):
    """A stream that knows where it is."""

    def num_samples(self) -> int:
        return len(self.samples)

    def sample(self, number: int) -> Any:
        return self.samples[(number * 5 + self.epoch) % len(self.samples)]


@pytest.mark.ranks(2, timeout=300)
def test_a_resume_of_a_stream_that_knows_its_position(tmp_path: Path, rank: int) -> None:
    """It reads no sample that was used either, in a second epoch, at the noise of the whole run."""
    settings = {"stage": 2, "max_steps": 10, "dataloader_drop_last": True}
    Telling.reads = 0
    check(tmp_path, rank, 8, data=Telling(22), **settings)
    source = run_file(tmp_path / "whole" / "checkpoint-8")["position"]["source"]
    assert source == {"kind": "Telling", "state": {"given": 12}}
    assert Telling.reads == 2 * 22 + 10


@pytest.mark.ranks(2, timeout=300)
def test_a_stream_read_by_two_loader_processes(tmp_path: Path, rank: int) -> None:
    """Each of them reads the whole stream, which is begun in both where it was."""
    settings = {"stage": 2, "max_steps": 10, "dataloader_num_workers": 2, "cls": masking_trainer()}
    check(tmp_path, rank, 8, data=Telling(22), **settings)
    source = run_file(tmp_path / "whole/checkpoint-8")["position"]["source"]
    assert source == {"kind": "Telling", "state": {"given": 8}}


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [0, 3])
def test_own_optimizer_and_schedule(stage: int, tmp_path: Path, rank: int) -> None:
    """SGD has no step count and another state; a schedule with a Counter and another without."""
    for make in (
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5], gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())) if rank == 0 else 0)
        folder = Path(_from_rank_zero(str(folder)))

        def trained(at: Path, resume: Any = False, make: Any = make) -> dict[str, Any]:
            model = noisy_llama()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            return run(
                at,
                resume=resume,
                model=lambda: model,
                stage=stage,
                optimizers=(optimizer, make(optimizer)),
                save_strategy="steps",
                save_steps=4,
                **EPOCH,
            )

        whole = trained(folder / "whole")
        if rank == 0:
            shutil.copytree(folder / "whole/checkpoint-4", folder / "again/checkpoint-4")
        _from_rank_zero("")
        assert_same(trained(folder / "again", resume=True), whole)


def _from_rank_zero(value: str) -> str:
    from dstrain.core.ranks import gather_objects

    return gather_objects(value)[0]


@pytest.mark.ranks(2, timeout=300)
def test_saving_changes_nothing(tmp_path: Path) -> None:
    """A run that saves, in the background or not, is the run that does not."""
    trainer = make_trainer(tmp_path / "none", model=noisy_llama(), stage=3, **EPOCH)
    trainer.train()
    expected = whole_weights(trainer), history(trainer)
    trainer.close()
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        settings = {"save_strategy": "steps", "save_steps": 2, "save_async": asynchronous}
        outcome = run(folder, stage=3, **settings, **EPOCH)
        assert outcome["history"] == expected[1]
        for name, weights in expected[0].items():
            assert torch.equal(outcome["weights"][name], weights), name


# --- other layouts; other stages, ranks and formats are in test_topologies -----------------------


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"zero_optimization": {"round_robin_gradients": True}}),
    (3, {"zero_optimization": {"sub_group_size": 20_000}}),
    (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    (2, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}),
]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(("stage", "config"), LAYOUTS, ids=str)
def test_other_layouts_of_the_same_stages(
    stage: int, config: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """Parameters in another order, in several flat tensors, in another wrapper: to and from it."""
    common = {"save_strategy": "steps", "save_steps": 4, "model": tiny_llama, **EPOCH}
    tolerance = 2e-2 if "bf16" in config else 2e-5
    plain = run(tmp_path / "plain", stage=0, **common)
    start = str(tmp_path / "plain/checkpoint-4")
    there = run(tmp_path / "there", resume=start, stage=stage, deepspeed=config, **common)
    assert there["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    start = str(tmp_path / "there/checkpoint-8")
    back = run(tmp_path / "back", resume=start, stage=0, **common)
    assert back["losses"][8:] == pytest.approx(plain["losses"][8:], rel=tolerance)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_and_buffers_come_back(stage: int, tmp_path: Path, rank: int) -> None:
    """Nobody's optimizer has them, and the new run's fresh model has other values in them."""
    from dstrain import Trainer, TrainingArguments
    from tests.models import RegressionModel

    def make(folder: Path, shift: float, at_stage: int) -> Any:
        model = RegressionModel()
        model.register_buffer("seen", torch.zeros(3))
        model.hidden.requires_grad_(False)
        with torch.no_grad():
            model.hidden.weight += shift
            model.seen += shift
        draw = torch.Generator().manual_seed(1)
        rows = torch.randn(16, 8, generator=draw)
        data = [{"x": row, "labels": torch.tensor(1.0)} for row in rows]
        args = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, zero_stage=str(at_stage),
            per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=data)

    trainer = make(tmp_path, 0.5, stage)
    trainer.train()
    expected = whole_weights(trainer)["hidden.weight"]
    trainer.close()
    for other in (0, 2, 3):
        trainer = make(tmp_path, 0.0, other)
        trainer.train(str(tmp_path / "checkpoint-2"))
        assert torch.equal(whole_weights(trainer)["hidden.weight"], expected), other
        assert torch.equal(trainer.model.seen.cpu(), torch.full((3,), 0.5))
        trainer.close()


# --- what a checkpoint is for users --------------------------------------------------------------


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_from_pretrained_reads_a_checkpoint(stage: int, asynchronous: bool, tmp_path: Path) -> None:
    """The model of that step, in the format it trains in, with its config."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(
        tmp_path, stage=stage, bf16=True, max_steps=2, save_strategy="steps", save_steps=2,
        save_async=asynchronous,
    )  # fmt: skip
    trainer.train()
    expected = whole_weights(trainer)
    trainer.close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.ranks(2, timeout=300)
def test_what_is_kept_and_left_out(tmp_path: Path) -> None:
    """save_total_limit, save_only_model, save_weights_with_checkpoint, a share as save_steps."""
    from dstrain.checkpoint import committed, verify
    from dstrain.core.errors import CheckpointError

    def trained(name: str, **settings: Any) -> list[Path]:
        trainer = make_trainer(
            tmp_path / name, max_steps=4, save_strategy="steps", evaluation=0, **settings
        )
        trainer.train()
        trainer.close()
        found = committed(tmp_path / name)
        assert all(verify(f.folder)[1] == [] for f in found)
        return [f.folder for f in found]

    assert [f.name for f in trained("limit", save_steps=1, save_total_limit=2)] == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert [f.name for f in trained("share", save_steps=0.5)] == ["checkpoint-2", "checkpoint-4"]
    (only,) = trained("only", save_steps=4, save_only_model=True)
    assert not (only / "state").exists()
    assert (only / "model.safetensors").exists()
    trainer = make_trainer(tmp_path / "only", max_steps=4)
    with pytest.raises(CheckpointError, match="model alone"):
        trainer.train(str(only))
    (without,) = trained("without", save_steps=4, save_weights_with_checkpoint=False)
    assert not list(without.glob("*.safetensors"))
    trainer = make_trainer(tmp_path / "without", max_steps=6)
    trainer.train("auto")
    assert trainer.state.global_step == 6
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    """All differences at once, before anything is changed."""
    from dstrain.core.errors import CheckpointError

    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.close()
    trainer = make_trainer(tmp_path, model=tiny_llama(hidden_size=32, num_hidden_layers=1))
    with pytest.raises(
        CheckpointError, match=r"(?s)only the checkpoint has.*has shape \(259, 32\)"
    ):
        trainer.train(True)
    trainer.close()
    model = tiny_llama()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = make_trainer(tmp_path, model=model, optimizers=(sgd, None))
    with pytest.raises(CheckpointError, match="SGD needs"):
        trainer.train(True)
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_of_one_rank_stops_or_not_and_leaves_nothing(
    asynchronous: bool, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk of one rank, as the system reports it."""
    from dstrain.checkpoint import capture, committed
    from dstrain.core.errors import CheckpointError

    real = capture.write_tensor_file
    full = {"at": 2}

    def sometimes(path: Path, *args: Any) -> Any:
        if rank == 1 and f"checkpoint-{full['at']}." in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *args)

    monkeypatch.setattr(capture, "write_tensor_file", sometimes)
    settings = {
        "save_strategy": "steps", "save_steps": 1, "max_steps": 4, "evaluation": 0,
        "save_async": asynchronous,
    }  # fmt: skip
    trainer = make_trainer(tmp_path / "stop", **settings)
    with pytest.raises(CheckpointError, match="rank 1: OSError.*No space left"):
        trainer.train()
    trainer.close()
    assert [f.step for f in committed(tmp_path / "stop")] == [1]
    assert not list((tmp_path / "stop").glob(".checkpoint*"))
    trainer = make_trainer(tmp_path / "go", save_failure="continue", **settings)
    trainer.train()
    trainer.close()
    assert [f.step for f in committed(tmp_path / "go")] == [1, 3, 4]
    full["at"] = 0
    trainer = make_trainer(tmp_path / "stop", **settings)
    trainer.train("auto")
    trainer.close()
    assert [f.step for f in committed(tmp_path / "stop")] == [1, 2, 3, 4]


@pytest.mark.ranks(2, timeout=300)
def test_the_newest_that_verifies_is_resumed(tmp_path: Path, rank: int) -> None:
    """A damaged newest checkpoint costs its steps, not the run."""
    settings = {"save_strategy": "steps", "save_steps": 2, "evaluation": 0}
    trainer = make_trainer(tmp_path, max_steps=4, **settings)
    trainer.train()
    trainer.close()
    if rank == 0:
        os.truncate(tmp_path / "checkpoint-4/state/rank-00001.safetensors", 100)
    _from_rank_zero("")
    steps = []

    class Watch(make_callback()):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    trainer = make_trainer(tmp_path, max_steps=5, callbacks=[Watch], **settings)
    trainer.train(True)
    assert steps == [3, 4, 5]
    trainer.close()


def make_callback() -> Any:
    from transformers import TrainerCallback

    return TrainerCallback


@pytest.mark.ranks(2, timeout=300)
def test_states_of_callbacks_come_back_when_asked_for(tmp_path: Path) -> None:
    """Early stopping and the like must not start counting anew."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Counting(TrainerCallback, ExportableState):
        def __init__(self, patience: int = 1) -> None:
            self.patience, self.count = patience, 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.count += 1

        def state(self) -> dict[str, Any]:
            return {"args": {"patience": self.patience}, "attributes": {"count": self.count}}

    common = {"save_strategy": "steps", "save_steps": 2, "evaluation": 0}
    for restores in (False, True):
        trainer = make_trainer(
            tmp_path / str(restores), callbacks=[Counting(7)], max_steps=2, **common
        )
        trainer.train()
        trainer.close()
        trainer = make_trainer(
            tmp_path / str(restores),
            callbacks=[Counting(1)],
            max_steps=3,
            restore_callback_states_from_checkpoint=restores,
            **common,
        )
        trainer.train(True)
        (here,) = [c for c in trainer.events.handler.callbacks if isinstance(c, Counting)]
        assert (here.patience, here.count) == ((7, 3) if restores else (1, 1))
        trainer.close()
