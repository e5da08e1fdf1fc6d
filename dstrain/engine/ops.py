"""Compilation of DeepSpeed's ops before a run needs them, and removal of stale build locks.

DeepSpeed compiles an op when a run first needs it, through torch's `load`, which guards each op's
folder with a file named `lock`. Two things go wrong with that. The first run seems to hang for a
minute, so `build_ops` compiles ahead and prints a line. And a process that is killed while it
builds leaves its lock behind, so that every later run waits for ever. Therefore stale locks are
removed first (`core/build_locks.py`), and a run that needs an op waits with a limit
(`engine/torch_builds.py`).

`python -m dstrain.engine.ops shm_comm fused_adam cpu_adam` removes stale locks and builds the ops.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.core.build_locks import (
    clear_stale_locks,
    taking_turns,
    wait_for_build,
)
from dstrain.core.descendants import end_descendants
from dstrain.core.errors import ConfigError, DstrainError, Problem, nearest

# Signals that end a build, as they end a run.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Op:
    """A compiled op of DeepSpeed.

    Attributes:
        builder: name of DeepSpeed's builder class.
        folder: name of the op's folder, and of the library in it.
        typical_seconds: how long a build takes on a small machine.
        needs: libraries that a build needs besides a compiler, and how to install them.
    """

    builder: str
    folder: str
    typical_seconds: int = 60
    needs: str = ""


OPS = {
    "shm_comm": Op("ShareMemCommBuilder", "deepspeed_shm_comm"),
    "fused_adam": Op("FusedAdamBuilder", "fused_adam"),
    "cpu_adam": Op("CPUAdamBuilder", "cpu_adam"),
    "cpu_lion": Op("CPULionBuilder", "cpu_lion"),
    "cpu_adagrad": Op("CPUAdagradBuilder", "cpu_adagrad"),
    "fused_lion": Op("FusedLionBuilder", "fused_lion"),
    "fused_lamb": Op("FusedLambBuilder", "fused_lamb"),
    "pin_memory": Op("PinMemoryBuilder", "pin_memory"),
    "async_io": Op(
        "AsyncIOBuilder",
        "async_io",
        typical_seconds=300,
        needs="libaio with its headers (on Debian and Ubuntu: apt-get install libaio-dev)",
    ),
}


def extensions_dir() -> Path:
    """Return the folder in which this environment keeps its compiled ops.

    That is TORCH_EXTENSIONS_DIR where it is set, else `torch_extensions` inside the virtual
    environment, since environments that share a folder rebuild each other's ops. Outside of a
    virtual environment it is torch's default.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix) / "torch_extensions"
    return _torch_default_dir()


def prepare_environment() -> Path:
    """Make this process, and those it starts, use `extensions_dir()` and this environment's ninja.

    torch calls the first ninja on PATH. If a virtual environment's python is called without
    activating the environment, that is the system's ninja, or there is none. Different releases of
    ninja take each other's builds for outdated, so runs that differ only in PATH would compile
    every op again, each time.

    Returns:
        `extensions_dir()`.
    """
    folder = extensions_dir()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    programs = Path(sys.executable).parent
    ninja = programs / "ninja"
    if ninja.exists() and shutil.which("ninja") != str(ninja):
        os.environ["PATH"] = os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)])
    return folder


def is_built(name: str) -> bool:
    """Tell whether `build_ops` has built an op for this Python, torch, DeepSpeed and processor.

    Reads two files and imports neither torch nor deepspeed. Returns False if the library was
    written again since: DeepSpeed may then build it in the next run too, so `build_ops` must check.

    Raises:
        ConfigError: there is no such op.
    """
    library = _library(extensions_dir(), _op(name))
    stamp = _read_stamp(library.parent)
    return stamp is not None and library.exists() and stamp == _stamp(library)


def check_buildable(name: str) -> None:
    """Check that an op is built or can be built on this machine; takes about a second.

    Uses DeepSpeed's check, which compiles a few lines against the libraries that the op needs.

    Raises:
        ConfigError: the op is not built and cannot be; or there is no such op.
    """
    if is_built(name):
        return
    prepare_environment()
    if _builder(name).is_compatible(verbose=False):
        return
    raise ConfigError(
        Problem(
            f"DeepSpeed's {name} is not built, and cannot be built here",
            f"it needs {_op(name).needs or 'what this machine lacks'}",
            f"install that, then try `python -m dstrain.engine.ops {name}`",
        )
    )


