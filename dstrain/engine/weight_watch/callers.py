"""The package that has called a function of torch, inside of a ``TorchFunctionMode``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_LIBRARIES = ("deepspeed", "dstrain")


def is_called_by_a_library(*, passing_on: Sequence[str] = ()) -> bool:
    """Tell whether DeepSpeed or dstrain has made a call; to be used in ``__torch_function__``.

    Args:
        passing_on: modules of both that only pass on calls of other code.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__"))
        package = module.split(".")[0]
        is_in_between = package == "torch" or frame.f_code.co_name == "__torch_function__"
        if not is_in_between and module not in passing_on:
            return package in _LIBRARIES
        frame = frame.f_back
    return False
