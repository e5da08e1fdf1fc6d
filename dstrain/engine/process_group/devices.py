"""Selection of the accelerator that this process trains on, its names, formats and memory."""

from __future__ import annotations

import os

from dstrain.core.errors import ConfigError, Problem


def choose_accelerator(*, use_cpu: bool) -> None:
    """Make DeepSpeed use the CPU if asked to, or if there is no accelerator; before its import."""
    import torch

    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    if use_cpu or not (torch.cuda.is_available() or _other_accelerator()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def device_type() -> str:
    """Return the torch device type that DeepSpeed trains on."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name()).split(":")[0]


def device_name() -> str:
    """Return the torch device of this rank, such as "cuda:0" or "cpu"."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def empty_cache() -> None:
    """Return device memory that torch caches to the system; does nothing on the CPU."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().empty_cache()


def check_precision(precision: str) -> None:
    """Check that the device can train in a number format.

    Args:
        precision: "fp32", "bf16" or "fp16".

    Raises:
        ConfigError: naming the device and the formats that it supports.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {
        "fp32": True,
        "bf16": accelerator.is_bf16_supported(),
        "fp16": accelerator.is_fp16_supported(),
    }
    if not supported[precision]:
        raise ConfigError(
            Problem(
                f"{precision} on {accelerator.device_name()}",
                f"this device trains in {' and '.join(k for k, v in supported.items() if v)}",
                f"leave {precision} out, or choose another device",
            )
        )


def _other_accelerator() -> bool:
    """Tell whether torch finds an accelerator that is not a CUDA device (xpu, npu, hpu)."""
    import torch

    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return found is not None and found.type not in ("cpu", "mps")
