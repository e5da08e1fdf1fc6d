"""Reading from the stack of a thread where it is: in a collective, a debugger, a user's line."""

from __future__ import annotations

import contextlib
import os
import sysconfig
from types import FrameType

from dstrain.engine import device_type

_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_HOME = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_COLLECTIVES = (
    os.path.join(os.sep, "torch", "distributed", ""),
    os.path.join(os.sep, "deepspeed", "comm", ""),
    os.path.join(_HOME, "core", "ranks.py"),
)
# Here a frame is innermost only while it waits, in C++, for a collective that it began before.
_WAITS = tuple(
    os.path.join(_HOME, *n) for n in (("training", "preemption.py"), ("data", "lockstep.py"))
)
_DEBUGGERS = ("pdb.py", "bdb.py")


def collective_of(frame: FrameType | None) -> FrameType | None:
    """Find the call in which the main thread waits for other ranks; None where it does not.

    On an accelerator it waits for the device, and only from there for other ranks: then it is
    the call of a library.
    """
    innermost = frame
    if frame is not None and frame.f_code.co_filename in _WAITS:
        return frame
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _COLLECTIVES):
            return frame
        if frame.f_code.co_filename.startswith(_HOME):
            break
        if not frame.f_code.co_filename.startswith(_LIBRARIES):
            return None  # a user's code, called by a library
        frame = frame.f_back
    return innermost if device_type() != "cpu" else None


def line_of(frame: FrameType | None) -> str:
    """Find the innermost line of a user's code, or else of any code."""
    innermost, found = frame, None
    candidate = None
    while frame is not None and found is None:
        name = frame.f_code.co_filename
        if name.startswith(_HOME):
            # What dstrain has called. Around the outermost call of it there is only the user's
            # script, in whatever function of that: main() says nothing of where a rank stands.
            found = candidate
        elif candidate is None and not name.startswith((*_LIBRARIES, "<")):
            candidate = frame
        frame = frame.f_back
    shown = found or innermost
    if shown is None:
        return "an unknown line"
    return f"{shown.f_code.co_filename}:{shown.f_lineno} in {shown.f_code.co_name}"


def is_debugged(frame: FrameType | None) -> bool:
    """Tell whether the process is in pdb, or traced by a debugger."""
    while frame is not None:
        if os.path.basename(frame.f_code.co_filename) in _DEBUGGERS:
            return True
        frame = frame.f_back
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in status)
    return False
