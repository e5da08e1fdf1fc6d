"""Seeds and random state: a seed shared by all ranks, and seeds derived from it for each rank."""

from __future__ import annotations

import os
import random
from typing import Any


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices) with ``seed``, the same on every rank."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Make torch use only deterministic algorithms for the rest of the process.

    An operation without a deterministic algorithm raises an error. Call it before the device is
    first used: its libraries read their environment then.
    """
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["ASCEND_LAUNCH_BLOCKING"] = "1"
    os.environ["HCCL_DETERMINISTIC"] = "1"
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def derived_seed(seed: int, *, step: int, rank: int) -> int:
    """Return a 63-bit seed that differs for every (seed, step, rank), with no visible pattern."""
    from numpy.random import SeedSequence

    words = SeedSequence([abs(seed), step, rank]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def seed_rank(seed: int, *, step: int, rank: int) -> None:
    """Seed this rank's generators (dropout and other noise) differently from all other ranks'."""
    seed_everything(derived_seed(seed, step=step, rank=rank))


def random_state() -> dict[str, Any]:
    """Return the state of this process's generators: Python's, numpy's, torch's and its device's.

    The state consists of tensors, tuples and plain values; ``set_random_state`` restores it.
    """
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    device = _device_module()
    if device is not None:
        state["device"] = device.get_rng_state().cpu()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state of ``random_state``; skip the device's state where there is no device."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    device = _device_module()
    if device is not None and "device" in state:
        device.set_rng_state(state["device"])


def check_random_state(state: Any) -> None:
    """Check that ``set_random_state`` can restore ``state``, by restoring it on new generators.

    Raises:
        ValueError: ``state`` is not a state of these generators.
    """
    import numpy as np
    import torch

    try:
        _, numbers, following = state["python"]
        random.Random().setstate(state["python"])
        name, keys, position, *rest = state["numpy"]
        # numpy accepts any position and would read beyond the state's end.
        if not 0 <= position <= keys.numel() or not isinstance(following, (float, type(None))):
            raise ValueError("a position or a number in it is out of range")
        np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), position, *rest))
        torch.Generator().set_state(state["torch"])
        if torch.cuda.is_available() and "device" in state:
            torch.Generator(device="cuda").set_state(state["device"])
    except (
        *(KeyError, TypeError, ValueError, RuntimeError, AttributeError),
        *(IndexError, OverflowError),
    ) as error:
        raise ValueError(f"it is no random state: {type(error).__name__}: {error}") from error


def _device_module() -> Any:
    """Return the torch module of the accelerator in use (such as torch.cuda), None on the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type in ("cpu", "mps"):
        return None
    module = getattr(torch, accelerator.type, None)
    return module if module is not None and module.is_available() else None
