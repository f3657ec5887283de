"""Sums are those of the stored log-probs of each example's responses, under any numerics of the reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.schema import ModelConfig, Quantization, ReferenceConfig, RunConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.lookup import describe_numerics, find_stored, stored_sums
from dpo_dist.reference.store import LogpStore
from tests.support import tiny
from tests.support.invented import write_pairs
from tests.support.tiny_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dataset(tmp_path: Path) -> PreferenceDataset:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 9)
    data = DataConfig(cache=str(tmp_path / "encoded"))
    return open_dataset(prepare_dataset([SourceConfig(str(pairs))], data, tiny.qwen(), "qwen"), data)


def run_of(folder: Path, model: Path, **reference: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(model)),
        reference=ReferenceConfig(store=str(folder / "store"), **reference),
    )


def fill(
    folder: Path, reference: str, dataset: PreferenceDataset, responses: slice, **profile: str
) -> dict[int, np.ndarray]:
    """Store values for some responses; return them."""
    random = np.random.default_rng(0)
    lengths = [tokens for index in range(len(dataset)) for tokens in dataset.lengths(index)[1:]]
    values = {
        n: random.normal(-1, 1, size=lengths[n]).astype(np.float32) for n in range(len(lengths))[responses]
    }
    fingerprint = ReferenceFingerprint(reference, {"dtype": "bf16", **profile})
    store = LogpStore.open(folder / "store", fingerprint)
    store.write(dataset.keys[list(values)], list(values.values()))
    return values


def test_sums_of_all_numerics_are_found(tmp_path: Path, model: Path, dataset: PreferenceDataset) -> None:
    digest = digest_model(model).digest
    values = fill(tmp_path, digest, dataset, slice(0, 6), device="cuda", gpu="H200")
    values |= fill(tmp_path, digest, dataset, slice(6, 9), device="cpu")
    fill(tmp_path, "another model", dataset, slice(0, 18))
    store = find_stored(run_of(tmp_path, model))
    assert store is not None
    assert {describe_numerics(each) for each in store.fingerprints} == {"bf16, H200, cuda", "bf16, cpu"}
    sums = stored_sums(store, dataset)
    assert sums.is_stored.tolist() == [True] * 4 + [False] * 5
    np.testing.assert_allclose(sums.chosen[:5], [values[n].sum() for n in range(0, 10, 2)], rtol=1e-6)
    np.testing.assert_allclose(sums.rejected[:4], [values[n].sum() for n in range(1, 8, 2)], rtol=1e-6)
    assert np.isnan(sums.rejected[4])
    assert sums.chosen_tokens.tolist() == [dataset.lengths(index)[1] for index in range(9)]
    assert sums.rejected_tokens.tolist() == [dataset.lengths(index)[2] for index in range(9)]


def test_only_tokens_that_the_loss_counts_are_summed(
    tmp_path: Path, model: Path, dataset: PreferenceDataset
) -> None:
    lengths = [tokens for index in range(len(dataset)) for tokens in dataset.lengths(index)[1:]]
    masks = [np.arange(tokens) % 2 == 0 for tokens in lengths]
    dataset = replace(
        dataset,
        trained=np.concatenate(masks),
        mask_starts=np.cumsum(lengths) - lengths,
        trained_tokens=np.array([mask.sum() for mask in masks], dtype=np.int32),
    )
    values = fill(tmp_path, digest_model(model).digest, dataset, slice(0, 18))
    store = find_stored(run_of(tmp_path, model))
    assert store is not None
    sums = stored_sums(store, dataset)
    np.testing.assert_allclose(sums.chosen, [values[n][::2].sum() for n in range(0, 18, 2)], rtol=1e-6)
    np.testing.assert_allclose(sums.rejected, [values[n][::2].sum() for n in range(1, 18, 2)], rtol=1e-6)
    assert sums.chosen_tokens.tolist() == [(length + 1) // 2 for length in lengths[::2]]


def test_nothing_is_found_without_entries_of_this_reference(
    tmp_path: Path, model: Path, dataset: PreferenceDataset
) -> None:
    assert find_stored(run_of(tmp_path, model)) is None
    assert not (tmp_path / "store").exists()
    fill(tmp_path, "another model", dataset, slice(0, 4))
    assert find_stored(run_of(tmp_path, model)) is None
    digest = digest_model(model).digest
    fill(tmp_path, digest, dataset, slice(0, 4), quantization="nf4 by bitsandbytes 0.1")
    assert find_stored(run_of(tmp_path, model)) is None
    assert find_stored(run_of(tmp_path, model, quantization=Quantization.nf4)) is not None
