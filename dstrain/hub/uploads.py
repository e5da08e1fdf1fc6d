"""Uploading a run's folder when asked to, and its checkpoints as they are committed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import holding
from dstrain.core.errors import ConfigError, Problem
from dstrain.core.log import get_logger
from dstrain.core.secrets import hidden_in_text
from dstrain.hub.folder import files_in, is_aside, is_of_a_resume, snapshot
from dstrain.hub.publisher import LAST_CHECKPOINT, Publisher, Upload

logger = get_logger(__name__)

_CARD = "README.md"


@dataclass(frozen=True)
class Destination:
    """Overrides where one upload goes; None keeps what the arguments say.

    Attributes:
        token: token of the account.
        revision: branch to upload to.
        private: whether a new repository is private.
    """

    token: str | None = None
    revision: str | None = None
    private: bool | None = None


def publisher_for(args: TrainingArguments) -> Publisher:
    """Return the publisher of a run; its repository is made when it is first used."""
    return Publisher(
        args.hub_model_id or Path(args.output_dir).absolute().name,
        token=args.hub_token,
        private=args.hub_private_repo,
        revision=args.hub_revision,
    )


def card_name(args: TrainingArguments) -> str:
    """Return the model's name in its card: that of its repository, or of the run's folder."""
    return (args.hub_model_id or str(Path(args.output_dir).absolute())).split("/")[-1]


def check_uploads(args: TrainingArguments) -> None:
    """Refuse to upload checkpoints that hold no model.

    Raises:
        ConfigError: naming the arguments.
    """
    uploads = args.save_strategy != "no" and args.hub_strategy != "end"
    if uploads and not (args.save_weights_with_checkpoint or args.save_only_model):
        raise ConfigError(
            Problem(
                f"hub_strategy={args.hub_strategy!r} with save_weights_with_checkpoint=False",
                "the model is uploaded from its checkpoints, which would hold none",
                "set hub_strategy to end, or leave the weights in the checkpoints",
            )
        )


def uploads_checkpoints(args: TrainingArguments) -> bool:
    """Tell whether each checkpoint is uploaded once it is committed."""
    return args.push_to_hub and args.hub_strategy != "end"


def upload_folder(
    publisher: Publisher,
    folder: Path,
    message: str,
    write_card: Callable[[], None],
    destination: Destination,
    *,
    blocking: bool,
) -> Any:
    """Upload a run's folder as it is, with a new card; on the main rank.

    Args:
        publisher: the run's publisher.
        folder: the run's folder.
        message: the commit's message.
        write_card: writes the card into the folder, once the repository is known.
        destination: where this upload goes.
        blocking: wait until it is uploaded.

    Returns:
        huggingface_hub's ``CommitInfo``, or a ``Future`` of it.

    Raises:
        Exception: of huggingface_hub, where ``blocking`` waits for a failing upload.
    """
    publisher.wait()
    if publisher.repo_id is None:
        publisher.create(token=destination.token, private=destination.private)
    write_card()
    held = contextlib.ExitStack()
    if not blocking:
        folder = held.enter_context(snapshot(folder))
    upload = Upload(
        message,
        files_in(folder, leave_out=is_aside),
        token=destination.token,
        revision=destination.revision,
        held=held,
    )
    return publisher.commit(upload) if blocking else publisher.submit(upload)


def checkpoint_upload(
    publisher: Publisher, args: TrainingArguments, *, when: str, card: str
) -> Callable[[Path], None]:
    """Return a function that uploads a checkpoint after its commit, in any thread.

    Args:
        publisher: the run's publisher.
        args: the user's arguments.
        when: the step or epoch of the checkpoint, for the commit's message.
        card: the model card at that point.
    """

    def publish(folder: Path) -> None:
        if publisher.is_busy and not args.hub_always_push:
            logger.info("%s is not uploaded: the upload before is going on", folder.name)
            return
        files: dict[str, Path | bytes] = {**files_in(folder, leave_out=is_of_a_resume)}
        files[_CARD] = card.encode()
        place = ""
        if args.hub_strategy in ("checkpoint", "all_checkpoints"):
            place = LAST_CHECKPOINT if args.hub_strategy == "checkpoint" else folder.name
            whole = files_in(folder, leave_out=lambda path: False)
            files |= {f"{place}/{name}": path for name, path in whole.items()}
        held = contextlib.ExitStack()
        held.enter_context(holding(folder))  # rotation leaves it alone until it is uploaded
        message = f"Training in progress, {when}"
        publisher.submit(Upload(message, files, replaces=place, held=held))

    return publish


def report_failure(what: str, error: Exception, args: TrainingArguments) -> None:
    """Log that the Hub could not be reached or refused, without the token.

    Args:
        what: the failure in words, such as "the model was not uploaded".
        error: the error of huggingface_hub.
        args: the user's arguments.
    """
    told = hidden_in_text(str(error), known=[args.hub_token])
    logger.error("%s: %s: %s", what, type(error).__name__, told)
