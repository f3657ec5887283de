"""The doctor's encoding is that of training, and data that training refuses are encoded too."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, OnBadRecord, SourceConfig
from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.build import Progress, prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.data.records import Part, eval_part, train_part
from dpo_dist.doctor import main
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.insight.doctor.examine import diagnose, prepare
from tests.support import tiny
from tests.support.doctor_data import clean_pairs, write
from tests.support.invented import write_pairs
from tests.support.records import TEXT, jsonl
from tests.support.sft_adapter import write_sft_adapter
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


def test_a_missing_benchmark_file_is_found_before_anything_is_encoded(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", clean_pairs(2))
    keys = ["model.path=absent_model", f"data.train=[{data}]", "doctor.benchmarks=[absent.jsonl]"]
    with pytest.raises(DataError, match="benchmark prompts") as found:
        main(load_run_config(keys))
    assert (found.value.where, found.value.got) == (
        "doctor.benchmarks: absent.jsonl",
        "No such file or directory",
    )


def test_data_are_encoded_by_the_tokenizer_of_the_adapter_that_the_policy_starts_from(tmp_path: Path) -> None:
    """As training encodes them: the base has no chat template, the adapter's folder has one."""
    tokenizer = tiny.qwen()
    model, sft = write_model(tmp_path / "base", tokenizer), tmp_path / "sft"
    write_sft_adapter(model, sft)
    tokenizer.save_pretrained(sft)
    (model / "chat_template.jinja").unlink()
    message = [{"role": "user", "content": "Say hello."}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    data = write(tmp_path / "a.jsonl", [{"prompt": message, **answers}] * 3)
    keys = [f"model.path={model}", f"data.train=[{data}]", f"data.cache={tmp_path}/encoded"]
    found = diagnose(
        load_run_config([*keys, f"model.adapter={{path: {sft}}}"]),
        lambda _title, _unit: contextlib.nullcontext(lambda *_: None),
    )
    assert found.model == sft
    with pytest.raises(ConfigError, match="no chat template"):
        diagnose(load_run_config(keys), lambda _title, _unit: contextlib.nullcontext(lambda *_: None))
