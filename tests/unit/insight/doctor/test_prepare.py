"""The doctor's encoding is that of training, and data that training refuses are encoded too."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, OnBadRecord, SourceConfig
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.build import Progress, prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.data.records import Part, eval_part, train_part
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.insight.doctor.examine import prepare
from tests.support import tiny
from tests.support.invented import write_pairs
from tests.support.records import TEXT, jsonl
from tests.support.tiny_model import write_model

VOCABULARY = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def run_of(folder: Path, *train: str | Path, **data: Any) -> RunConfig:
    sources = [SourceConfig(str(path)) for path in train]
    return RunConfig(data=DataConfig(train=sources, cache=str(folder / "encoded"), **data))


def prepared(
    config: RunConfig, model: Path, vocabulary: int = VOCABULARY
) -> tuple[list[list[int]], list[Any], int]:
    encoded: list[int] = []
    datasets, refusals = prepare(config, tiny.qwen(), model, vocabulary, counted(encoded))
    return [list(map(len, of_source)) for of_source in datasets], refusals, sum(encoded)


def counted(encoded: list[int]) -> Progress:
    return lambda _source: contextlib.nullcontext(lambda more, _share: encoded.append(more))


def encoded_by_training(data: DataConfig, model: Path) -> int:
    encoded: list[int] = []

    def opened(sources: list[SourceConfig], part: Part) -> PreferenceDataset:
        digest = tokenizer_digest(model)
        found = prepare_dataset(sources, data, tiny.qwen(), digest, counted(encoded), part)
        return open_dataset(found, data)

    of_eval = opened(data.eval_sources, eval_part(data))
    opened(data.train, train_part(data, of_eval.prompts[:]))
    return sum(encoded)


def test_training_encodes_nothing_afterwards(tmp_path: Path, model: Path) -> None:
    train, held_out = write_pairs(tmp_path / "a.jsonl", 30), write_pairs(tmp_path / "b.jsonl", 5, seed=1)
    plain = run_of(tmp_path, train, eval=[SourceConfig(str(held_out))])
    split = run_of(tmp_path, train, eval_share=0.3)
    without = run_of(tmp_path, train, eval=[SourceConfig(str(held_out))], drop_eval_prompts=True)
    for config, pairs in ((plain, [[30], [5]]), (split, [[21, 9]]), (without, [[30], [5]])):
        datasets, refusals, encoded = prepared(config, model)
        assert encoded > 0
        assert (datasets, refusals) == (pairs, [])
        assert encoded_by_training(config.data, model) == 0


def test_data_with_bad_records_are_encoded_and_refused(tmp_path: Path, model: Path) -> None:
    good = write_pairs(tmp_path / "good.jsonl", 5)
    bad = jsonl(tmp_path, *[{"unknown": 1}] * 3, TEXT)
    datasets, [refusal], _ = prepared(run_of(tmp_path, good, bad), model)
    assert (datasets, type(refusal)) == ([[5], [1]], DataError)
    assert refusal.message == "3 of 4 records cannot be used"
    datasets, [refusal], _ = prepared(run_of(tmp_path, bad, on_bad_record=OnBadRecord.error), model)
    assert (datasets, refusal.where) == ([[1]], f"{bad}:1")
    datasets, [_], _ = prepared(run_of(tmp_path, jsonl(tmp_path, {"unknown": 1})), model)
    assert datasets == [[]]


def test_data_that_loss_or_model_cannot_use_are_refused(tmp_path: Path, model: Path) -> None:
    config = run_of(tmp_path, jsonl(tmp_path, {"prompt": "q", "completion": "a"}))
    [refusal] = prepared(config, model)[1]
    assert refusal.remedy.startswith("set loss=sft")
    sft = replace(config, loss=LossConfig(LossKind.sft))
    assert prepared(sft, model)[1] == []
    [refusal] = prepared(sft, model, 2)[1]
    assert isinstance(refusal, ConfigError)
