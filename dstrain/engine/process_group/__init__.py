"""Start-up of this process, its process group and devices, and forming the group again."""

from dstrain.engine.process_group.recovery import ProcessGroupRecovery, is_out_of_memory
from dstrain.engine.process_group.shared_memory import forget_own, let_go_of_names
from dstrain.engine.process_group.startup import (
    check_precision,
    check_versions,
    device_name,
    device_type,
    empty_cache,
    shut_down,
    start,
)

__all__ = [
    "ProcessGroupRecovery",
    "check_precision",
    "check_versions",
    "device_name",
    "device_type",
    "empty_cache",
    "forget_own",
    "is_out_of_memory",
    "let_go_of_names",
    "shut_down",
    "start",
]
