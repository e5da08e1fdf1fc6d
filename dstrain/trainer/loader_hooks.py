"""Methods of a ``Trainer`` that make its loaders for training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import all_or_none
from dstrain.data import end_processes
from dstrain.trainer import loaders
from dstrain.trainer.base import TrainerBase
from dstrain.training.types import Dataset, Loader


class LoaderHooks(TrainerBase):
    """Has the methods of transformers' Trainer about data loaders."""

    _eval_loaders: Mapping[str | None, tuple[Dataset, Loader]] = MappingProxyType({})

    def get_train_dataloader(self) -> Loader:
        """Make this rank's training loader.

        Raises:
            DataError: there is no training data, or it is empty.
        """
        if self.train_dataset is None:
            raise DataError(
                Problem("train() without train_dataset", "", "pass train_dataset to the Trainer")
            )
        return self._loader(self.train_dataset, train=True)

    def get_eval_dataloader(self, eval_dataset: Dataset = None) -> Loader:
        """Make this rank's evaluation loader; every sample is on one rank, in the dataset's order.

        Loaders of the constructor's datasets are kept with ``dataloader_persistent_workers``.

        Args:
            eval_dataset: a dataset, or the name of one in the constructor's dict.

        Raises:
            DataError: there is no evaluation data, or it is empty.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            return self._loader(eval_dataset, train=False)
        if self.eval_dataset is None:
            raise DataError(
                Problem("evaluate() without eval_dataset", "", "pass one here or to the Trainer")
            )
        dataset = self.eval_dataset
        if eval_dataset is not None:
            known = dataset if isinstance(dataset, dict) else {}
            if eval_dataset not in known:
                raise DataError(
                    Problem(
                        f"evaluation on {eval_dataset!r}",
                        f"the names of the Trainer's eval_dataset are {list(known)}",
                        "name one of these, or pass a dataset",
                    )
                )
            dataset = known[eval_dataset]
        found, loader = self._eval_loaders.get(eval_dataset, (None, None))
        if found is not dataset:
            end_processes(loader)
            loader = self._loader(dataset, train=False)
            if getattr(loader, "persistent_workers", False):
                self._eval_loaders = {**self._eval_loaders, eval_dataset: (dataset, loader)}
        return loader

    def get_test_dataloader(self, test_dataset: Dataset) -> Loader:
        """Make this rank's loader for ``predict``."""
        return self._loader(test_dataset, train=False)

    def _loader(self, dataset: object, *, train: bool) -> Loader:
        """Make this rank's loader of a dataset; the model gets the columns that it takes."""
        description = "training" if train else "evaluation"
        lengths = loaders.lengths_of(dataset, self.args, self.processing_class) if train else None
        dataset, collate = loaders.prepare_dataset(
            dataset, self.data_collator, self.model, self.args, description=description
        )
        return loaders.make_loader(
            dataset, collate, self.resolved, self.args, self.ranks, train=train, lengths=lengths
        )

    def _agreed_loader(self, make: Callable[[], object], *, method: str) -> Loader:
        """Make the loader of an evaluation; check that all ranks have the same data; a collective.

        Raises:
            DataError: a rank has no data, or data other than the rest; on all ranks.
        """
        with all_or_none():
            loader = make()
        loaders.check_shared_out(loader, self.ranks, method=method)
        return loader

    def _release_eval_loaders(self) -> None:
        """End the processes of loaders that were kept."""
        for _, loader in self._eval_loaders.values():
            end_processes(loader)
        self._eval_loaders = MappingProxyType({})

    def _named_parts(self, eval_dataset: object) -> dict[str, Dataset] | None:
        """Return the datasets to evaluate one by one, by name; None where there is only one."""
        if isinstance(eval_dataset, dict):
            return eval_dataset
        if eval_dataset is None and isinstance(self.eval_dataset, dict):
            return {name: name for name in self.eval_dataset}
        return None
