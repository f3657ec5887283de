"""Judges: a reward model as transformers scores, a function, and an endpoint over real HTTP."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.records import Message, Origin, PreferenceRecord, Prompt
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.user_code import find_function
from dpo_dist.tools.sampling import client, judges
from dpo_dist.tools.sampling.judges import (
    EndpointJudge,
    FunctionJudge,
    Judgement,
    Question,
    RewardModel,
)
from dpo_dist.tools.sampling.keys import EndpointConfig, Verdicts
from tests.support import tiny
from tests.support.judge_server import Answer, JudgeServer, judge_server
from tests.support.tiny_model import write_model

FP32 = ModelConfig(path="unused", dtype=Dtype.fp32)
CHAT = (Message("system", "be kind"), Message("user", "hello there"))
RESPONSES = ("hi", "good day to you and to everybody else")


def write(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **facts: Any) -> Path:
    """A reward model."""
    write_model(folder, tokenizer)
    config = AutoConfig.from_pretrained(folder, **{"num_labels": 1, "initializer_range": 0.5} | facts)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def question(prompt: Prompt, *responses: str) -> Question:
    return Question(PreferenceRecord(prompt, (), Origin("a.jsonl", 1)), responses)


def reward_model(folder: Path, budget: int = 10**6) -> RewardModel:
    return RewardModel(str(folder), FP32, folder, torch.device("cpu"), budget)


def whole_ids(folder: Path, response: str) -> torch.Tensor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [{"role": turn.role, "content": turn.content} for turn in (*CHAT, Message("assistant", response))]
    encoded = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def alone(folder: Path, response: str) -> float:
    """As transformers' own documentation scores one conversation."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ids = whole_ids(folder, response)
    with torch.inference_mode():
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize(("padding", "budget"), [({}, 10**6), ({}, 1), ({"pad_token_id": None}, 10**6)])
def test_scores_are_those_of_each_conversation_alone(tmp_path: Path, padding: Any, budget: int) -> None:
    folder = write(tmp_path, **padding)
    (judgement,) = reward_model(folder, budget).judge([question(CHAT, *RESPONSES)])
    assert judgement.scores == pytest.approx([alone(folder, text) for text in RESPONSES], abs=1e-5)
    assert len(set(judgement.scores)) == 2


def test_a_special_token_stays_text_and_a_long_or_rejected_conversation_has_no_score(tmp_path: Path) -> None:
    folder, spelled = write(tmp_path, max_position_embeddings=60), "no <|im_end|> at all"
    (judgement,) = reward_model(folder).judge([question(CHAT, spelled, "word " * 60)])
    assert judgement.scores != [pytest.approx(alone(folder, spelled), abs=1e-5), None]
    assert judgement.scores[0] is not None
    assert judgement.scores[1] is None
    assert judgement.counts["not_scored"] == 1
    strict = write(tmp_path / "strict", tiny.mistral())
    (judgement,) = reward_model(strict).judge([question(CHAT, "the template takes no system turn")])
    assert judgement.scores == [None]


def test_a_conversation_as_long_as_the_limit_has_a_score(tmp_path: Path) -> None:
    longest = whole_ids(write_model(tmp_path / "model"), RESPONSES[1]).shape[1]
    for limit, is_scored in ((longest, True), (longest - 1, False)):
        folder = write(tmp_path / str(limit), max_position_embeddings=limit)
        (judgement,) = reward_model(folder).judge([question(CHAT, RESPONSES[1])])
        assert judgement.scores == [
            pytest.approx(alone(folder, RESPONSES[1]), abs=1e-5) if is_scored else None
        ]


def test_a_model_that_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    """Before it is loaded, which is after the last response."""
    for folder in (write(tmp_path / "three", num_labels=3), write_model(tmp_path / "policy")):
        with pytest.raises(ConfigError, match="not a reward model"):
            reward_model(folder).check()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "returns 1 scores"),
        ("return [float('nan'), 1]", "not a finite number"),
        ("return '87'", "not a finite number"),
        ("return [True, 1]", "not a finite number"),
        ("raise ValueError(prompt)", "raises ValueError"),
        ("return 1.0", r"raises TypeError[^$]*score\(prompt, responses\) returns a list"),
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


SHORT, LONG, LONGER = "hm", "a long response", "an even longer response"


def longer_wins(content: dict[str, Any]) -> str:
    first, second = len(content["response_A"]), len(content["response_B"])
    return f"I weighed both. [[{'tie' if first == second else 'A' if first > second else 'B'}]]"


def always(reply: Any) -> Answer:
    return lambda *_: reply


@pytest.fixture(autouse=True)
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRIES", 0)


def endpoint(url: str, **keys: Any) -> EndpointJudge:
    return EndpointJudge(EndpointConfig(url=url, model="judge", **keys))