def build_ops(names: Sequence[str]) -> None:
    """Build the named ops that are not built yet, and print a line for each on standard error.

    Processes that build in the same folder take turns.

    Raises:
        ConfigError: there is no such op, the accelerator has none, or it does not compile.
    """
    if all([is_built(name) for name in names]):
        return
    folder = prepare_environment()
    folder.mkdir(parents=True, exist_ok=True)
    waiting = f"Waiting for another process that builds DeepSpeed's ops in {folder} ..."
    with taking_turns(folder / ".dstrain-build.lock", waiting=waiting):
        for name in names:
            if not is_built(name):
                _build(name, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Clear stale locks and build the ops named on the command line; return the exit status.

    A signal ends ninja and its compilers too, and the status is 128 + signal.
    """
    parser = argparse.ArgumentParser(prog="python -m dstrain.engine.ops", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="op", help=f"any of {', '.join(OPS)}")
    names = parser.parse_args(arguments).names
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end_build)
    try:
        clear_stale_locks(extensions_dir())
        build_ops(names)
    except DstrainError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _ignore_signals()
        _say_interrupted()
        return 128 + signal.SIGINT
    finally:
        # A launch/ script that gets Ctrl-C too sends SIGTERM: in the end of Python it would only
        # raise an error.
        _ignore_signals()
    return 0


def _end_build(number: int, _: object) -> None:
    """End the compilers and raise SystemExit, at which torch removes its lock (signal handler)."""
    _ignore_signals()
    end_descendants()
    _say_interrupted()
    sys.exit(128 + number)


def _ignore_signals() -> None:
    """Let this process, which is about to end, end in its own way."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def _say_interrupted() -> None:
    with contextlib.suppress(OSError):  # of a terminal that has gone
        _say("Interrupted: an op that is not ready is built by the next run that needs it.")


def _op(name: str) -> Op:
    """Return the op of a name.

    Raises:
        ConfigError: there is no such op.
    """
    if name in OPS:
        return OPS[name]
    close = nearest(name, set(OPS))
    raise ConfigError(
        Problem(
            f"There is no op named {name!r}",
            f"the known ones are {', '.join(OPS)}",
            f"did you mean {close!r}?" if close else "",
        )
    )


def _build(name: str, folder: Path) -> None:
    """Build an op in ``folder``, or check that it is up to date, and record its versions."""
    op = _op(name)
    library = _library(folder, op)
    lock = library.with_name("lock")
    clear_stale_locks(folder)
    stamp = _read_stamp(library.parent)
    if stamp is not None and not stamp.items() >= _fingerprint().items() and not lock.exists():
        # Built for another torch, or for a processor with other instructions. ninja would not
        # notice, since the command line is the same.
        shutil.rmtree(library.parent)
    if lock.exists():
        _say(f"Waiting for the run that builds DeepSpeed's {name} ...")
        wait_for_build(lock)
    elif library.exists():
        _say(f"Checking DeepSpeed's {name} (about {op.typical_seconds} s if it is outdated) ...")
    else:
        _say(f"Building DeepSpeed's {name} (about {op.typical_seconds} s, once) ...")
    started = time.monotonic()
    _load(name)
    _write_stamp(library)
    _say(f"DeepSpeed's {name} is ready ({time.monotonic() - started:.1f} s).")


def _load(name: str) -> None:
    """Let DeepSpeed compile an op if it is not up to date, and load it.

    Raises:
        ConfigError: the op does not compile, or the accelerator has none.
        KeyboardInterrupt: a signal has ended ninja, as Ctrl-C does also where Python ignores it.
    """
    from dstrain.engine.torch_builds import guard_builds, quote_library_folder

    builder = _builder(name)
    also = f"; {_op(name).needs}" if _op(name).needs else ""
    guard_builds()
    quote_library_folder()
    try:
        builder.load(verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise ConfigError(
            Problem(
                f"DeepSpeed's {name} does not build",
                str(error),
                "it takes a C++17 compiler and Python's headers (on Debian and Ubuntu: apt-get "
                f"install build-essential python3-dev), on NVIDIA GPUs nvcc as well{also}",
            )
        ) from error


def _was_interrupted(error: Exception) -> bool:
    """Tell whether a build failed because a signal ended ninja, which then ends with 130."""
    cause = error.__cause__
    return isinstance(cause, subprocess.CalledProcessError) and (
        cause.returncode == 128 + signal.SIGINT or -cause.returncode in _ENDING
    )


def _builder(name: str) -> Any:
    """Return DeepSpeed's builder of an op.

    Raises:
        ConfigError: the accelerator has no such op.
    """
    os.environ.setdefault("DS_LOG_LEVEL", "WARNING")
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    builder = accelerator.create_op_builder(_op(name).builder)
    if builder is None or type(builder).__name__ == "NotImplementedBuilder":
        raise ConfigError(f"DeepSpeed has no {name} for accelerator {accelerator.device_name()!r}")
    return builder


def _torch_default_dir() -> Path:
    """Return the folder that torch's `_get_build_directory` uses by default for all ops."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if torch.version.hip is not None:
        accelerator = f"rocm{torch.version.hip.replace('.', '')}"
    elif torch.version.cuda is not None:
        accelerator = f"cu{torch.version.cuda.replace('.', '')}"
    else:
        accelerator = "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{accelerator}"


def _fingerprint() -> dict[str, str]:
    """Return the versions and the processor that a compiled op depends on."""
    return {
        "python": f"{sys.implementation.cache_tag} {sys.prefix}",
        "torch": importlib.metadata.version("torch"),
        "deepspeed": importlib.metadata.version("deepspeed"),
        # DeepSpeed compiles with -march=native.
        "processor": f"{platform.machine()} {_processor_features()}",
    }


def _processor_features() -> str:
    """Return a hash of the processor's instruction sets; "" if they are not known."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return hashlib.sha256(line.encode()).hexdigest()[:16]
    return ""


def _read_stamp(op_folder: Path) -> dict[str, str] | None:
    """Return the record of a build; None without one, {} if it cannot be read."""
    try:
        return json.loads((op_folder / "dstrain-built.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def _stamp(library: Path) -> dict[str, str]:
    """Return the record of a library as it is now."""
    return {**_fingerprint(), "built": str(library.stat().st_mtime_ns)}


def _write_stamp(library: Path) -> None:
    """Write the record of a build beside the library."""
    if not library.exists():
        return  # an op that was compiled when DeepSpeed was installed
    unfinished = library.with_name(f"dstrain-built.{os.getpid()}")
    unfinished.write_text(json.dumps(_stamp(library), indent=1))
    unfinished.replace(library.with_name("dstrain-built.json"))


def _library(folder: Path, op: Op) -> Path:
    """Return the path of an op's library."""
    return folder / op.folder / f"{op.folder}.so"


def _say(line: str) -> None:
    """Print a line on standard error at once."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
