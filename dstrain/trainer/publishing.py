"""The Hugging Face Hub for a ``Trainer``: its repository, what is uploaded when, its model card."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dstrain.checkpoint import holding
from dstrain.core.errors import ConfigError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks
from dstrain.core.secrets import has_secrets, hidden_in_text
from dstrain.reporting.hub import LAST_CHECKPOINT, Publisher, Upload
from dstrain.trainer.card import CardWishes, card_of, write_card

logger = get_logger(__name__)

# Of a checkpoint, what only a resume needs; of a run's folder, what is no part of the model.
_OF_A_RESUME = {"state", "manifest.json", "trainer_state.json"}
_CARD = "README.md"
_COPY_BYTES = 16 * 2**20
# Settings that a user may have put beside the model; a file larger than this is none.
_SETTINGS_BYTES = 2**20
# Of a model: what is called a token there is one of a vocabulary.
_OF_A_MODEL = ("tokenizer", "vocab", "special_tokens", "added_tokens", "config.json", "merges")


class HubHooks:
    """The methods of transformers' Trainer about the Hub."""

    args: Any
    state: Any
    model: Any
    ranks: Ranks
    events: Any
    save_model: Any
    _publisher: Publisher | None = None

    @property
    def hub_model_id(self) -> str | None:
        """Return owner/name of the repository, on the main rank once it is known to be there."""
        return None if self._publisher is None else self._publisher.repo_id

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository where it is not there yet; on the main rank.

        Args:
            token: instead of ``hub_token``.
            private: instead of ``hub_private_repo``; for a new one only.

        Raises:
            Exception: of huggingface_hub, where the hub refuses or cannot be reached.
        """
        if self.ranks.is_main:
            self._publish_with().create(token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model into the run's folder and upload it with its card; all ranks must call it.

        Args:
            commit_message: of the commit.
            blocking: wait until it is uploaded.
            token: instead of ``hub_token``.
            revision: branch to upload to, instead of ``hub_revision``.
            private: whether a new repository is private, instead of ``hub_private_repo``.
            **kwargs: of ``create_model_card``.

        Returns:
            On the main rank huggingface_hub's ``CommitInfo``, or a ``Future`` of it.

        Raises:
            Exception: of huggingface_hub, where ``blocking`` waits for a failing upload.
        """
        wishes = CardWishes(**{"model_name": self._card_name(), **kwargs})
        self.save_model(_internal_call=True)
        return self._push_folder(
            commit_message or "End of training",
            wishes,
            blocking=blocking,
            token=token,
            revision=revision,
            private=private,
        )

    def _push_folder(
        self,
        message: str,
        wishes: CardWishes,
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        """Upload the run's folder as it is, with a new card; see ``push_to_hub``."""
        self.events("on_push_begin")
        if not self.ranks.is_main:
            return None
        publisher = self._publish_with()
        publisher.wait()
        if publisher.repo_id is None:
            publisher.create(token=token, private=private)
        write_card(self, wishes)
        held = contextlib.ExitStack()
        folder = Path(self.args.output_dir)
        if not blocking:
            folder = held.enter_context(_snapshot(folder))
        upload = Upload(
            message,
            _files(folder, leave_out=_is_aside),
            token=token,
            revision=revision,
            held=held,
        )
        return publisher.commit(upload) if blocking else publisher.submit(upload)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write ``README.md`` into the run's folder: results, arguments and versions of this run.

        Args:
            language: of the model.
            license: by default that of the model it was fine-tuned from, if the hub says.
            tags: in the card's metadata; those of a card that is there stay.
            model_name: by default that of the folder.
            finetuned_from: by default the repository that the model came from.
            tasks: task identifiers; with a dataset, results go into the metadata.
            dataset_tags: dataset identifiers, in the metadata.
            dataset: names of datasets, in the text.
            dataset_args: their configurations.
        """
        if self.ranks.is_main:
            wishes = CardWishes(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset,
                dataset_args,
            )  # fmt: skip
            write_card(self, wishes)

    def _begin_publishing(self) -> None:
        """Make the repository for ``push_to_hub``; a hub that fails now may work later.

        Raises:
            ConfigError: checkpoints are to be uploaded, and hold no model.
        """
        args = self.args
        if not args.push_to_hub:
            return
        uploads = args.save_strategy != "no" and args.hub_strategy != "end"
        if uploads and not (args.save_weights_with_checkpoint or args.save_only_model):
            raise ConfigError(
                Problem(
                    f"hub_strategy={args.hub_strategy!r} with save_weights_with_checkpoint=False",
                    "the model is uploaded from its checkpoints, which would hold none",
                    "set hub_strategy to end, or leave the weights in the checkpoints",
                )
            )
        try:
            self.init_hf_repo()
        except Exception as error:
            logger.error(
                "the repository cannot be made: %s: %s; training goes on, and each upload tries "
                "again",
                type(error).__name__,
                hidden_in_text(str(error), known=[args.hub_token]),
            )

    def checkpoint_upload(self) -> Callable[[Path], None] | None:
        """Return a function that uploads this step's checkpoint after its commit, in any thread.

        None on other ranks, and where checkpoints are not uploaded.
        """
        args, state = self.args, self.state
        uploads = args.push_to_hub and args.hub_strategy != "end"
        if not uploads or not self.ranks.is_main or state.is_hyper_param_search:
            return None
        by_step = args.save_strategy == "steps"
        when = f"step {state.global_step}" if by_step else f"epoch {int(state.epoch or 0)}"
        wishes = CardWishes(model_name=self._card_name())
        try:
            card = card_of(self, wishes, before=Path(args.output_dir) / _CARD).encode()
        except Exception as error:  # no other rank makes one, and would go on with the save
            told = hidden_in_text(str(error), known=[args.hub_token])
            logger.error("no checkpoint is uploaded: %s: %s", type(error).__name__, told)
            return None
        publisher = self._publish_with()

        def publish(folder: Path) -> None:
            if publisher.is_busy and not args.hub_always_push:
                logger.info("%s is not uploaded: the upload before is going on", folder.name)
                return
            files: dict[str, Path | bytes] = {**_files(folder, leave_out=_is_of_a_resume)}
            files[_CARD] = card
            place = ""
            if args.hub_strategy in ("checkpoint", "all_checkpoints"):
                place = LAST_CHECKPOINT if args.hub_strategy == "checkpoint" else folder.name
                whole = _files(folder, leave_out=lambda path: False)
                files |= {f"{place}/{name}": path for name, path in whole.items()}
            held = contextlib.ExitStack()
            held.enter_context(holding(folder))  # rotation leaves it alone until it is uploaded
            message = f"Training in progress, {when}"
            publisher.submit(Upload(message, files, replaces=place, held=held))

        return publish

    def _publish_saved(self) -> None:
        """Upload because ``save_model`` was called; a hub that fails is only told."""
        try:
            self._push_folder("Model save", CardWishes(model_name=self._card_name()))
        except Exception as error:
            told = hidden_in_text(str(error), known=[self.args.hub_token])
            logger.error("the model was not uploaded: %s: %s", type(error).__name__, told)

    def _finish_publishing(self) -> None:
        """Wait for what is still on its way."""
        if self._publisher is not None:
            self._publisher.wait()

    def _publish_with(self) -> Publisher:
        if self._publisher is None:
            args = self.args
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            self._publisher = Publisher(
                name,
                token=args.hub_token,
                private=args.hub_private_repo,
                revision=args.hub_revision,
            )
        return self._publisher

    def _card_name(self) -> str:
        return (self.args.hub_model_id or str(Path(self.args.output_dir).absolute())).split("/")[-1]


def _files(folder: Path, *, leave_out: Any) -> dict[str, Path]:
    """Map paths inside a folder to its files; none hidden, nor settings with credentials."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not hidden and not leave_out(inside):
            if _holds_credentials(path):
                logger.warning("%s is not uploaded: it holds a credential", path)
                continue
            found[inside.as_posix()] = path
    return found


def _holds_credentials(path: Path) -> bool:
    """Tell whether a file holds settings, such as a DeepSpeed config, with a credential in them."""
    if path.suffix != ".json" or path.name.startswith(_OF_A_MODEL):
        return False
    try:
        if path.stat().st_size > _SETTINGS_BYTES:
            return False
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and has_secrets(content)
    except (OSError, ValueError, RecursionError):
        return False  # uploading it says so


def _is_of_a_resume(path: Path) -> bool:
    return path.parts[0] in _OF_A_RESUME


def _is_aside(path: Path) -> bool:
    """Tell whether a path of a run's folder is a checkpoint, a trial, private or being written."""
    return path.parts[0].startswith(("_", "checkpoint-", "run-")) or path.suffix == ".partial"


@contextlib.contextmanager
def _snapshot(folder: Path) -> Iterator[Path]:
    """Copy a run's folder aside for the block, so that files may change in it meanwhile.

    Large ones are linked: weights are never changed in place, only replaced.
    """
    aside = folder / f".upload-{uuid.uuid4().hex[:8]}"
    try:
        for name, path in _files(folder, leave_out=_is_aside).items():
            copy = aside / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.stat().st_size > _COPY_BYTES:
                try:
                    os.link(path, copy)
                    continue
                except OSError:
                    pass  # a file system without links
            shutil.copyfile(path, copy)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
