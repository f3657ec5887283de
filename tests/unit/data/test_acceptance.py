"""Data that the model or the loss cannot use are errors before any weights are loaded."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.dataset import PreferenceDataset, check_fits_loss, check_ids_in_vocabulary, open_dataset
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support import tiny
from tests.support.invented import write_pairs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    folder = tmp_path_factory.mktemp("data")
    pairs = write_pairs(folder / "pairs.jsonl", 6, seed=1)
    config = DataConfig(cache=str(folder / "encoded"))
    return open_dataset(prepare_dataset([SourceConfig(str(pairs))], config, tiny.qwen(), "qwen"), config)


def test_a_token_without_an_embedding_is_named_before_training(dataset: PreferenceDataset) -> None:
    """The largest id is counted when the data are encoded: ids are not read at each start."""
    largest = int(np.asarray(dataset.ids).max())
    assert largest + 1 < len(tiny.qwen())
    dataset = replace(dataset, ids=np.empty(0, dtype=np.int32))
    check_ids_in_vocabulary(dataset, tiny.qwen(), len(tiny.qwen()))
    check_ids_in_vocabulary(dataset, tiny.qwen(), largest + 1)
    with pytest.raises(ConfigError, match="without an embedding") as raised:
        check_ids_in_vocabulary(dataset, tiny.qwen(), largest)
    assert repr(tiny.qwen().convert_ids_to_tokens(largest)) in raised.value.got


@pytest.mark.parametrize(
    ("kind", "counts", "got"),
    [
        (LossKind.sigmoid, [2, 1, 2], "1 response"),
        (LossKind.sigmoid, [2, 3, 2], "a ranking"),
        (LossKind.odpo, [2, 2, 2], "no scores"),
    ],
)
def test_examples_that_the_loss_cannot_use_are_listed(kind: LossKind, counts: list[int], got: str) -> None:
    with pytest.raises(DataError, match=f"{kind} cannot use 1 of 3 examples") as raised:
        check_fits_loss(
            LossConfig(kind), np.array(counts), lambda: np.array([1, np.nan, 1]), "line {}".format
        )
    assert raised.value.where == "line 1"
    assert raised.value.got.startswith(got)


def test_a_loss_accepts_the_examples_that_it_uses() -> None:
    for kind, counts in (
        (LossKind.sft, [1, 2, 5]),
        (LossKind.plackett_luce, [2, 5]),
        (LossKind.sigmoid, [2]),
    ):
        check_fits_loss(LossConfig(kind), np.array(counts), lambda: np.array([np.nan]), str)
