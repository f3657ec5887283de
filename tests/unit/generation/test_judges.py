"""A reward model and a function as judges: batched as one by one, by the model's own template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.config.user_code import find_function
from dpo_dist.data.records import Message, Origin, PreferenceRecord, Prompt
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.judges import FunctionJudge, Judgement, Question, RewardModel
from tests.support import tiny
from tests.support.tiny_model import write_model

FP32 = ModelConfig(path="unused", dtype=Dtype.fp32)
CHAT = (Message("system", "be kind"), Message("user", "hello there"))
RESPONSES = ("hi", "good day to you and to everybody else")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(tokenizer: PreTrainedTokenizerFast | None = None, **facts: Any) -> Path:
        tokenizer = tokenizer or tiny.qwen()
        torch.manual_seed(1)
        usual = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 256}
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.5,
            **usual | facts,
        )
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.save_pretrained(tmp_path / "reward")
        tokenizer.save_pretrained(tmp_path / "reward")
        return tmp_path / "reward"

    return written


def question(prompt: Prompt, *responses: str, **context: Any) -> Question:
    return Question(PreferenceRecord(prompt, (), Origin("a.jsonl", 1), **context), responses)


def reward_model(folder: Path, budget: int = 10**6) -> RewardModel:
    return RewardModel(str(folder), FP32, folder.parent, torch.device("cpu"), budget)


def judged(folder: Path, *questions: Question, budget: int = 10**6) -> list[Judgement]:
    return reward_model(folder, budget).judge(questions)


def alone(folder: Path, response: str, **context: Any) -> float:
    """As transformers' own documentation scores one conversation."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": turn.role, "content": turn.content} for turn in (*CHAT, Message("assistant", response))]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True, **context)["input_ids"]
    with torch.inference_mode():
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize("padding", [{}, {"pad_token_id": None}])
@pytest.mark.parametrize("budget", [10**6, 1])
def test_scores_are_those_of_each_conversation_alone(write: Any, padding: Any, budget: int) -> None:
    folder = write(**padding)
    (judgement,) = judged(folder, question(CHAT, *RESPONSES), budget=budget)
    assert judgement.scores == pytest.approx([alone(folder, text) for text in RESPONSES], abs=1e-5)
    assert len(set(judgement.scores)) == 2


def test_a_special_token_stays_text_and_a_long_conversation_has_no_score(write: Any) -> None:
    folder, spelled = write(max_position_embeddings=60), "no <|im_end|> at all"
    (judgement,) = judged(folder, question(CHAT, spelled, "word " * 60))
    assert judgement.scores != [pytest.approx(alone(folder, spelled), abs=1e-5), None]
    assert judgement.scores[0] is not None
    assert judgement.scores[1] is None
    assert judgement.counts["not_scored"] == 1


def test_a_conversation_that_cannot_be_encoded_has_no_score(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = tiny.with_template(tiny.unigram(), template)
    folder = write(tokenizer, pad_token_id=0)
    monkeypatch.setattr("dpo_dist.generation.judges.load_tokenizer", lambda *_: tokenizer)
    (judgement,) = judged(folder, question(CHAT, "the </s> end", "the end"))
    assert [score is None for score in judgement.scores] == [True, False]


def test_a_model_that_is_no_reward_model_is_refused(write: Any, tmp_path: Path) -> None:
    """Before it is loaded, which is after the last response."""
    for folder in (write(num_labels=3), write_model(tmp_path / "policy")):
        with pytest.raises(ConfigError, match="no reward model"):
            reward_model(folder).describe()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "returns 1 scores"),
        ("return [float('nan'), 1]", "no finite number"),
        ("raise ValueError(prompt)", "raises ValueError"),
    ],
)
def test_a_bad_function_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    find_function.cache_clear()
    (tmp_path / "own_judge.py").write_text(f"def score(prompt, responses):\n    {body}\n")
    with pytest.raises(ConfigError, match=said) as caught:
        FunctionJudge("own_judge:score").judge([question("a private text", "a", "b")])
    assert "a.jsonl:1" in caught.value.where
    assert "private" not in caught.value.block()
    with pytest.raises(ConfigError, match="cannot be imported"):
        FunctionJudge("own_judge:scores")
