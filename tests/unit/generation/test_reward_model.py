"""Scores of a reward model: batched as one by one, by its own template."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.records import Message, Origin, PreferenceRecord, Prompt
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.judges.judge import Question
from dpo_dist.generation.judges.reward_model import RewardModel, describe_reward_model
from tests.support import tiny
from tests.support.tiny_model import write_model

FP32 = ModelConfig(path="unused", dtype=Dtype.fp32)
CHAT = (Message("system", "be kind"), Message("user", "hello there"))
RESPONSES = ("hi", "good day to you and to everybody else", "no <|im_end|> at all")


def write_reward_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    outputs: int = 1,
    padding: bool = True,
    positions: int = 256,
) -> Path:
    tokenizer = tokenizer or tiny.qwen()
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        num_labels=outputs,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id if padding else None,
    )
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def question(prompt: Prompt, *responses: str) -> Question:
    return Question(PreferenceRecord(prompt, (), Origin("a.jsonl", 1)), responses)


def judge(folder: Path, budget: int = 10**6) -> RewardModel:
    return RewardModel(str(folder), FP32, torch.device("cpu"), budget)


def alone(folder: Path, prompt: tuple[Message, ...], response: str, **context: Any) -> float:
    """As transformers' own documentation scores one conversation."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    turns.append({"role": "assistant", "content": response})
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True, **context)["input_ids"]
    with torch.inference_mode():
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("budget", [10**6, 1])
def test_scores_are_those_of_each_conversation_alone(tmp_path: Path, padding: bool, budget: int) -> None:
    folder = write_reward_model(tmp_path / "reward", padding=padding)
    (judgement,) = judge(folder, budget).judge([question(CHAT, *RESPONSES[:2])])
    expected = [alone(folder, CHAT, response) for response in RESPONSES[:2]]
    assert judgement.scores == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 2


def test_a_special_token_in_a_response_stays_text(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "reward")
    (judgement,) = judge(folder).judge([question(CHAT, RESPONSES[2])])
    assert judgement.scores != pytest.approx([alone(folder, CHAT, RESPONSES[2])], abs=1e-5)


def test_a_record_with_tools_is_scored_by_the_template_for_tools(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.qwen())
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": "{{ tools[0].name }}" + tiny.CHATML}
    folder = write_reward_model(tmp_path / "reward", tokenizer)
    tools = ({"name": "weather"},)
    record = PreferenceRecord(CHAT, (), Origin("a.jsonl", 1), tools=tools)
    (judgement,) = judge(folder).judge([Question(record, RESPONSES[:2])])
    expected = [alone(folder, CHAT, response, tools=list(tools)) for response in RESPONSES[:2]]
    assert judgement.scores == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_template_reads_two_texts(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "reward", tiny.base())
    one, two = judge(folder).judge([question("a question", "yes"), question("a question", "no", "maybe")])
    assert (len(one.scores), len(two.scores)) == (1, 2)
    assert len({*one.scores, *two.scores}) == 3


def test_a_conversation_that_is_too_long_has_no_score(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "reward", positions=40)
    (judgement,) = judge(folder).judge([question(CHAT, "hi", "word " * 60)])
    assert judgement.scores[0] is not None
    assert judgement.scores[1] is None
    assert judgement.counts["not_scored"] == 1


def test_a_model_that_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no reward model") as caught:
        judge(write_reward_model(tmp_path / "classes", outputs=3))
    assert "3 outputs" in caught.value.got
    with pytest.raises(ConfigError, match="no reward model") as caught:
        judge(write_model(tmp_path / "policy"))
    assert "score.weight" in caught.value.got or "outputs" in caught.value.got


def test_a_reward_model_with_fewer_layers_than_its_files_is_refused(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "reward")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 1, "layer_types": None}))
    with pytest.raises(ConfigError, match="does not read") as caught:
        judge(folder)
    assert caught.value.where == "pairs.reward_model"


def test_a_model_with_several_outputs_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """It is loaded after the last response."""
    for folder in (write_reward_model(tmp_path / "classes", outputs=3), write_model(tmp_path / "policy")):
        with pytest.raises(ConfigError, match="no reward model"):
            describe_reward_model(str(folder), FP32, tmp_path)


def test_the_digest_is_that_of_the_files(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "reward")
    first = describe_reward_model(str(folder), FP32, tmp_path)
    assert first == describe_reward_model(str(folder), FP32, tmp_path)
    (folder / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text().replace("{", '{"note": 1,', 1)
    )
    assert describe_reward_model(str(folder), FP32, tmp_path)["digest"] != first["digest"]
