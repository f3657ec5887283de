"""`--check` of `compare`: configurations and tokenizers only, prompts by every model, nothing written."""

from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import DataError
from dpo_dist.insight.compare.models import rehearse_comparison
from dpo_dist.insight.compare.start import check_comparison
from tests.support import tiny
from tests.support.records import jsonl, user
from tests.support.tiny_model import write_model

PROMPTS = [*({"prompt": [user(f"question {n}")]} for n in range(3)), {"prompt": [user("word " * 900)]}]


def rehearsed(tmp_path: Path, *overrides: str) -> str:
    data = f"data.eval=[{tmp_path}/records.jsonl]"
    models = f"compare.models=[{tmp_path}/base,{tmp_path}/other]"
    base = ["model.path=x", "data.train=[x.jsonl]", data, models, f"run.dir={tmp_path}/run"]
    config = load_run_config([*base, *overrides])
    before = sorted(tmp_path.rglob("*"))
    report = rehearse_comparison(config, check_comparison(config))
    assert sorted(tmp_path.rglob("*")) == before
    return report


def test_models_and_prompts_are_checked_without_weights(tmp_path: Path) -> None:
    jsonl(tmp_path, *PROMPTS)
    write_model(tmp_path / "base")
    write_model(tmp_path / "other", tiny.zephyr())
    (tmp_path / "base" / "model.safetensors").write_bytes(b"damaged")
    report = rehearsed(tmp_path, "pairs.function=tests.support.own_judge:letter_shares")
    assert f"base: {tmp_path}/base, 431 tokens, a response ends with <|im_end|>" in report
    assert "judge:    function tests.support.own_judge:letter_shares" in report
    assert "base: " in report
    assert report.count("3 of the first 4 records can be used; not used: 1 prompt_fills_max_length") == 2
    assert "none: no scores, no win rates" in rehearsed(tmp_path)
    with pytest.raises(DataError, match="none of the first records"):
        rehearsed(tmp_path, "compare.max_new_tokens=4000")
