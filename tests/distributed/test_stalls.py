"""A rank that does not come, or a port at which ranks cannot meet: all end, and it is said why."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Training, deepspeed

STALLED = 76
TIMEOUT_SECONDS = 12
WITHIN_SECONDS = TIMEOUT_SECONDS + 60

SCRIPT = """
import os, pathlib, time
from dstrain import Trainer, TrainingArguments
from tests.models import RaggedTokens, pad_collate, tiny_llama

rank = os.environ["RANK"]
pathlib.Path(f"pid-{rank}").write_text(str(os.getpid()))

class Stands(Trainer):
    def compute_loss(self, *args, **kwargs):
        pathlib.Path(f"step-{rank}").write_text(str(self.state.global_step))
        if self.state.global_step == 3 and rank == "1":
            pathlib.Path("stands").write_text(str(time.time()))
            SLEEP
        return super().compute_loss(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        pathlib.Path("stands").write_text(str(time.time()))
        time.sleep(EVALUATION)
        return super().prediction_step(*args, **kwargs)

Stands(
    tiny_llama(),
    TrainingArguments(
        "out", report_to="none", use_cpu=True, disable_tqdm=True, ddp_timeout=TIMEOUT,
        **SETTINGS,
    ),
    data_collator=pad_collate,
    train_dataset=RaggedTokens(64),
    eval_dataset=RaggedTokens(4),
).METHOD()
pathlib.Path(f"done-{rank}").touch()
"""


def script(
    folder: Path,
    *,
    sleep: str = "time.sleep(3600)",
    evaluation: object = 0,
    method: str = "train",
    timeout: int = TIMEOUT_SECONDS,
    **settings: Any,
) -> Path:
    """Write the script of a run in which rank 1 stands still in step 4."""
    text = SCRIPT
    words: dict[str, object] = {"SLEEP": sleep, "TIMEOUT": timeout, "SETTINGS": settings}
    words |= {"EVALUATION": evaluation, "METHOD": method}
    for name, value in words.items():
        text = text.replace(name, str(value))
    path = folder / "script.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("stage", "num_ranks"), [(2, 2), (3, 3)])
def test_a_rank_that_does_not_come_is_named_and_all_end(tmp_path, stage, num_ranks):
    """In shared memory, which waits for ever by itself; and where gloo gives up."""
    path = script(tmp_path, zero_stage=stage, max_steps=20)
    with Training(deepspeed(path, num_ranks=num_ranks), tmp_path) as training:
        status = training.wait_for_end(300)
        waited = time.time() - float((tmp_path / "stands").read_text())
        text = training.text()
    assert waited < WITHIN_SECONDS
    assert status == STALLED, text
    assert text.count("dstrain: error:") == 1, text
    assert f"the ranks waited {TIMEOUT_SECONDS} s (ddp_timeout) for rank 1\n" in text
    assert "rank 1: step 4, micro-batch 1, at" in text
    assert "script.py:" in text
    assert "in compute_loss" in text
    assert "Traceback" not in text, text


def text_of_one_that_stalls(path, folder):
    """Run a script until it ends, in time and with one error; return what it printed."""
    with Training(deepspeed(path), folder) as training:
        status = training.wait_for_end(300)
        waited = time.time() - float((folder / "stands").read_text())
        text = training.text()
    assert status == STALLED, text
    assert waited < WITHIN_SECONDS
    assert text.count("dstrain: error:") == 1, text
    return text


@pytest.mark.parametrize(
    ("stage", "method", "steps"), [(2, "evaluate", 0), (0, "train", 2), (2, "train", 2)]
)
def test_a_rank_that_does_not_come_in_an_evaluation_is_named(tmp_path, stage, method, steps):
    """The others wait for its predictions, on a group without a time limit of that length."""
    evaluation = "3600 if rank == '1' else 0"
    path = script(
        tmp_path, zero_stage=stage, evaluation=evaluation, method=method, max_steps=3,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    text = text_of_one_that_stalls(path, tmp_path)
    assert f"rank 1: after step {steps}, batch 1 of an evaluation, at" in text
    assert "in prediction_step" in text
    assert "Traceback" not in text, text


READS = """
import os, pathlib, time, torch
from dstrain import Trainer, TrainingArguments
from transformers import TrainerCallback
from tests.models import RaggedTokens, pad_collate, tiny_llama

rank = os.environ["RANK"]
pathlib.Path(f"pid-{rank}").write_text(str(os.getpid()))

def hang(where):
    if where == "WHERE" and rank == "1":
        pathlib.Path("stands").write_text(str(time.time()))
        time.sleep(3600)

class Stands(RaggedTokens):
    def __getitem__(self, index):
        hang("data")
        return super().__getitem__(index)

class AtTheEnd(TrainerCallback):
    def on_train_end(self, *args, **kwargs):
        hang("end")

trainer = Trainer(
    tiny_llama(),
    TrainingArguments(
        "out", report_to="none", use_cpu=True, disable_tqdm=True, ddp_timeout=TIMEOUT,
        zero_stage=STAGE, max_steps=2, save_strategy="no", load_best_model_at_end=False,
    ),
    data_collator=pad_collate,
    train_dataset=Stands(64),
    eval_dataset=Stands(64),
    callbacks=[AtTheEnd],
)
trainer.METHOD()
trainer.save_model("model")
"""


@pytest.mark.parametrize(
    ("method", "stage", "where", "words"),
    [
        ("train", 3, "data", "after step 0, the preparation of training, at"),
        ("evaluate", 2, "data", "after step 0, evaluation, at"),
        ("train", 2, "end", "after step 2, the end of training, at"),
    ],
)
def test_a_rank_that_stands_still_around_training_is_named(tmp_path, method, stage, where, words):
    """In a dataset's first row it once left its own process alive, and gloo's traceback."""
    path = tmp_path / "script.py"
    text = READS.replace("TIMEOUT", str(TIMEOUT_SECONDS)).replace("STAGE", str(stage))
    path.write_text(text.replace("METHOD", method).replace("WHERE", where))
    text = text_of_one_that_stalls(path, tmp_path)
    assert f"the ranks waited {TIMEOUT_SECONDS} s (ddp_timeout) for rank 1\n" in text
    assert f"rank 1: {words}" in text
    assert "script.py:" in text
    assert "in hang" in text
    assert "Traceback" not in text, text


MAKES = """
import os, pathlib, time
from dstrain import Trainer, TrainingArguments
from transformers import TrainerCallback
from tests.models import RaggedTokens, pad_collate, tiny_llama

rank = os.environ["RANK"]
pathlib.Path(f"pid-{rank}").write_text(str(os.getpid()))

def hang(where):
    if where == "WHERE" and rank == "1":
        pathlib.Path("stands").write_text(str(time.time()))
        time.sleep(3600)

def make():
    hang("model")
    return tiny_llama()

class AtFirst(TrainerCallback):
    def on_init_end(self, *args, **kwargs):
        hang("callback")

def main():
    trainer = Trainer(
        args=TrainingArguments(
            "out", report_to="none", use_cpu=True, disable_tqdm=True, ddp_timeout=TIMEOUT,
            zero_stage=3, max_steps=2, save_strategy="no",
        ),
        model_init=make,
        data_collator=pad_collate,
        train_dataset=RaggedTokens(64),
        callbacks=[AtFirst],
    )
    trainer.train()

main()
"""


@pytest.mark.parametrize(("where", "name"), [("model", "make"), ("callback", "on_init_end")])
def test_a_rank_that_stands_still_while_a_trainer_is_made_is_named(tmp_path, where, name):
    """The others are in the constructor, or have gone on to the training."""
    path = tmp_path / "script.py"
    path.write_text(MAKES.replace("TIMEOUT", str(TIMEOUT_SECONDS)).replace("WHERE", where))
    text = text_of_one_that_stalls(path, tmp_path)
    assert f"the ranks waited {TIMEOUT_SECONDS} s (ddp_timeout) for rank 1\n" in text
    assert "rank 1: after step 0, the construction of the trainer, at" in text
    assert "script.py:" in text
    assert "in hang" in text
    assert "in main" not in text
    assert "Traceback" not in text, text


def test_a_stopped_process_that_holds_the_store_is_named(tmp_path):
    path = script(tmp_path, zero_stage=2, max_steps=10_000, sleep="pass")
    with Training(deepspeed(path), tmp_path) as training:
        training.wait_for(lambda: training.step() >= 4)
        os.kill(training.pid(0), signal.SIGSTOP)
        stopped = time.time()
        status = training.wait_for_end(300)
        assert time.time() - stopped < WITHIN_SECONDS
        assert status == STALLED, training.text()
        assert "rank 0 does not answer" in training.text()


def test_what_is_only_long_is_let_be(tmp_path):
    """An evaluation that lasts longer than ddp_timeout, and a rank that is late within it."""
    path = script(
        tmp_path, zero_stage=2, max_steps=5, sleep="time.sleep(3)", evaluation=4.0, timeout=6,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=1,
    )  # fmt: skip
    with Training(deepspeed(path), tmp_path) as training:
        assert training.wait_for_end(300) == 0, training.text()
    assert (tmp_path / "done-0").exists()


def lagging(folder, metric):
    """Write a script in which rank 1 takes 20 s longer than rank 0 for its batches, 2 s each."""
    path = script(
        folder, zero_stage=0, evaluation="2 if rank == '1' else 0", timeout=7, method="evaluate",
        per_device_eval_batch_size=1,
    )  # fmt: skip
    text = path.read_text().replace("RaggedTokens(4)", f"RaggedTokens(20){metric}")
    path.write_text(text)
    return path


def test_a_rank_that_lags_in_an_evaluation_is_waited_for_where_predictions_go(tmp_path):
    """Longer than ddp_timeout in all, while it goes on from batch to batch."""
    path = lagging(tmp_path, ", compute_metrics=lambda prediction: {}")
    with Training(deepspeed(path), tmp_path) as training:
        assert training.wait_for_end(300) == 0, training.text()
    assert (tmp_path / "done-0").exists()


def test_a_rank_that_lags_at_the_end_of_an_evaluation_is_named(tmp_path):
    """Losses are summed in the group of training, which gives up after ddp_timeout."""
    text = text_of_one_that_stalls(lagging(tmp_path, ""), tmp_path)
    assert "the ranks waited 7 s (ddp_timeout) for rank 1\n" in text
    assert "of an evaluation, at" in text
    assert "Traceback" not in text, text


def test_a_port_in_use_is_one_error_within_a_minute(tmp_path):
    path = script(tmp_path, max_steps=1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        command = deepspeed(path)
        command[command.index("--master_port") + 1] = str(other.getsockname()[1])
        with Training(command, tmp_path) as training:
            training.wait_for(lambda: (tmp_path / "pid-0").exists())
            training.wait_for_end(120)
            text = training.text()
    assert "cannot be used by rank 0" in text
    assert "another process listens there" in text
    assert "frame #" not in text
