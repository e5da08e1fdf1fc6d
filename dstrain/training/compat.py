"""Semi-private parts of transformers that this room uses, in one place."""

from transformers.debug_utils import DebugUnderflowOverflow
from transformers.integrations.liger import apply_liger_kernel

__all__ = ["DebugUnderflowOverflow", "apply_liger_kernel"]
