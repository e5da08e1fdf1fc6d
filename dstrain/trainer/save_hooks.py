"""Methods of a ``Trainer`` that save its model and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from dstrain.checkpoint import RunLock, RunRecord
from dstrain.config.explain import as_record
from dstrain.core.files import writing
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none
from dstrain.engine import main_rank_buffers
from dstrain.models import save_model, unsaved_remark
from dstrain.trainer.best import BestModel
from dstrain.trainer.callback_states import last_metrics, state_values
from dstrain.trainer.checkpointing import check_state
from dstrain.trainer.hub_hooks import HubHooks
from dstrain.trainer.processing import processor_writer
from dstrain.training.resume import Position
from dstrain.training.watches import watched

logger = get_logger(__name__)


class SaveHooks(HubHooks):
    """Has the methods of transformers' Trainer about saving."""

    _said_unsaved: bool = False

    @watched("saving the model")
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete Hugging Face folder at every ZeRO stage; all ranks must call it.

        Args:
            output_dir: a folder instead of the run's own.
            _internal_call: do not upload it, whatever ``push_to_hub`` says.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not self._said_unsaved and (remark := unsaved_remark(self.model)) is not None:
            self._said_unsaved = True
            if self.ranks.is_main:
                logger.warning("%s", remark)
        with main_rank_buffers(self.model):
            save_model(self.model, folder, self.ranks, on_each_node=self.args.save_on_each_node)
        write = processor_writer(self.processing_class, self.data_collator)
        with all_or_none():
            if self.args.should_save and write is not None:
                with writing(folder):
                    write(folder)
        if self.args.push_to_hub and not _internal_call:
            if folder != Path(self.args.output_dir):
                self.save_model(_internal_call=True)  # what is uploaded is the run's own folder
            self._publish_saved()

    @property
    def output_lock(self) -> RunLock:
        """Return the lock of this run on its output folder."""
        folder = Path(self.args.output_dir)
        return self.checkpoints.lock_on(folder, on_each_node=self.args.save_on_each_node)

    @property
    def best(self) -> BestModel:
        """Return the best model of the run that goes on, or went on last."""
        return self.checkpoints.best

    @property
    def missing_checkpoints(self) -> tuple[int, ...]:
        """Return the steps of the last run whose checkpoints could not be written."""
        return self.checkpoints.missing

    @property
    def last_save_failed(self) -> bool:
        """Tell whether the checkpoint of the last run's last save could not be written."""
        return self.checkpoints.last_save_failed

    # --- behind the edge --------------------------------------------------------------------------

    def _warn_of_user_save(self) -> None:
        """Warn where a subclass saves models in a way of its own, which checkpoints do not take.

        transformers' Trainer calls ``save_model`` for each checkpoint. Here checkpoints are written
        while training goes on, by all ranks, and are whole or absent.
        """
        if self._overrides("save_model") and self.args.save_strategy != "no":
            logger.warning(
                "%s overrides save_model, which is not called for checkpoints: they hold the model "
                "as dstrain writes it. What is to be beside it goes there in a callback's on_save",
                type(self).__name__,
            )

    def check_state(self) -> None:
        """Check, after the first step, that its optimizer's state can be saved; a collective."""
        engine = self._engines.training
        assert engine is not None
        check_state(engine, self.args, self.ranks)

    def save_in_training(self, position: Position) -> None:
        """Save a checkpoint because a callback asked for it."""
        engine = self._engines.training
        assert engine is not None
        self.checkpoints.save(
            engine,
            self.args,
            lambda: self._run_record(position),
            step=self.state.global_step,
            is_read=self.events.read_checkpoints(),
        )
        self.event("on_save")

    def _run_record(self, position: Position) -> RunRecord:
        """Make the part of a checkpoint that is not the engine's state."""
        best = self.state.best_model_checkpoint
        return RunRecord(
            step=self.state.global_step,
            shared={
                "position": position.shared(),
                "global_batch_size": self.resolved.global_batch_size,
            },
            rank_state=position.rank_state(),
            documents={
                "trainer_state.json": state_values(
                    self.state, [*self.events.exportable(), self.control]
                ),
                "resolved_config.json": as_record(self.resolved, self.args),
                "training_arguments.json": json.loads(self.args.to_json_string()),
            },
            write_processor=processor_writer(self.processing_class, self.data_collator),
            metrics=last_metrics(self.state),
            best=None if best is None else Path(best),
            after_commit=self.checkpoint_upload(),
        )
