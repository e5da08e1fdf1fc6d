"""Arguments about the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import alias, implemented, stored


def _in_organization(arguments: Any, organization: str) -> str:
    """Return ``hub_model_id`` with the organization before its name."""
    name = arguments.hub_model_id or Path(arguments.output_dir).name
    owner, slash, rest = name.partition("/")
    if slash and owner != organization:
        raise ValueError(name)
    return f"{organization}/{rest or name}"


@dataclass
class HubArguments:
    """Uploading the model to the Hugging Face Hub, and the project in trackers."""

    push_to_hub: bool = arg(
        False, "Upload the model each time that it is saved.", treatment=implemented()
    )
    hub_model_id: str | None = arg(
        None,
        "Repository, as name or owner/name; none takes the name of output_dir.",
        treatment=implemented(),
    )
    hub_strategy: str = arg(
        "every_save",
        "Upload the model with each checkpoint ('every_save'), with it also the last checkpoint or "
        "all of them, or only the model that save_model writes ('end').",
        choices=("end", "every_save", "checkpoint", "all_checkpoints"),
        treatment=implemented("in the background, from the committed checkpoint"),
    )
    hub_token: str | None = arg(
        None,
        "Token to upload with; none takes HF_TOKEN, or the one of the login. Never written down. "
        "Under a launcher give it as HF_TOKEN: launchers print their command.",
        treatment=implemented(),
    )
    hub_private_repo: bool | None = arg(
        False,
        "Create the repository as a private one; none takes the owner's default.",
        treatment=implemented(),
    )
    hub_always_push: bool = arg(
        False,
        "Upload even while the upload before is not finished.",
        treatment=implemented(),
    )
    hub_revision: str | None = arg(
        None,
        "Branch of the repository that uploads go to, which must be there; none is the main one.",
        treatment=implemented(own=True),
    )
    push_to_hub_model_id: str | None = arg(
        None, "Old name of hub_model_id.", treatment=alias("hub_model_id")
    )
    push_to_hub_organization: str | None = arg(
        None,
        "Old way to write the owner in hub_model_id.",
        treatment=alias("hub_model_id", convert=_in_organization, note="as organization/name"),
    )
    push_to_hub_token: str | None = arg(
        None, "Old name of hub_token.", treatment=alias("hub_token")
    )
    project: str = arg(
        "huggingface",
        "Name of the project in Trackio.",
        treatment=stored("transformers' Trackio callback reads it", own=True),
    )
    trackio_space_id: str | None = arg(
        None,
        "Hub Space that Trackio writes to.",
        treatment=stored("transformers' Trackio callback reads it", own=True),
    )
    trackio_bucket_id: str | None = arg(
        None,
        "Hub bucket of that Space.",
        treatment=stored("transformers' Trackio callback reads it", own=True),
    )
    trackio_static_space_id: str | None = arg(
        None,
        "Static Hub Space that Trackio copies the run to when it ends.",
        treatment=stored("transformers' Trackio callback reads it", own=True),
    )
