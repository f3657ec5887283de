"""Verdicts of an endpoint, over real HTTP on this machine."""

import json
import threading
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import EndpointConfig, Verdicts
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation import judges
from dpo_dist.generation.judges import EndpointJudge, Judgement, Question
from tests.support.judge_server import Answer, JudgeServer, judge_server

RECORD = PreferenceRecord((Message("user", "say something long"),), (), Origin("a.jsonl", 1))
SHORT, LONG, LONGER = "hm", "a long response", "an even longer response"
GRADE = Verdicts.grade


def longer_wins(content: dict[str, Any], _number: int = 0) -> str:
    first, second = len(content["response_A"]), len(content["response_B"])
    return f"I weighed both. [[{'tie' if first == second else 'A' if first > second else 'B'}]]"


def always(reply: Any) -> Answer:
    return lambda *_: reply


def config(url: str, **keys: Any) -> EndpointConfig:
    return EndpointConfig(url=url, model="judge", **keys)


def judged(answer: Answer, *responses: str, retries: int = 0, **keys: Any) -> tuple[Judgement, JudgeServer]:
    with judge_server(answer) as server:
        (judgement,) = EndpointJudge(config(server.url, **keys), retries).judge([Question(RECORD, responses)])
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
    assert set(server.paths) == {"/v1/chat/completions"}


THOUGHTS = "<think>[[B]] or [[A]]? It may be [[tie]].</think> I weighed [[A]], too. "
CUT = '{"choices": [{"message": {"content": "[[A]]? Or"}, "finish_reason": "length"}]}'


@pytest.mark.parametrize(
    ("answer", "keys", "scores", "counts"),
    [
        (always("The first one. [[A]]"), {}, [0.5, 0.5], {"position_disagreements": 1}),
        (always("[[tie]]"), {}, [0.5, 0.5], {}),
        (lambda content, _: THOUGHTS + longer_wins(content), {}, [0.0, 1.0], {}),
        *(
            (always(reply), {}, [None, None], {"unreadable": 2})
            for reply in ("", "A is better", "[[C]]", "[A]", (200, {}, '{"choices": []}'), (200, {}, CUT))
        ),
        (always("ok [[10]]"), {"verdicts": GRADE}, [10.0, 10.0], {}),
        (always("[[5]], no: [[0]]"), {"verdicts": GRADE}, [None, None], {"unreadable": 2}),
        (
            lambda content, _: (400, {}, '{"error": {"code": "filter"}}') if "response_A" in content else "",
            *({}, [None, None], {"refused": 2}),
        ),
    ],
)
def test_verdicts(answer: Answer, keys: Any, scores: list[float | None], counts: dict[str, int]) -> None:
    judgement, _ = judged(answer, SHORT, LONG, **keys)
    assert judgement.scores == scores
    assert +judgement.counts == {"requests": 2} | counts


def test_the_key_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    judgement, server = judged(longer_wins, SHORT, LONG)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer very-secret"}
    with pytest.raises(ConfigError) as caught:
        judged(always((401, {}, '{"error": {"message": "very-secret is wrong"}}')), SHORT, LONG)
    for text in (EndpointJudge(config("http://localhost:1/v1")).describe(), judgement, caught.value.block()):
        assert "very-secret" not in str(text)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert not any("authorization" in headers for headers in judged(longer_wins, SHORT, LONG)[1].headers)


REFUSAL = {"error": {"code": "bad_parameter", "param": "max_tokens", "message": "a text of the record"}}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((503, {}, ""), "does not reply.*503"),
        ((401, {}, ""), "does not reply.*401.*OPENAI_API_KEY"),
        ((200, {}, "<html>sign in</html>"), "does not reply"),
        ((200, {}, '{"error": {"message": "loading"}}'), "does not reply"),
        (
            (400, {}, json.dumps(REFUSAL)),
            "status 400, bad_parameter, max_tokens, also for a harmless request",
        ),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_an_error(reply: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        judged(always(reply), SHORT, LONG, parallel_requests=1)
    caught.match(f"(?s){said}")
    assert "a text of the record" not in caught.value.block()


def test_an_endpoint_that_is_slow_or_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "TIMEOUT_SECONDS", 0.1)
    given_up = threading.Event()
    with judge_server(lambda *_: given_up.wait(60) and "") as server:
        judge = EndpointJudge(config(server.url), retries=0)
        with pytest.raises(ConfigError, match="does not reply"):
            judge.check()
        given_up.set()
    with pytest.raises(ConfigError, match="does not reply"):
        judge.check()


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://user:key@a/v1", "https://a/v1?key=1"])
def test_an_address_with_a_key_or_without_a_host_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url has no such value"):
        load_run_config(["model.path=m", f"pairs.endpoint.url={url}"], verb="pairs")


def test_options_that_a_reasoning_model_refuses_are_replaced_once() -> None:
    """As OpenAI's: they refuse any temperature but their own, and name the most tokens otherwise."""

    def answer(content: dict[str, Any], number: int) -> Any:
        sent = server.bodies[number - 1]
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in sent:
                return 400, {}, json.dumps({"error": {"code": code, "param": name, "message": ""}})
        return longer_wins(content)

    with judge_server(answer) as server:
        judge = EndpointJudge(config(server.url, parallel_requests=1))
        (judgement,) = judge.judge([Question(RECORD, (SHORT, LONG))])
    assert (judgement.scores, judgement.counts["refused"]) == ([0.0, 1.0], 0)
    assert len(server.bodies) == 3
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert server.bodies[-1]["max_completion_tokens"] == 1024
