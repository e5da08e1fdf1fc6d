"""Start-up, shutdown and recovery of the process group, and selection of this process's device."""

from dstrain.engine.process_group.devices import (
    check_precision,
    device_name,
    device_type,
    empty_cache,
)
from dstrain.engine.process_group.recovery import ProcessGroupRecovery, is_out_of_memory
from dstrain.engine.process_group.shared_memory import unlink_once_mapped, unlink_rank_buffer
from dstrain.engine.process_group.startup import check_versions, shut_down, start

__all__ = [
    "ProcessGroupRecovery",
    "check_precision",
    "check_versions",
    "device_name",
    "device_type",
    "empty_cache",
    "unlink_rank_buffer",
    "is_out_of_memory",
    "unlink_once_mapped",
    "shut_down",
    "start",
]
