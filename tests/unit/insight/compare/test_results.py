"""Means, intervals and win rates of a comparison, from the rows of answers.jsonl."""

from typing import Any

import pytest

from dpo_dist.insight.compare.judging import all_credits
from dpo_dist.insight.compare.results import Tally, comparison
from dpo_dist.insight.evaluation import Resampling
from dpo_dist.insight.tables import comparison_table

Row = dict[str, Any]


def response(text: str, ratio: float | None = 0.0, score: float | None = None, tokens: int = 4) -> Row:
    logp = {"logp": -5.0, "base_logp": None if ratio is None else -5.0 - ratio, "logp_tokens": tokens}
    return {"text": text, "tokens": tokens, "finished": True, "score": score, **logp}


def results(
    rows: list[dict[str, Row]], verdicts: list[list[float | None]] | None = None, judged: bool = True
) -> Row:
    tally = Tally(list(rows[0]))
    for index, row in enumerate(rows):
        texts, scores = ([response[name] for response in row.values()] for name in ("text", "score"))
        own = all_credits(texts, scores, verdicts[index] if verdicts else None)
        tally.add(row, own if judged else None)
    return comparison(tally, Resampling(200, 0))


def test_kl_per_response_and_per_token() -> None:
    rows = [
        {"base": response("x"), "a": response("long", 6.0, tokens=10)},
        {"base": response("x"), "a": response("short", 1.0, tokens=2)},
        {"base": response("x"), "a": response("none", None, tokens=50)},
    ] * 5
    base, model = results(rows, judged=False)["models"]
    assert (base["kl"], base["kl_per_token"], base["kl_interval"]) == (0.0, 0.0, [0.0, 0.0])
    assert model["kl"] == 3.5
    assert model["kl_per_token"] == 7 / 12
    low, high = model["kl_interval"]
    assert 1.0 <= low < 3.5 < high <= 6.0
    assert model["score"] is None
    assert results(rows, judged=False)["wins"] == []


def test_style() -> None:
    listed = "Some things:\n- **one** thing\n- two things"
    rows = [{"base": response(""), "a": response(listed)}, {"base": response("hi"), "a": response("hi")}]
    base, model = results(rows, judged=False)["models"]
    assert (base["style"]["empty"], base["style"]["lists"]) == (0.5, 0.0)
    assert (model["style"]["lists"], model["style"]["markdown"], model["style"]["words"]) == (0.5, 0.5, 3.5)
    assert model["style"]["length"] == 4
    assert set(model["style_intervals"]) <= set(model["style"])


def test_scores_decide_wins_and_ties_count_half() -> None:
    scores = [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0), (5.0, None)]
    rows = [{"base": response("x", score=one), "a": response("y", score=two)} for one, two in scores]
    found = results(rows)
    (win,) = found["wins"]
    assert {name: win[name] for name in ("wins", "ties", "losses", "identical", "not_judged")} == {
        **{"wins": 1, "ties": 1, "losses": 1},
        **{"identical": 0, "not_judged": 1},
    }
    assert win["rate"] == 0.5
    assert found["not_judged"] == {"base and a": 1}
    assert found["models"][0]["score"] == 2.75
    assert found["models"][1]["score"] == 2.0


def test_equal_responses_and_those_without_a_verdict_are_counted() -> None:
    texts = [("same", "same", "other"), ("same", "same", "same"), ("x", "y", "z"), ("x", "y", "y")]
    rows = [dict(zip(("base", "a", "b"), map(response, own), strict=True)) for own in texts]
    verdicts: list[list[float | None]] = [[0.5, 1, None], [0.5, 0.5, 0.5], [1, None, None], [0, 0, 0.5]]
    found = results(rows, verdicts)
    counted = {
        (win["first"], win["second"]): tuple(
            win[name] for name in ("wins", "ties", "losses", "identical", "not_judged")
        )
        for win in found["wins"]
    }
    assert counted == {
        ("base", "a"): (1, 2, 1, 2, 0),
        ("base", "b"): (1, 1, 1, 1, 1),
        ("a", "b"): (0, 2, 0, 2, 2),
    }
    assert found["not_judged"] == {"base and b": 1, "a and b": 2}


def test_verdicts_of_three_models_in_pairs() -> None:
    rows = [{name: response(name) for name in ("base", "a", "b")}] * 4
    verdicts: list[list[float | None]] = [[1, 0, 0.5], [1, 0, 0], [0, 0, None], [0.5, 0, 1]]
    found = results(rows, verdicts)
    rates = {(win["first"], win["second"]): win["rate"] for win in found["wins"]}
    assert rates == {("base", "a"): 2.5 / 4, ("base", "b"): 0.0, ("a", "b"): 0.5}
    assert all(model["score"] is None for model in found["models"])


def test_a_share_without_a_difference_may_differ_in_both_directions() -> None:
    rows = [{"base": response("x"), "a": response("x")}] * 20
    low, high = results(rows)["differences"][0]["empty_interval"]
    assert low == -high < 0


