"""The columns that a model takes."""

from __future__ import annotations

import pickle

import pytest

from dstrain.core.errors import DataError
from dstrain.data import (
    keep_columns,
)
from tests.unit.data.loaders import as_list

ROWS = {"input_ids": [[1], [2]], "labels": [[3], [4]], "text": ["a", "b"]}
AS_SAMPLES = [{name: column[i] for name, column in ROWS.items()} for i in range(2)]


def test_a_dataset_loses_unused_columns_before_it_is_read():
    import datasets

    dataset, collate = keep_columns(
        datasets.Dataset.from_dict(ROWS), as_list, ["input_ids", "labels"], description="training"
    )
    assert dataset.column_names == ["input_ids", "labels"]
    assert collate is as_list


@pytest.mark.parametrize("streams", [False, True])
def test_other_datasets_lose_unused_columns_in_front_of_the_collator(streams):
    import datasets

    dataset = datasets.Dataset.from_dict(ROWS).to_iterable_dataset() if streams else AS_SAMPLES
    same, collate = keep_columns(dataset, as_list, ["input_ids"], description="training")
    assert same is dataset
    collate = pickle.loads(pickle.dumps(collate))  # loader processes may be spawned
    assert collate(list(dataset)) == [{"input_ids": [1]}, {"input_ids": [2]}]
    assert list(AS_SAMPLES[0]) == list(ROWS), "the user's own samples stay whole"


def test_samples_that_are_no_dicts_are_left_alone():
    _, collate = keep_columns([(1, 2)], as_list, ["input_ids"], description="training")
    assert collate([(1, 2)]) == [(1, 2)]


@pytest.mark.parametrize("as_dataset", [True, False])
def test_no_column_left_is_an_error_that_names_both_sides(as_dataset):
    """Otherwise the model is called with nothing, and the message is about a missing argument."""
    import datasets

    rows = [{"text": "a", "n": 1}]
    dataset = datasets.Dataset.from_list(rows) if as_dataset else rows

    def attempt() -> None:
        _, collate = keep_columns(dataset, as_list, ["input_ids"], description="evaluation")
        collate(rows)

    with pytest.raises(DataError, match=r"evaluation set has columns \['text', 'n'\]") as caught:
        attempt()
    assert "it takes input_ids" in str(caught.value)