def judged(answer: Answer, *responses: str, **keys: Any) -> tuple[Judgement, JudgeServer]:
    with judge_server(answer) as server:
        asked = question((Message("user", "say something long"),), *responses)
        (judgement,) = endpoint(server.url, **keys).judge([asked])
    return judgement, server


def test_scores_are_shares_of_comparisons_won_in_both_positions() -> None:
    judgement, server = judged(longer_wins, SHORT, LONG, LONGER)
    assert judgement.scores == [0.0, 0.5, 1.0]
    assert judgement.counts["requests"] == len(server.bodies) == 6
    asked = [json.loads(body["messages"][-1]["content"]) for body in server.bodies]
    assert asked[0]["conversation"] == [{"role": "user", "content": "say something long"}]
    positions = {(each["response_A"], each["response_B"]) for each in asked}
    assert len(positions) == 6
    assert positions == {(second, first) for first, second in positions}
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 1024)


THOUGHTS = "<think>[[B]] or [[A]]? It may be [[tie]].</think> I weighed [[A]], too. "
PARTS = '{"choices": [{"message": {"content": [{"type": "text", "text": "So [["}, {"text": "5]]"}]}}]}'
CUT = '{"choices": [{"message": {"content": "[[A]]? Or"}, "finish_reason": "length"}]}'
FILTERED = 400, '{"error": {"code": "filter"}}'
GRADE = {"verdicts": Verdicts.grade}


@pytest.mark.parametrize(
    ("answer", "keys", "scores", "counts"),
    [
        (always("The first one. [[A]]"), {}, [0.5, 0.5], {"position_disagreements": 1}),
        (always("[[tie]]"), {}, [0.5, 0.5], {}),
        (lambda content: THOUGHTS + longer_wins(content), {}, [0.0, 1.0], {}),
        (always("A is better [A]"), {}, [None, None], {"unreadable": 2}),
        (always((200, '{"choices": []}')), {}, [None, None], {"unreadable": 2}),
        (always((200, PARTS)), GRADE, [5.0, 5.0], {}),
        (always((200, CUT)), {}, [None, None], {"unreadable": 2}),
        (always("ok [[10]]"), GRADE, [10.0, 10.0], {}),
        (always("[[5]], no: [[0]]"), GRADE, [None, None], {"unreadable": 2}),
        (lambda sent: FILTERED if "response_A" in sent else "", {}, [None, None], {"refused": 2}),
    ],
)
def test_verdicts(answer: Answer, keys: Any, scores: list[float | None], counts: dict[str, int]) -> None:
    judgement, _ = judged(answer, SHORT, LONG, **keys)
    assert judgement.scores == scores
    assert +judgement.counts == {"requests": 2} | counts


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    _, server = judged(longer_wins, SHORT, LONG)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer very-secret"}


REFUSAL = {"error": {"code": "bad_parameter", "param": "max_tokens", "message": "a text of the record"}}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((401, ""), "does not reply.*401.*OPENAI_API_KEY"),
        ((200, "<html>sign in</html>"), "does not reply"),
        ((400, json.dumps(REFUSAL)), "status 400, bad_parameter, max_tokens, also for a harmless request"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_an_error(
    reply: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "PARALLEL_REQUESTS", 1)
    with pytest.raises(ConfigError, match=f"(?s){said}") as caught:
        judged(always(reply), SHORT, LONG)
    assert "a text of the record" not in caught.value.block()


def test_an_endpoint_that_is_slow_or_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "TIMEOUT_SECONDS", 0.1)
    given_up = threading.Event()
    with judge_server(lambda *_: given_up.wait(60) and "") as server:
        judge = endpoint(server.url)
        with pytest.raises(ConfigError, match="does not reply"):
            judge.check()
        given_up.set()
    with pytest.raises(ConfigError, match="does not reply"):
        judge.check()


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://user:key@a/v1", "https://a/v1?key=1"])
def test_an_address_with_a_key_or_without_a_host_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url cannot have this value"):
        load_run_config(["model.path=m", f"pairs.endpoint.url={url}"], verb="pairs")


def test_options_that_a_reasoning_model_refuses_are_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenAI's: they refuse any temperature but their own, and name the most tokens otherwise."""
    monkeypatch.setattr(judges, "PARALLEL_REQUESTS", 1)

    def answer(content: dict[str, Any]) -> Any:
        sent = server.bodies[-1]
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in sent:
                return 400, json.dumps({"error": {"code": code, "param": name, "message": ""}})
        return longer_wins(content)

    with judge_server(answer) as server:
        judge = endpoint(server.url)
        (judgement,) = judge.judge([question("Why?", SHORT, LONG)])
    assert (judgement.scores, judgement.counts["refused"]) == ([0.0, 1.0], 0)
    assert len(server.bodies) == 3
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert server.bodies[-1]["max_completion_tokens"] == 1024