def test_differences_are_paired_over_prompts() -> None:
    """Scores vary much from prompt to prompt; the second model is better by 1 on each one."""
    levels = [float(3 * at % 11) for at in range(12)]
    rows = [
        {"base": response("x", score=level), "a": response("xy", 1.0 + at % 2, score=level + 1, tokens=6)}
        for at, level in enumerate(levels)
    ]
    rows.append({"base": response("x", score=1.0), "a": response("refused", None)})
    found = results(rows)
    (difference,) = found["differences"]
    assert (difference["first"], difference["second"]) == ("base", "a")
    assert (difference["score"], difference["score_interval"]) == (1.0, [1.0, 1.0])
    assert found["models"][0]["score_interval"][1] - found["models"][0]["score_interval"][0] > 2
    assert difference["kl"] == 1.5
    assert 1.0 <= difference["kl_interval"][0] < 1.5 < difference["kl_interval"][1] <= 2.0
    assert difference["refusals"] == 0
    few = results(rows[:5])["differences"][0]
    assert (few["score"], few["score_interval"]) == (1.0, None)
    assert not {"score", "kl"} & set(
        results([{"base": response("x"), "a": response("y", None)}])["differences"][0]
    )


def test_an_empty_response_has_the_lowest_score() -> None:
    """A model that is silent when it would be bad must not have a better mean for it."""
    rows = [
        {"base": response("x", score=5.0), "a": response("y", score=6.0)},
        {"base": response("x", score=2.0), "a": response("", score=None)},
        {"base": response("x", score=4.0), "a": response("not read", score=None)},
    ]
    found = results(rows)
    assert [model["score"] for model in found["models"]] == [pytest.approx(11 / 3), 4.0]
    assert found["empty_score"] == 2.0
    assert found["differences"][0]["score"] == 0.5
    assert results(rows, judged=False)["models"][1]["style"]["empty"] == pytest.approx(1 / 3)
    assert results([{"base": response(""), "a": response("")}])["empty_score"] is None


def shown(found: Row, temperature: float = 1.0, differing: int = 0) -> str:
    models = [{**model, "prompts_encoded_differently": differing} for model in found["models"]]
    more = {"base": "base", "prompts": 4, "judge": "function f", "sampling": {"temperature": temperature}}
    return "\n".join(comparison_table({**found, **more, "models": models}))


def test_the_table_has_the_rate_of_each_model_over_the_base() -> None:
    rows = [
        {"base": response("x", score=1.0), "a": response("y", 2.0, 3.0), "b": response("x", 1.0, 1.0)}
        for _ in range(8)
    ]
    table = shown(results(rows))
    lines = table.splitlines()
    assert lines[0] == "comparison on 4 held-out prompts, judged by function f"
    assert lines[1].split("  ")[0] == "model"
    assert lines[3].startswith("a ")
    assert "2.00 [2.00, 2.00]  3.000 [3.000, 3.000]  1.000 [0.676, 1.000]" in lines[3]
    assert lines[5] == "b over a: 0.000 [0.000, 0.324]"
    assert "win rates count 8 ties as half" in table
    assert "note" not in table
    assert "temperature 0.7" in shown(results(rows), 0.7)
    assert "a encodes 3 prompts as other tokens than base" in shown(results(rows), differing=3)


@pytest.mark.parametrize(("prompts", "has_interval"), [(1, False), (5, False), (6, True)])
def test_a_rate_of_too_few_verdicts_has_no_interval(prompts: int, has_interval: bool) -> None:
    """Five wins of five happen by chance, and the page would call the model better."""
    rows = [{"base": response("x", score=1.0), "a": response("y", score=2.0)}] * prompts
    rows += [{"base": response("x"), "a": response("y")}] * 9  # without a verdict
    (win,) = results(rows)["wins"]
    assert (win["rate"], win["interval"]) == (
        0.0,
        [0.0, pytest.approx(0.390, abs=1e-3)] if has_interval else None,
    )


def test_many_models_have_a_short_table() -> None:
    rows = [{name: response(name, score=1.0) for name in ("base", "a", "b", "c", "d", "e")}]
    lines = shown(results(rows)).splitlines()
    assert "10 more win rates, of models without base, are on the page" in lines
    assert not [line for line in lines if line.startswith("b over a")]


def test_the_table_without_judge_and_kl() -> None:
    rows = [{"base": response("x"), "a": response("y", None)}]
    found = results(rows, judged=False)
    assert pytest.approx(0) == found["models"][0]["kl"]
    lines = shown(found).splitlines()
    assert "score" not in lines[1]
    assert "wins" not in lines[1]
    assert lines[3].endswith("  -")


def test_ten_wins_of_ten_are_not_certain() -> None:
    rows = [{"base": response("x", score=1.0), "a": response("y", score=2.0)}] * 10
    (win,) = results(rows)["wins"]
    assert win["rate"] == 0.0
    assert win["interval"] == [0.0, pytest.approx(0.2775, abs=1e-4)]
    style = results(rows)["models"][0]["style_intervals"]
    assert style["finished"] == [pytest.approx(0.7225, abs=1e-4), 1.0]
    assert style["length"] == [4.0, 4.0]
