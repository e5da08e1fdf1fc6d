"""The semi-private parts of transformers that this room uses, in one place."""

from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.trainer_pt_utils import get_parameter_names

__all__ = ["get_parameter_names", "set_hf_deepspeed_config", "unset_hf_deepspeed_config"]
