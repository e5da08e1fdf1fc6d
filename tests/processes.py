"""A training that a test starts and sends signals to: launcher, ranks and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.launch import free_port, quiet_environment, remove_shared_memory

START_SECONDS = 150.0  # for machines that do other things too

SCRIPT = """
import os, pathlib, sys, time
from dstrain import Trainer, TrainingArguments
from tests.models import RaggedTokens, pad_collate, tiny_llama
from transformers import TrainerCallback

rank = os.environ.get("RANK", "0")
pathlib.Path(f"pid-{rank}").write_text(str(os.getpid()))

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(PAUSE)
        pathlib.Path(f"step-{rank}").write_text(str(state.global_step))
        print(f"rank {rank} has done step {state.global_step}", flush=True)

class Noisy(RaggedTokens):
    def __getitem__(self, index):
        print("sample", index, flush=True)
        return super().__getitem__(index)

trainer = Trainer(
    tiny_llama(),
    TrainingArguments("out", report_to="none", save_strategy="no", logging_steps=1, **SETTINGS),
    data_collator=pad_collate,
    train_dataset=Noisy(64),
    callbacks=[Slow],
)
trainer.train()
print("the script goes on", flush=True)
pathlib.Path(f"done-{rank}").touch()
"""


def write_script(folder: Path, *, pause: float = 0.1, **settings: Any) -> Path:
    """Write a script of the Python API whose ranks say in files who they are and what they do."""
    path = folder / "script.py"
    text = SCRIPT.replace("PAUSE", str(pause)).replace("SETTINGS", repr(settings))
    path.write_text(text)
    return path


def deepspeed(*words: object, num_ranks: int = 2) -> list[str]:
    """Return the command of DeepSpeed's launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    port = str(free_port())
    options = ["--quiet", "--num_gpus", str(num_ranks), "--master_port", port]
    return [sys.executable, str(launcher), *options, *map(str, words)]


@dataclass
class Training:
    """A command in a session of its own, in ``folder``; ended, with all of its session, on exit."""

    command: Sequence[str]
    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    stdout: Any = None
    stderr: Any = None

    def __enter__(self) -> Training:
        self.log = (self.folder / "log").open("w+")
        self.process = subprocess.Popen(
            self.command,
            env=quiet_environment() | dict(self.env),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=self.log if self.stdout is None else self.stdout,
            stderr=self.log if self.stderr is None else self.stderr,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.members()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        words = list(self.command)
        if "--master_port" in words:
            remove_shared_memory(int(words[words.index("--master_port") + 1]))

    def members(self) -> list[int]:
        """Return the living processes of the session, wherever their parents are."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(pid)
        return found

    def find(self, word: str) -> list[int]:
        """Find the members of the session that have this word in their command line."""
        found = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if any(word in w for w in words[:6]):
                    found.append(pid)
        return found

    def pid(self, rank: int) -> int:
        """Return the process id that a rank of the script has written."""
        return int((self.folder / f"pid-{rank}").read_text())

    def step(self, rank: int = 0) -> int:
        """Return the last step that a rank has done."""
        try:
            return int((self.folder / f"step-{rank}").read_text() or 0)
        except FileNotFoundError:
            return 0

    def wait_for(self, what: Callable[[], Any], seconds: float = START_SECONDS) -> None:
        """Wait until something is so."""
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"not so after {seconds} s\n{self.text()}"
            time.sleep(0.1)

    def wait_for_end(self, seconds: float = START_SECONDS) -> int:
        """Wait until no process of the session lives; the status of the command."""
        self.wait_for(lambda: self.process.poll() is not None and not self.members(), seconds)
        return self.process.returncode

    def text(self) -> str:
        """Return what has been printed."""
        return (self.folder / "log").read_text()
