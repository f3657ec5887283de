"""Verdicts of an endpoint, over real HTTP on this machine."""

import json
import socket
import time
from typing import Any

import pytest

from dpo_dist.config.verb_options import EndpointConfig, Verdicts
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.judges import endpoint
from dpo_dist.generation.judges.endpoint import EndpointJudge, describe_endpoint
from dpo_dist.generation.judges.judge import Judgement, Question
from tests.support.judge_server import Answer, JudgeServer, judge_server

RECORD = PreferenceRecord((Message("user", "say something long"),), (), Origin("a.jsonl", 1))
SHORT, LONG, LONGER = "hm", "a long response", "an even longer response"


def longer_wins(content: dict[str, Any], _number: int) -> str:
    first, second = len(content["response_A"]), len(content["response_B"])
    return f"I weighed both. [[{'tie' if first == second else 'A' if first > second else 'B'}]]"


def config(url: str, **keys: Any) -> EndpointConfig:
    return EndpointConfig(url=url, model="judge", **keys)


def judged(answer: Answer, *responses: str, retries: int = 0, **keys: Any) -> tuple[Judgement, JudgeServer]:
    with judge_server(answer) as server:
        (judgement,) = EndpointJudge(config(server.url, **keys), retries).judge([Question(RECORD, responses)])
    return judgement, server


def refused(answer: Answer, retries: int = 0, **keys: Any) -> tuple[ConfigError, JudgeServer]:
    with judge_server(answer) as server, pytest.raises(ConfigError) as caught:
        EndpointJudge(config(server.url, **keys), retries).judge([Question(RECORD, (SHORT, LONG))])
    return caught.value, server


def failing(*statuses: int) -> Answer:
    def answer(content: dict[str, Any], number: int) -> Any:
        if number <= len(statuses):
            return statuses[number - 1], {}, "{}"
        return longer_wins(content, number)

    return answer


def test_scores_are_shares_of_won_comparisons() -> None:
    judgement, server = judged(longer_wins, SHORT, LONG, LONGER)
    assert judgement.scores == [0.0, 0.5, 1.0]
    assert judgement.counts["requests"] == len(server.bodies) == 6
    asked = [json.loads(body["messages"][-1]["content"]) for body in server.bodies]
    assert asked[0]["conversation"] == [{"role": "user", "content": "say something long"}]
    positions = {(each["response_A"], each["response_B"]) for each in asked}
    assert len(positions) == 6
    assert positions == {(second, first) for first, second in positions}


THOUGHTS = "<think>[[B]] or [[A]]? It may be [[tie]].</think> I weighed [[A]], too. "


@pytest.mark.parametrize(
    ("answer", "scores", "counts"),
    [
        (lambda *_: "The first one. [[A]]", [0.5, 0.5], {"position_disagreements": 1}),
        (
            lambda content, _: "[[A]]" if content["response_A"] == LONG else "[[tie]]",
            [0.5, 0.5],
            {"position_disagreements": 1},
        ),
        (lambda *_: "[[tie]]", [0.5, 0.5], {}),
        (lambda content, number: THOUGHTS + longer_wins(content, number), [0.0, 1.0], {}),
        *(
            (lambda *_, reply=reply: reply, [None, None], {"unreadable": 2})
            for reply in ("", "A is better", "[[A] or [B]]", "[[C]]", "[[a]]", "[A]", "{}")
        ),
        *(
            (lambda *_, body=body: (200, {}, body), [None, None], {"unreadable": 2})
            for body in (
                '{"choices": []}',
                '{"choices": [{"message": {"content": null}}]}',
                '{"choices": [{"message": {"content": "[[A]]? Or"}, "finish_reason": "length"}]}',
            )
        ),
    ],
)
def test_the_last_mark_in_both_positions_decides(
    answer: Answer, scores: list[float | None], counts: dict[str, int]
) -> None:
    judgement, _ = judged(answer, SHORT, LONG)
    assert judgement.scores == scores
    assert +judgement.counts == {"requests": 2} | counts


@pytest.mark.parametrize(
    ("reply", "score", "unreadable"),
    [
        ("[[7]]", 7.0, 0),
        ("ok [[10]]", 10.0, 0),
        ("[[11]]", None, 1),
        ("7", None, 1),
        ("first [[11]], then [[2]]", 2.0, 0),
    ],
)
def test_grades_are_whole_numbers_from_1_to_10(reply: str, score: float | None, unreadable: int) -> None:
    judgement, server = judged(lambda *_: reply, SHORT, verdicts=Verdicts.grade)
    assert judgement.scores == [score]
    assert judgement.counts["unreadable"] == unreadable
    assert json.loads(server.bodies[0]["messages"][-1]["content"])["response"] == SHORT


