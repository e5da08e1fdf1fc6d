"""transformers' callbacks and trackers, whose modules have moved between releases, in one place."""

from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.utils import is_in_notebook

__all__ = [
    "INTEGRATION_TO_CALLBACK",
    "CallbackHandler",
    "DefaultFlowCallback",
    "PrinterCallback",
    "ProgressCallback",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "get_available_reporting_integrations",
    "get_reporting_integration_callbacks",
    "is_in_notebook",
    "notebook_progress",
]


def notebook_progress() -> Any:
    """Return transformers' table of a run in a notebook; needs IPython."""
    from transformers.utils.notebook import NotebookProgressCallback

    return NotebookProgressCallback
