"""Corrections of torch's builds, by which DeepSpeed compiles its ops."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from dstrain.core.build_locks import torch_leaves_locks, wait_for_build


def guard_builds() -> None:
    """Make torch wait for builds of other processes by `wait_for_build`; only the first call does.

    torch itself waits for the file `lock` to disappear without a message or a limit, even if the
    process that made it was killed, and then loads an op that was never built. Does nothing for a
    torch that locks an open file, since such a lock ends with its process.
    """
    if not torch_leaves_locks():
        return
    from torch.utils import cpp_extension, file_baton

    if cpp_extension.FileBaton is not file_baton.FileBaton:
        return

    class Baton(file_baton.FileBaton):
        """A build lock of torch that is taken over if the process that has it was killed."""

        def try_acquire(self) -> bool:
            while not super().try_acquire():
                if wait_for_build(Path(self.lock_file_path)):
                    return False
            return True

        def wait(self) -> None:
            wait_for_build(Path(self.lock_file_path))

    cpp_extension.FileBaton = Baton  # type: ignore[misc]


def quote_library_folder() -> None:
    """Make torch quote its folder of libraries in builds, which breaks them if it has a blank.

    Of the paths in the command that links an op, torch quotes all others.
    """
    from torch.utils import cpp_extension

    folder = cpp_extension.TORCH_LIB_PATH
    if os.path.isdir(folder):  # not quoted yet
        cpp_extension.TORCH_LIB_PATH = shlex.quote(folder)
