"""Documented ``set_*`` methods: each sets the arguments of a subject.

A method sets all of its arguments, those that are left out to the default of the method. It then
checks all arguments again and returns the object. If the check fails the object is not changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

from dstrain.arguments.features import TWINS


class Setters:
    """Methods that set the arguments of one subject at once."""

    def validate(self) -> None:
        """Convert and check all fields, as the ``set_*`` methods do; for use after assignments.

        If the check fails no field is changed, so that a second call fails too.

        Raises:
            ConfigError: some values are wrong; the error lists all problems.
        """
        with self._as_before_a_failure():
            self._validate()

    def _validate(self) -> None:
        """Convert and check all fields in place; a failure may leave some of them converted."""
        raise NotImplementedError

    def _change(self, **values: Any) -> Self:
        with self._as_before_a_failure():
            vars(self).update(values | {TWINS[n]: v for n, v in values.items() if n in TWINS})
            self.validate()
        return self

    @contextlib.contextmanager
    def _as_before_a_failure(self) -> Iterator[None]:
        """Reset all fields to their values before the block if the block fails."""
        before = dict(vars(self))
        try:
            yield
        except Exception:  # whatever a value makes conversions raise
            vars(self).clear()
            vars(self).update(before)
            raise

    def set_training(
        self,
        learning_rate: float = 5e-5,
        batch_size: int = 8,
        weight_decay: float = 0,
        num_epochs: float = 3,
        max_steps: int = -1,
        gradient_accumulation_steps: int = 1,
        seed: int = 42,
        gradient_checkpointing: bool = False,
        activation_checkpointing: bool | None = None,
    ) -> Self:
        """Set the basic arguments of training, and ``do_train``.

        The last two are names of one argument; ``activation_checkpointing`` counts if it is given.
        """
        if activation_checkpointing is None:
            activation_checkpointing = gradient_checkpointing
        return self._change(
            do_train=True,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            weight_decay=weight_decay,
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            gradient_checkpointing=activation_checkpointing,
        )

    def set_evaluate(
        self,
        strategy: str = "no",
        steps: float = 500,
        batch_size: int = 8,
        accumulation_steps: int | None = None,
        delay: float | None = None,
        loss_only: bool = False,
        jit_mode: bool = False,
    ) -> Self:
        """Set the arguments of evaluation; ``do_eval`` follows the strategy."""
        return self._change(
            eval_strategy=strategy,
            do_eval=strategy != "no",
            eval_steps=steps,
            per_device_eval_batch_size=batch_size,
            eval_accumulation_steps=accumulation_steps,
            eval_delay=0 if delay is None else delay,
            prediction_loss_only=loss_only,
            jit_mode_eval=jit_mode,
        )

    def set_testing(
        self, batch_size: int = 8, loss_only: bool = False, jit_mode: bool = False
    ) -> Self:
        """Set the basic arguments of testing on held-out data, and ``do_predict``."""
        return self._change(
            do_predict=True,
            per_device_eval_batch_size=batch_size,
            prediction_loss_only=loss_only,
            jit_mode_eval=jit_mode,
        )

    def set_save(
        self,
        strategy: str = "steps",
        steps: float = 500,
        total_limit: int | None = None,
        on_each_node: bool = False,
    ) -> Self:
        """Set the arguments of checkpoints."""
        return self._change(
            save_strategy=strategy,
            save_steps=steps,
            save_total_limit=total_limit,
            save_on_each_node=on_each_node,
        )

    def set_logging(
        self,
        strategy: str = "steps",
        steps: float = 500,
        report_to: str | list[str] = "none",
        level: str = "passive",
        first_step: bool = False,
        nan_inf_filter: bool = False,
        on_each_node: bool = False,
        replica_level: str = "passive",
    ) -> Self:
        """Set the arguments of logging.

        As documented, ``nan_inf_filter`` and ``on_each_node`` are False by default, whereas the
        arguments of the constructor are True.
        """
        return self._change(
            logging_strategy=strategy,
            logging_steps=steps,
            report_to=report_to,
            log_level=level,
            logging_first_step=first_step,
            logging_nan_inf_filter=nan_inf_filter,
            log_on_each_node=on_each_node,
            log_level_replica=replica_level,
        )

    def set_push_to_hub(
        self,
        model_id: str,
        strategy: str = "every_save",
        token: str | None = None,
        private_repo: bool | None = False,
        always_push: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Set the arguments of the Hub, and ``push_to_hub``."""
        return self._change(
            push_to_hub=True,
            hub_model_id=model_id,
            hub_strategy=strategy,
            hub_token=token,
            hub_private_repo=private_repo,
            hub_always_push=always_push,
            hub_revision=revision,
        )

    def set_optimizer(
        self,
        name: str = "adamw_torch",
        learning_rate: float = 5e-5,
        weight_decay: float = 0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        args: str | None = None,
    ) -> Self:
        """Set optimizer and hyperparameters."""
        return self._change(
            optim=name,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_epsilon=epsilon,
            optim_args=args,
        )

    def set_lr_scheduler(
        self,
        name: str = "linear",
        num_epochs: float = 3.0,
        max_steps: int = -1,
        warmup_ratio: float = 0,
        warmup_steps: float = 0,
    ) -> Self:
        """Set the learning-rate schedule and its length."""
        return self._change(
            lr_scheduler_type=name,
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            warmup_ratio=warmup_ratio,
            warmup_steps=warmup_steps,
        )

    def set_dataloader(
        self,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = True,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        auto_find_batch_size: bool = False,
        ignore_data_skip: bool = False,
        sampler_seed: int | None = None,
        multiprocessing_context: str | None = None,
        in_order: bool = True,
    ) -> Self:
        """Set the arguments of loaders; ``sampler_seed`` sets ``data_seed``."""
        return self._change(
            per_device_train_batch_size=train_batch_size,
            per_device_eval_batch_size=eval_batch_size,
            dataloader_drop_last=drop_last,
            dataloader_num_workers=num_workers,
            dataloader_pin_memory=pin_memory,
            dataloader_persistent_workers=persistent_workers,
            dataloader_prefetch_factor=prefetch_factor,
            auto_find_batch_size=auto_find_batch_size,
            ignore_data_skip=ignore_data_skip,
            data_seed=sampler_seed,
            dataloader_multiprocessing_context=multiprocessing_context,
            dataloader_in_order=in_order,
        )
