"""Data that the model cannot take are refused before anything is loaded."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.build_dataset import prepare_dataset
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.errors import ConfigError
from dpo_dist.training.data_setup import check_ids_in_vocabulary
from tests.support import tiny
from tests.support.invented import write_pairs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    folder = tmp_path_factory.mktemp("data")
    pairs = write_pairs(folder / "pairs.jsonl", 6, seed=1)
    config = DataConfig(cache=str(folder / "encoded"))
    return open_dataset(prepare_dataset([SourceConfig(str(pairs))], config, tiny.qwen(), "qwen"), config)


def test_a_token_without_an_embedding_is_named_before_training(dataset: PreferenceDataset) -> None:
    """By what was noted when the data were encoded: ids are not read at each start."""
    largest = int(dataset.ids[0 : len(dataset.ids)].max())
    assert largest + 1 < len(tiny.qwen())
    dataset = replace(dataset, ids=np.empty(0, dtype=np.int32))
    check_ids_in_vocabulary(dataset, tiny.qwen(), len(tiny.qwen()))
    check_ids_in_vocabulary(dataset, tiny.qwen(), largest + 1)
    with pytest.raises(ConfigError, match="no embedding") as raised:
        check_ids_in_vocabulary(dataset, tiny.qwen(), largest)
    assert repr(tiny.qwen().convert_ids_to_tokens(largest)) in raised.value.got
