"""``set_*`` methods, and properties of the process."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dstrain.arguments import (
    TrainingArguments,
)
from dstrain.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


# Parameters and defaults of the reference documents' signatures.
SIGNATURES: dict[str, dict[str, Any]] = {
    "set_training": {
        "learning_rate": 5e-5, "batch_size": 8, "weight_decay": 0, "num_epochs": 3,
        "max_steps": -1, "gradient_accumulation_steps": 1, "seed": 42,
        "gradient_checkpointing": False,
    },
    "set_evaluate": {
        "strategy": "no", "steps": 500, "batch_size": 8, "accumulation_steps": None,
        "delay": None, "loss_only": False, "jit_mode": False,
    },
    "set_testing": {"batch_size": 8, "loss_only": False, "jit_mode": False},
    "set_save": {"strategy": "steps", "steps": 500, "total_limit": None, "on_each_node": False},
    "set_logging": {
        "strategy": "steps", "steps": 500, "report_to": "none", "level": "passive",
        "first_step": False, "nan_inf_filter": False, "on_each_node": False,
        "replica_level": "passive",
    },
    "set_push_to_hub": {
        "model_id": inspect.Parameter.empty, "strategy": "every_save", "token": None,
        "private_repo": False, "always_push": False,
    },
    "set_optimizer": {
        "name": "adamw_torch", "learning_rate": 5e-5, "weight_decay": 0, "beta1": 0.9,
        "beta2": 0.999, "epsilon": 1e-8, "args": None,
    },
    "set_lr_scheduler": {
        "name": "linear", "num_epochs": 3.0, "max_steps": -1, "warmup_ratio": 0, "warmup_steps": 0,
    },
    "set_dataloader": {
        "train_batch_size": 8, "eval_batch_size": 8, "drop_last": False, "num_workers": 0,
        "pin_memory": True, "persistent_workers": False, "prefetch_factor": None,
        "auto_find_batch_size": False, "ignore_data_skip": False, "sampler_seed": None,
    },
    "main_process_first": {"local": True, "desc": "work"},
    "get_warmup_steps": {"num_training_steps": inspect.Parameter.empty},
    "get_process_log_level": {},
    "to_dict": {},
    "to_json_string": {},
    "to_sanitized_dict": {},
}  # fmt: skip


# Of transformers 5.23, which no reference document has.
NEWER: dict[str, dict[str, Any]] = {
    "set_training": {"activation_checkpointing": None},
    "set_push_to_hub": {"revision": None},
    "set_dataloader": {"multiprocessing_context": None, "in_order": True},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_method_has_its_documented_signature(name):
    parameters = inspect.signature(getattr(TrainingArguments(), name)).parameters
    found = {p.name: p.default for p in parameters.values()}
    newer = NEWER.get(name, {})
    assert list(found) == [*SIGNATURES[name], *newer], "what is newer comes behind"
    assert found == SIGNATURES[name] | newer


SETS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "set_training",
        {"learning_rate": 1e-4, "batch_size": 32},
        {"learning_rate": 1e-4, "per_device_train_batch_size": 32, "do_train": True},
    ),
    (
        "set_evaluate",
        {"strategy": "steps", "steps": 100},
        {"eval_strategy": "steps", "eval_steps": 100, "do_eval": True, "eval_delay": 0},
    ),
    ("set_testing", {"batch_size": 32}, {"per_device_eval_batch_size": 32, "do_predict": True}),
    ("set_save", {"strategy": "no"}, {"save_strategy": "no"}),
    (
        "set_logging",
        {"steps": 100},
        {"logging_steps": 100, "report_to": [], "logging_nan_inf_filter": False,
         "log_on_each_node": False, "log_level_replica": "passive"},
    ),
    ("set_optimizer", {"name": "sgd", "beta1": 0.8}, {"optim": "sgd", "adam_beta1": 0.8}),
    (
        "set_lr_scheduler",
        {"name": "cosine", "warmup_ratio": 0.05, "num_epochs": 2},
        {"lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "num_train_epochs": 2.0},
    ),
    (
        "set_dataloader",
        {"train_batch_size": 16, "eval_batch_size": 64, "sampler_seed": 7},
        {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 64, "data_seed": 7},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "given", "expected"), SETS)
def test_a_set_method_sets_its_subject_and_returns_the_object(method, given, expected):
    args = TrainingArguments()
    assert getattr(args, method)(**given) is args
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_set_method_resets_what_is_left_out():
    """As documented for all of them: the defaults are those of the method."""
    args = TrainingArguments(learning_rate=1e-3, seed=7).set_training(batch_size=2)
    assert (args.learning_rate, args.seed) == (5e-5, 42)


def test_a_set_method_converts_like_the_constructor():
    args = TrainingArguments().set_training(learning_rate="1e-4", batch_size="4")
    assert (args.learning_rate, args.per_device_train_batch_size) == (1e-4, 4)


@pytest.mark.parametrize(
    ("method", "given", "text"),
    [
        ("set_training", {"batch_size": 0}, "per_device_train_batch_size=0"),
        ("set_evaluate", {"strategy": "steps", "steps": -1}, "eval_steps=-1"),
        ("set_evaluate", {"jit_mode": True}, "jit_mode_eval=True"),
        ("set_testing", {"jit_mode": True}, "jit_mode_eval=True"),
        ("set_save", {"steps": -1}, "save_steps=-1"),
        ("set_logging", {"steps": 0}, "logging_steps=0"),
        ("set_dataloader", {"prefetch_factor": 2}, "dataloader_num_workers=0"),
        ("set_optimizer", {"name": "adamw_torc"}, "did you mean 'adamw_torch'"),
    ],
)
def test_a_set_method_checks_again_and_changes_nothing_when_it_fails(method, given, text):
    args = TrainingArguments("out")
    with pytest.raises(ConfigError, match=text):
        getattr(args, method)(**given)
    assert args == TrainingArguments("out")


def test_set_push_to_hub_sets_its_subject(monkeypatch):
    """Whether it is implemented yet or not: the names behind its parameters."""
    args = TrainingArguments()
    monkeypatch.setattr(args, "validate", lambda: None)
    args.set_push_to_hub("me/m", strategy="end", token="t", private_repo=True, always_push=True)
    assert args.push_to_hub is True
    assert (args.hub_model_id, args.hub_strategy, args.hub_token) == ("me/m", "end", "t")
    assert (args.hub_private_repo, args.hub_always_push) == (True, True)


def test_parallel_mode_is_the_enum_of_transformers(monkeypatch):
    """``TrainingSummary`` compares with ``==``, which is false for any other enum."""
    from transformers.training_args import ParallelMode

    assert TrainingArguments().parallel_mode is ParallelMode.NOT_PARALLEL
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert TrainingArguments().parallel_mode is ParallelMode.DISTRIBUTED


def test_device_on_the_cpu():
    args = TrainingArguments(use_cpu=True)
    assert (args.device.type, args.n_gpu) == ("cpu", 0)


def test_device_is_that_of_the_local_rank(monkeypatch):
    import torch

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    args = TrainingArguments()
    assert (str(args.device), args.n_gpu) == ("cuda:3", 1)
    assert TrainingArguments(use_cpu=True).device.type == "cpu"


def test_what_the_engine_decides():
    args = TrainingArguments(ddp_timeout=90)
    assert args.place_model_on_device is False
    assert args._no_sync_in_gradient_accumulation is False
    assert args._setup_devices == args.device
    assert args.ddp_timeout_delta == timedelta(seconds=90)


def test_should_save_on_each_node(monkeypatch):
    for name, value in (("RANK", "4"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    args = TrainingArguments()
    assert args.should_save is False
    args.save_on_each_node = True
    assert args.should_save is True


def test_dict_fields_are_named():
    assert {"accelerator_config", "deepspeed", "lr_scheduler_kwargs"} <= set(
        TrainingArguments._VALID_DICT_FIELDS
    )
    assert "_VALID_DICT_FIELDS" not in TrainingArguments().to_dict()


def test_main_process_first_on_one_process():
    with TrainingArguments().main_process_first(desc="reading"):
        pass


RANK_PROGRAM = """
import sys, time
from pathlib import Path
from dstrain.arguments import TrainingArguments
folder, fails = Path(sys.argv[1]), sys.argv[2] == "fails"
args = TrainingArguments(str(folder))
for turn in range(2):
    with args.main_process_first(local=False, desc="reading"):
        file = folder / f"cache{turn}"
        if args.process_index == 0:
            time.sleep(0.3)
            if fails:
                raise RuntimeError("disk full")
            file.touch()
        assert file.exists(), "went first"
    print("turn", turn, "done")
"""


@pytest.mark.slow  # two processes that import torch
@pytest.mark.parametrize("outcome", ["works", "fails"])
def test_the_other_ranks_wait_for_the_main_one_without_a_process_group(tmp_path, outcome):
    """The usual place of ``main_process_first`` is before the Trainer starts the ranks."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(RANK_PROGRAM))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path), outcome],
            env={
                "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        texts = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if outcome == "works":
        assert [rank.returncode for rank in ranks] == [0, 0], texts
        assert all("turn 1 done" in text for text in texts)
    else:
        assert "disk full" in texts[0]
        assert all(rank.returncode for rank in ranks)
        assert "the main rank failed in: reading" in texts[1] or "Connection" in texts[1]
