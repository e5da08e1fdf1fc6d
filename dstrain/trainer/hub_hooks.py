"""Methods of a ``Trainer`` about the Hugging Face Hub: repository, uploads, model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.trainer.optimizer_hooks import OptimizerHooks

if TYPE_CHECKING:
    from dstrain.hub.model_card import CardFacts, CardWishes
    from dstrain.hub.publisher import Publisher
    from dstrain.hub.uploads import Destination


class HubHooks(OptimizerHooks):
    """Has the methods of transformers' Trainer about the Hub."""

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
        from dstrain.hub.model_card import CardWishes
        from dstrain.hub.uploads import Destination, card_name

        wishes = CardWishes(**{"model_name": card_name(self.args), **kwargs})
        self.save_model(_internal_call=True)
        where = Destination(token, revision, private)
        message = commit_message or "End of training"
        return self._upload_folder(message, wishes, where, blocking=blocking)

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
        from dstrain.hub.model_card import CardWishes, write_card

        if self.ranks.is_main:
            wishes = CardWishes(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset,
                dataset_args,
            )  # fmt: skip
            write_card(self._card_facts(), wishes)

    def _begin_publishing(self) -> None:
        """Make the repository for ``push_to_hub``; a hub that fails now may work later.

        Raises:
            ConfigError: checkpoints are to be uploaded, and hold no model.
        """
        if not self.args.push_to_hub:
            return
        from dstrain.hub.uploads import check_uploads, report_failure

        check_uploads(self.args)
        try:
            self.init_hf_repo()
        except Exception as error:
            goes_on = "training goes on, and each upload tries again"
            report_failure(f"the repository cannot be made ({goes_on})", error, self.args)

    def checkpoint_upload(self) -> Callable[[Path], None] | None:
        """Return a function that uploads this step's checkpoint after its commit, in any thread.

        None on other ranks, and where checkpoints are not uploaded.
        """
        args, state = self.args, self.state
        if not args.push_to_hub or not self.ranks.is_main or state.is_hyper_param_search:
            return None
        from dstrain.hub.model_card import CardWishes, card_of
        from dstrain.hub.uploads import (
            card_name,
            checkpoint_upload,
            report_failure,
            uploads_checkpoints,
        )

        if not uploads_checkpoints(args):
            return None
        by_step = args.save_strategy == "steps"
        when = f"step {state.global_step}" if by_step else f"epoch {int(state.epoch or 0)}"
        try:
            card = card_of(self._card_facts(), CardWishes(model_name=card_name(args)))
        except Exception as error:  # no other rank makes one, and would go on with the save
            report_failure("no checkpoint is uploaded", error, args)
            return None
        return checkpoint_upload(self._publish_with(), args, when=when, card=card)

    def _publish_saved(self) -> None:
        """Upload because ``save_model`` was called; only log it where the hub fails."""
        from dstrain.hub.model_card import CardWishes
        from dstrain.hub.uploads import Destination, card_name, report_failure

        wishes = CardWishes(model_name=card_name(self.args))
        try:
            self._upload_folder("Model save", wishes, Destination(), blocking=True)
        except Exception as error:
            report_failure("the model was not uploaded", error, self.args)

    def _upload_folder(
        self, message: str, wishes: CardWishes, where: Destination, *, blocking: bool
    ) -> Any:
        """Upload the run's folder as it is, with a new card; see ``push_to_hub``."""
        self.event("on_push_begin")
        if not self.ranks.is_main:
            return None
        from dstrain.hub.model_card import write_card
        from dstrain.hub.uploads import upload_folder

        return upload_folder(
            self._publish_with(),
            Path(self.args.output_dir),
            message,
            lambda: write_card(self._card_facts(), wishes),
            where,
            blocking=blocking,
        )

    def _finish_publishing(self) -> None:
        """Wait for uploads that are still going on."""
        if self._publisher is not None:
            self._publisher.wait()

    def _publish_with(self) -> Publisher:
        from dstrain.hub.uploads import publisher_for

        if self._publisher is None:
            self._publisher = publisher_for(self.args)
        return self._publisher

    def _card_facts(self) -> CardFacts:
        """Gather what the model card tells of this run."""
        from dstrain.hub.model_card import CardFacts, arguments_that_ran

        return CardFacts(
            output_dir=Path(self.args.output_dir),
            model=self.model,
            train_dataset=self.train_dataset,
            log_history=self.state.log_history,
            arguments=arguments_that_ran(
                self.args,
                self.resolved,
                num_steps=self.state.global_step,
                user_optimizer=self.optimizer if self._has_user_optimizer else None,
                user_scheduler=self.lr_scheduler if self._has_user_scheduler else None,
            ),
        )
