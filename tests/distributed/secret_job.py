"""A short run that is given a marked credential in every place that takes one; run by a test."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tests.distributed.runs import make_trainer

MARK = os.environ["TEST_MARK"]


class Notifier(TrainerCallback, ExportableState):
    """A callback of a user's that keeps its keys in what checkpoints save of it."""

    def __init__(self, api_key: str = "") -> None:
        """Keep the key."""
        self.api_key = api_key
        self.kwargs = {"headers": {"Authorization": f"{MARK}-header"}, "seen": 0}

    def state(self) -> dict[str, Any]:
        """Return both secrets, as the state that a checkpoint keeps."""
        return {"args": {"api_key": self.api_key}, "attributes": {"kwargs": self.kwargs}}


def main(folder: Path) -> None:
    """Train, save, resume, upload, and meet a few errors."""
    from dstrain.core.errors import DstrainError

    # DeepSpeed logs the whole config, which has the key, at this level.
    importlib.import_module("deepspeed")
    for logger in (logging.getLogger("DeepSpeed"), *logging.getLogger("DeepSpeed").handlers):
        logger.setLevel(logging.INFO)
    folder.mkdir()
    (folder / "my_ds_config.json").write_text(f'{{"comet": {{"api_key": "{MARK}-file"}}}}')
    config = {
        "comet": {"enabled": False, "api_key": f"{MARK}-comet", "project": "p"},
        "wandb": {"enabled": False, "team": "t"},
    }
    arguments = {
        "hub_token": f"{MARK}-hub",
        "deepspeed": config,
        "push_to_hub": True,
        "hub_always_push": True,
        "hub_strategy": "all_checkpoints",
        "report_to": ["tensorboard"],
        "log_level": "debug",
        "lr_scheduler_kwargs": {},
        "trackio_space_id": f"https://me:{MARK}-url@trackio.example/space",
        "run_name": f"run with password={MARK}-name",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "preemption": "ignore",
        "restore_callback_states_from_checkpoint": True,
        "stage": 1,
    }
    notifier = Notifier(f"{MARK}-callback")
    trainer = make_trainer(folder, callbacks=[notifier], **arguments)
    print(trainer.args, trainer.args.to_json_string(), trainer.args.to_sanitized_dict())
    trainer.train()
    trainer.save_state()
    trainer.push_to_hub()
    trainer.close()
    arguments["max_steps"] = 5
    notifier = Notifier(f"{MARK}-callback")
    again = make_trainer(folder, callbacks=[notifier], **arguments)
    again.train(resume_from_checkpoint=True)
    restored = next(c for c in again.events.handler.callbacks if isinstance(c, Notifier))
    assert restored.api_key == f"{MARK}-callback"
    again.close()
    for wrong in (
        {"deepspeed": {"comet": {"api_key": [f"{MARK}-list"]}}},
        {"deepspeed": f'{{"comet": {{"api_key": "{MARK}-1", "api_key": "{MARK}-2"}}}}'},
        {"deepspeed": {"comet": {"apikey": f"{MARK}-typo"}}},
        {"hub_token": f"{MARK}-a", "push_to_hub_token": f"{MARK}-b"},
        {"hub_token": {"token": f"{MARK}-c"}},
        {"deepspeed": f"{{'comet': {{'api_key': '{MARK}-python'"},
    ):
        try:
            make_trainer(folder, **wrong)
        except DstrainError as error:
            print(error, repr(error), error.problems)
        else:
            raise AssertionError(wrong)
    print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
