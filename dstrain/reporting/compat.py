"""transformers' callbacks and trackers, whose modules have moved between releases, in one place."""

from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

__all__ = [
    "INTEGRATION_TO_CALLBACK",
    "CallbackHandler",
    "DefaultFlowCallback",
    "PrinterCallback",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "get_available_reporting_integrations",
    "get_reporting_integration_callbacks",
]
