"""Checks of `pairs`: rules before torch, and `--check`, which asks the judge once and writes nothing."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.generation.pairs.run import rehearse_pairs
from dpo_dist.generation.pairs.start import check_pairs
from tests.support.judge_server import judge_server
from tests.support.records import jsonl, user
from tests.support.tiny_model import write_model

PROMPTS = [{"prompt": [user(f"question {n}")]} for n in range(3)]
SCORED = {"prompt": "p", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 2}]}
SAMPLED = ("pairs.method=samples", "pairs.reward_model=r", "pairs.samples=2")
DELTA = ("pairs.method=delta", "pairs.models=[a/b,c/d]")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()


def config(*overrides: str) -> RunConfig:
    return load_run_config(["data.train=[records.jsonl]", "run.dir=run", "model.path=base", *overrides])


def found(tmp_path: Path, records: list[Any], *overrides: str) -> str:
    jsonl(tmp_path, *records)
    before = sorted(tmp_path.rglob("*"))
    report = rehearse_pairs(config("model.path=model", *overrides))
    assert sorted(tmp_path.rglob("*")) == before
    return report


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.resume=must"], "run.resume has no effect"),
        ([*DELTA, "model.revision=x"], "model.revision has no effect"),
        ([*SAMPLED, "pairs.temperature=0"], "every sample of a model is the same"),
        ([*SAMPLED, "pairs.function=a:b"], "samples need one judge"),
        (["pairs.method=samples", "model.path=a/b", "pairs.endpoint.url=http://h/v1"], "model is not given"),
        (["pairs.method=delta", "pairs.models=[a,./a]"], "two models"),
        (["pairs.rounds=1"], "rounds cannot be done"),
        (["pairs.rounds=1", *SAMPLED, "pairs.models=[other]"], "rounds cannot be done"),
        (["pairs.margin=1", "pairs.top_k=3", "pairs.launcher=python"], "(?s)2 mistakes.*top_k.*launcher"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_pairs(config(*overrides))


def test_rounds_are_done_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        check_pairs(config(*SAMPLED, "pairs.rounds=1"))


def test_models_prompts_and_the_endpoint_are_checked(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    records = [*PROMPTS, {"prompt": [user("word " * 900)]}, {"no": "prompt"}]
    with judge_server(lambda *_: "[[5]]") as server:
        keys = ["pairs.method=samples", f"pairs.endpoint.url={server.url}", "pairs.endpoint.model=judge"]
        report = found(tmp_path, records, *keys, "data.max_bad_share=0.2")
    assert len(server.bodies) == 1
    assert f"judge at {server.url} replies" in report
    assert "model, 431 tokens, a response ends with <|im_end|>" in report
    assert "3 of the first 5 records can be used; not used: 1 prompt_fills_max_length (" in report
    assert "), 1 unknown_format (" in report
    with judge_server(lambda *_: (400, "{}")) as server:
        keys[1] = f"pairs.endpoint.url={server.url}"
        with pytest.raises(ConfigError, match="harmless request"):
            found(tmp_path, PROMPTS, *keys)
    Qwen2Config(num_labels=2).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="no reward model"):
        found(tmp_path, PROMPTS, "pairs.method=samples", "pairs.models=[]", "pairs.reward_model=model")


@pytest.mark.parametrize(("records", "said"), [(10, "10 records"), (2000, "the first 1024 records")])
def test_more_bad_records_than_pairs_accepts_are_an_error(records: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        found(tmp_path, ([SCORED] * 9 + [{"no": "prompt"}]) * (records // 10))


def test_records_without_scores_give_no_pairs(tmp_path: Path) -> None:
    assert "1 of the first 1 records can be used" in found(tmp_path, [SCORED])
    with pytest.raises(DataError, match="1 without_scores"):
        found(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])
