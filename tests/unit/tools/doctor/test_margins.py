"""Sums are those of the stored log-probs of each pair's responses, under any numerics of the reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import ModelConfig, Quantization, ReferenceConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from dpo_dist.reference.stored import find_stored, stored_pairs
from dpo_dist.tools.doctor.measures.margins import compare_with_store, margin_findings
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
    return open_dataset(Preparation([SourceConfig(str(pairs))], data, tiny.qwen(), "qwen").whole(), data)


def stored(folder: Path, model: Path, **reference: Any) -> list[LogpStore]:
    settings = ReferenceConfig(store=str(folder / "store"), **reference)
    return find_stored(ModelConfig(path=str(model)), settings)


def lengths_of(dataset: PreferenceDataset) -> list[int]:
    return [tokens for index in range(len(dataset)) for tokens in dataset.lengths(index)[1:]]


def fill(
    folder: Path, reference: str, dataset: PreferenceDataset, responses: slice, **profile: str
) -> dict[int, np.ndarray]:
    """Store values for some responses; return them."""
    random, lengths = np.random.default_rng(0), lengths_of(dataset)
    values = {
        n: random.normal(-1, 1, size=lengths[n]).astype(np.float32) for n in range(len(lengths))[responses]
    }
    fingerprint = ReferenceFingerprint(reference, {"dtype": "bf16", **profile})
    store = LogpStore.open(folder / "store", fingerprint)
    store.write(dataset.keys[list(values)], list(values.values()))
    return values


def with_every_second_token(dataset: PreferenceDataset) -> PreferenceDataset:
    """The same pairs, of whose responses the loss counts the first token, the third, ..."""
    lengths = lengths_of(dataset)
    masks = [np.arange(tokens) % 2 == 0 for tokens in lengths]
    return replace(
        dataset,
        trained=np.concatenate(masks),
        mask_starts=np.cumsum(lengths) - lengths,
        trained_tokens=np.array([mask.sum() for mask in masks], dtype=np.int32),
    )


def test_sums_of_all_numerics_are_of_the_tokens_that_the_loss_counts(
    tmp_path: Path, model: Path, dataset: PreferenceDataset
) -> None:
    digest = digest_model(model).digest
    values = fill(tmp_path, digest, dataset, slice(0, 6), device="cuda", gpu="H200")
    # The policy's dtype counts first.
    values = fill(tmp_path, digest, dataset, slice(4, 9), device="cpu", dtype="fp32") | values
    fill(tmp_path, "another model", dataset, slice(0, 18))
    stores = stored(tmp_path, model)
    assert {store.fingerprint.profile["device"] for store in stores} == {"cuda", "cpu"}
    for counted, every in ((dataset, 1), (with_every_second_token(dataset), 2)):
        table, places = stored_pairs(stores, [counted])
        assert places.tolist() == [[0, index] for index in range(4)]
        for row, numbers in enumerate((range(0, 8, 2), range(1, 8, 2))):
            np.testing.assert_allclose(table[row], [values[n][::every].sum() for n in numbers], rtol=1e-6)
            assert table[2 + row].tolist() == [len(values[n][::every]) for n in numbers]


def test_nothing_is_found_without_entries_of_this_reference(
    tmp_path: Path, model: Path, dataset: PreferenceDataset
) -> None:
    assert not stored(tmp_path, model)
    assert not (tmp_path / "store").exists()
    fill(tmp_path, "another model", dataset, slice(0, 4))
    assert not stored(tmp_path, model)
    digest = digest_model(model).digest
    fill(tmp_path, digest, dataset, slice(0, 4), quantization="nf4 by bitsandbytes 0.1")
    of_teacher = ReferenceFingerprint(digest, {"dtype": "bf16"}, width=5)
    rows = [np.zeros(5 * tokens, dtype=np.float32) for tokens in lengths_of(dataset)]
    LogpStore.open(tmp_path / "store", of_teacher).write(dataset.keys[:], rows)
    assert not stored(tmp_path, model)
    assert stored(tmp_path, model, quantization=Quantization.nf4)


def test_pairs_that_the_reference_orders_against_the_labels_by_far() -> None:
    per_token = np.random.default_rng(0).normal(-1, 0.1, (2, 100))
    per_token[:, 7], per_token[:, 8], per_token[:, 9] = (-3.5, -1), (-2.9, -1), (-0.2, -2.9)
    table = np.concatenate([40 * per_token, np.full((2, 100), 40.0)])
    margins, facts, [finding] = margin_findings(table, "a:{}".format, "a")
    assert margins == pytest.approx(per_token[0] - per_token[1])
    assert (finding.rule, finding.examples) == ("reference_disagrees", ("a:7", "a:8"))
    assert facts["reference_disagrees"] == 0.02
    # The margin of a single token is within noise.
    assert margin_findings(np.array([[-5.0], [-0.1], [1], [1]]), "a:{}".format, "a")[2] == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.adapter={r: 8, alpha: 16}"],
        ["model.adapter={r: 8, alpha: 16}", "model.quantization=nf4", "parallelism=ddp"],
        ["loss=simpo"],
        ["reference=live"],
    ],
)
def test_precompute_takes_the_words_by_which_it_fills_the_store(words: list[str], tmp_path: Path) -> None:
    run = ["model.path=m", "data.train=[a.jsonl]", f"reference.store={tmp_path}/store", *words]
    config = load_run_config(run)
    use, _ = compare_with_store(config.model, config.reference, config.loss, [], [])
    load_run_config([*run, *use["filled_with"].split()], verb="precompute")
