"""Models with adapters, and a function as judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.judges.judge import FunctionJudge, Judgement, Question, describe_function
from dpo_dist.generation.judges.score import score
from dpo_dist.generation.sampling.generate import Request, Sampling
from dpo_dist.generation.sampling.respond import (
    Answer,
    find_model,
    open_generator,
    open_responder,
)
from tests.support.tiny_model import write_model

REQUEST = Request(np.arange(40, 50, dtype=np.int32), "key", 3)


def configured(folder: Path, model: Path) -> RunConfig:
    return load_run_config(
        [f"model.path={model}", "model.dtype=fp32", "data.train=[a.jsonl]", f"run.root={folder}"]
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = write_model(tmp_path / "base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_responds_on_its_base(tmp_path: Path, adapter: Path) -> None:
    config = configured(tmp_path, adapter.parent / "base")
    samples, digests = [], []
    for name in (str(adapter), str(adapter.parent / "base")):
        source = find_model(name, config)
        responder = open_responder(source, config)
        generator = open_generator(responder, config, torch.device("cpu"))
        samples.append(generator([REQUEST], Sampling(12)))
        digests.append(source.digest)
    assert samples[0] != samples[1]
    assert digests[0] != digests[1]


def test_a_model_whose_responses_end_with_other_tokens_has_another_digest(tmp_path: Path) -> None:
    """Otherwise responses of before would be used again."""
    folder = write_model(tmp_path / "model")
    config = configured(tmp_path, folder)
    before = find_model(str(folder), config).digest
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 5]}))
    assert find_model(str(folder), config).digest != before


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "another number of scores"),
        ("return ['high', 'low']", "no finite number"),
        ("return [float('nan'), 1]", "no finite number"),
        ("raise ValueError(prompt)", "raises an exception"),
    ],
)
def test_a_function_that_does_not_score_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    find_function.cache_clear()
    (tmp_path / "own_judge.py").write_text(f"def score(prompt, responses):\n    {body}\n")
    record = PreferenceRecord((Message("user", "a private text"),), (), Origin("a.jsonl", 7))
    with pytest.raises(ConfigError, match=said) as caught:
        FunctionJudge("own_judge:score").judge([Question(record, ("a", "b"))])
    assert "a.jsonl:7" in caught.value.where
    assert "private" not in caught.value.block()


def test_a_mistyped_function_is_found_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge is described before sampling, and opened after it."""
    monkeypatch.chdir(tmp_path)
    find_function.cache_clear()
    (tmp_path / "judge_of_mine.py").write_text("def score(prompt, responses):\n    return [0]\n")
    assert describe_function("judge_of_mine:score")["function"] == "judge_of_mine:score"
    with pytest.raises(ConfigError, match="no such function"):
        describe_function("judge_of_mine:scores")


def test_a_single_usable_response_is_judged_too() -> None:
    """Else the mean score of a round would be of other prompts than that of the next."""

    class Lengths:
        def judge(self, questions: Any) -> list[Judgement]:
            return [Judgement([float(len(text)) for text in each.responses]) for each in questions]

    record = PreferenceRecord((Message("user", "a"),), (), Origin("a.jsonl", 1))
    samples = [
        [Answer(2, "abc", 1, True, True)],
        [],
        [Answer(0, "a", 1, True, True), Answer(1, "ab", 1, True, True)],
    ]
    rows = score([record] * 3, samples, Lengths())
    assert [row["scores"] for row in rows] == [{"2": 3.0}, {}, {"0": 1.0, "1": 2.0}]


def test_a_sharded_checkpoint_responds_as_the_whole_one(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole")
    sharded = write_model(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    config = configured(tmp_path, whole)
    samples = []
    for folder in (whole, sharded):
        responder = open_responder(find_model(str(folder), config), config)
        generator = open_generator(responder, config, torch.device("cpu"))
        samples.append(generator([REQUEST], Sampling(12)))
    assert samples[0] == samples[1]
