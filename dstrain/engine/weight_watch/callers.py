"""Search of the call stack for the package that called a function of torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_LIBRARIES = ("deepspeed", "dstrain")


def is_called_by_a_library(*, passing_on: Sequence[str] = ()) -> bool:
    """Tell whether DeepSpeed or dstrain called the function that ``__torch_function__`` handles.

    Walks up the stack from the caller of ``__torch_function__``, past the frames of torch.

    Args:
        passing_on: modules of DeepSpeed and dstrain that only forward calls of other code, and
            are skipped like those of torch.
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
