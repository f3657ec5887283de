"""`--check` of `pairs`: models without weights on the device, the judge asked once, nothing written."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.generation.pairs.preflight import rehearse_pairs
from tests.support.judge_server import judge_server
from tests.support.records import jsonl, user
from tests.support.tiny_model import write_model

PROMPTS = [{"prompt": [user(f"question {n}")]} for n in range(3)]
SCORED = {"prompt": "p", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 2}]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def found(tmp_path: Path, records: list[Any], *overrides: str) -> str:
    source = jsonl(tmp_path, *records)
    before = sorted(tmp_path.rglob("*"))
    base = [f"model.path={tmp_path}/model", f"data.train=[{source}]", f"run.dir={tmp_path}/run"]
    report = rehearse_pairs(load_run_config([*base, *overrides]))
    assert sorted(tmp_path.rglob("*")) == before
    return report


def test_models_prompts_and_the_endpoint_are_checked(tmp_path: Path, model: Path) -> None:
    with judge_server(lambda *_: "[[5]]") as server:
        report = found(
            tmp_path,
            [*PROMPTS, {"prompt": [user("word " * 900)]}, {"no": "prompt"}],
            "pairs.method=samples",
            f"pairs.endpoint.url={server.url}",
            "pairs.endpoint.model=judge",
            "data.max_bad_share=0.2",
        )
    assert len(server.bodies) == 1
    assert f"judge at {server.url} replies" in report
    assert f"{model}, 431 tokens, a response ends with <|im_end|>" in report
    assert (
        "3 of the first 5 records can be used; not used: 1 prompt_fills_max_length (the prompt fills"
        in report
    )
    assert "), 1 unknown_format (the fields are of no known format)" in report


@pytest.mark.parametrize("records", [10, 2000])
def test_more_bad_records_than_pairs_accepts_are_an_error(records: int, tmp_path: Path) -> None:
    looked_at = min(records, 1024)
    with pytest.raises(DataError, match=f"{'the first ' if records > looked_at else ''}{looked_at} records"):
        found(tmp_path, ([SCORED] * 9 + [{"no": "prompt"}]) * (records // 10), "pairs.method=scores")


def test_an_endpoint_that_refuses_is_an_error(tmp_path: Path, model: Path) -> None:
    assert model.is_dir()
    with judge_server(lambda *_: (400, {}, "{}")) as server:
        keys = [f"pairs.endpoint.url={server.url}", "pairs.endpoint.model=judge"]
        with pytest.raises(ConfigError, match="refuses every request"):
            found(tmp_path, PROMPTS, "pairs.method=samples", *keys)


def test_a_model_with_two_outputs_is_no_judge(tmp_path: Path, model: Path) -> None:
    Qwen2Config(num_labels=2).save_pretrained(tmp_path / "judge")
    for file in model.iterdir():
        if file.name != "config.json":
            (tmp_path / "judge" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="no reward model"):
        found(tmp_path, PROMPTS, "pairs.method=samples", f"pairs.reward_model={tmp_path}/judge")


def test_records_without_scores_give_no_pairs(tmp_path: Path) -> None:
    report = found(tmp_path, [SCORED], "pairs.method=scores")
    assert "1 of the first 1 records can be used" in report
    with pytest.raises(DataError) as caught:
        found(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}], "pairs.method=scores")
    assert caught.value.got == "1 without_scores"


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=r"run\.dir cannot be written"):
        found(tmp_path, [SCORED], "pairs.method=scores")


def test_a_file_in_place_of_a_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match=r"run\.dir cannot be written"):
        found(tmp_path, [SCORED], "pairs.method=scores")