def test_the_request_is_a_chat_completion() -> None:
    _, server = judged(longer_wins, SHORT, LONG)
    assert set(server.paths) == {"/v1/chat/completions"}
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 1024)
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]


def test_the_key_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    judgement, server = judged(longer_wins, SHORT, LONG)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer very-secret"}
    described = describe_endpoint(config("http://localhost:1/v1"))
    error, _ = refused(lambda *_: (401, {}, '{"error": {"message": "very-secret is wrong"}}'))
    for text in (str(described), str(judgement), error.block()):
        assert "very-secret" not in text


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    _, server = judged(longer_wins, SHORT, LONG)
    assert not any("authorization" in headers for headers in server.headers)


def test_a_busy_endpoint_is_asked_again() -> None:
    judgement, server = judged(failing(429, 503), SHORT, LONG, retries=3, parallel_requests=1)
    assert judgement.scores == [0.0, 1.0]
    assert len(server.bodies) == 4


def test_an_endpoint_that_stays_busy_is_an_error() -> None:
    error, server = refused(lambda *_: (503, {}, ""), parallel_requests=1)
    assert "does not reply" in error.message
    assert "503" in error.got
    assert len(server.bodies) <= 2


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ConfigError, match="does not reply"):
            EndpointJudge(config(url)).judge([Question(RECORD, (SHORT, LONG))])


def test_an_endpoint_that_is_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TIMEOUT_SECONDS", 0.1)

    def slow(*_: Any) -> str:
        time.sleep(1.0)
        return "[[A]]"

    error, _ = refused(slow)
    assert "does not reply" in error.message


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_address_or_key_is_an_error_at_once(status: int) -> None:
    error, _ = refused(lambda *_: (status, {}, ""), retries=5)
    assert str(status) in error.got


@pytest.mark.parametrize("body", ["<html>sign in</html>", "[]", '{"error": {"message": "loading"}}'])
def test_a_body_that_is_no_chat_completion_is_an_error(body: str) -> None:
    error, _ = refused(lambda *_: (200, {}, body))
    assert "does not reply" in error.message


def test_a_part_whose_texts_are_all_refused_is_counted() -> None:
    def answer(content: dict[str, Any], number: int) -> Any:
        return (400, {}, '{"error": {"code": "content_filter"}}') if "response_A" in content else "yes"

    judgement, _ = judged(answer, SHORT, LONG)
    assert (judgement.scores, judgement.counts["refused"]) == ([None, None], 2)


def test_one_refused_request_is_counted() -> None:
    def answer(content: dict[str, Any], number: int) -> Any:
        if content["response_A"] == LONGER:
            return 400, {}, json.dumps({"error": {"code": "too_long", "message": "a text of the record"}})
        return longer_wins(content, number)

    judgement, _ = judged(answer, SHORT, LONG, LONGER)
    assert judgement.scores == [0.0, 1.0, None]
    assert judgement.counts["refused"] == 2
    assert judgement.counts["unreadable"] == 0


def test_an_endpoint_that_refuses_everything_is_an_error() -> None:
    body = json.dumps({"error": {"code": "bad_parameter", "param": "max_tokens", "message": "secret text"}})
    error, _ = refused(lambda *_: (400, {}, body))
    assert "status 400, bad_parameter, max_tokens, also for a harmless one" in error.got
    assert "secret text" not in error.block()


def test_options_that_a_reasoning_model_refuses_are_replaced_once() -> None:
    """As OpenAI's: they refuse any temperature but their own, and name the most tokens otherwise."""

    def answer(content: dict[str, Any], number: int) -> Any:
        sent = server.bodies[number - 1]
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in sent:
                return 400, {}, json.dumps({"error": {"code": code, "param": name, "message": ""}})
        return longer_wins(content, number)

    with judge_server(answer) as server:
        judge = EndpointJudge(config(server.url, parallel_requests=1))
        (judgement,) = judge.judge([Question(RECORD, (SHORT, LONG))])
    assert (judgement.scores, judgement.counts["refused"]) == ([0.0, 1.0], 0)
    assert len(server.bodies) == 4
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert server.bodies[-1]["max_completion_tokens"] == 1024


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://a/v1", "http://user:key@a/v1", "https://a/v1?key=1", "http:///v1"]
)
def test_an_address_with_a_key_or_without_a_host_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address") as caught:
        EndpointJudge(config(url))
    assert "key@" not in caught.value.block()
