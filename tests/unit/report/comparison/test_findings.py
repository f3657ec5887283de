"""The sentences at the top of a comparison, rule by rule; its frontier."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.errors import DataError
from dpo_dist.report.comparison.findings import headline, warnings
from dpo_dist.report.comparison.results import Results, read_results
from tests.support.comparison_files import betas, differing, model, results, win


def read(folder: Path, content: dict[str, Any]) -> Results:
    file = folder / "comparison.json"
    file.write_text(json.dumps(content))
    return read_results(file)


def test_the_best_model_and_a_cheaper_one_that_is_as_good(tmp_path: Path) -> None:
    found = read(tmp_path, betas())
    assert headline(found) == (
        "beta 0.3 cannot be distinguished from the best (win rate 48 % [42, 54] over beta 0.1), with 46 % of "
        "its KL. "
        "beta 0.1 has the highest score, 0.62 at a KL of 14 nats; its win rate over base is 71 % [65, 77]."
    )
    assert warnings(found) == [
        "beta 0.01 has a lower score than beta 0.1 and more KL.",
        "beta 0.1: responses are 1.6 times as long as those of base; many judges prefer length.",
        "beta 0.01: responses are 2.6 times as long as those of base; many judges prefer length.",
        "beta 0.01: 16 % of responses do not end (base: 0 %).",
        "beta 0.01: 10 % of responses are refusals (base: 2 %).",
    ]
    assert [each.name for each in found.frontier()] == ["base", "beta 0.5", "beta 0.3", "beta 0.1"]


@pytest.mark.parametrize(
    ("models", "wins", "sentence"),
    [
        (
            [model("base", None, 0.5), model("new", 3, 0.4)],
            [win("base", "new", 0.6)],
            "No model does better than base on average.",
        ),
        (
            [model("base", None, 0.5), model("new", 3, 0.53)],
            [win("base", "new", 0.47)],
            "No model is clearly better than base: new has the highest score, 0.53 at a KL of 3 nats, but "
            "its win rate over base is 53 % [47, 59], which chance explains. More prompts "
            "(compare.prompts) make intervals smaller.",
        ),
        (
            [model("base", None, 0.5), model("new", 3, 0.7)],
            [win("base", "new", 0.3, half=None)],
            "new has the highest score, 0.7 at a KL of 3 nats; its win rate over base is 70 %, without an "
            "interval.",
        ),
        # The base has the higher mean and loses most prompts.
        (
            [model("base", None, 0.5), model("new", 3, 0.4)],
            [win("base", "new", 0.4)],
            "No model does better than base on average. But new wins over base on 60 % [54, 66] of the "
            "prompts.",
        ),
        # A judge that compares gives no scores; without a KL there is none in the sentence.
        (
            [model("base"), model("new")],
            [win("base", "new", 0.3)],
            "new has the highest win rate over base; its win rate over base is 70 % [64, 76].",
        ),
        (
            [model("base"), model("near", 2), model("far", 20)],
            [],
            "Without a judge the models can be compared by KL and style only. far is farthest from base: "
            "20 nats per response.",
        ),
        (
            [model("base"), model("other tokens")],
            [],
            "Without a judge the models can be compared by KL and style only.",
        ),
        # A model that is clearly worse than the best one is no alternative.
        (
            [model("base", None, 0.1), model("a", 5, 0.4), model("b", 9, 0.8)],
            [win("base", "a", 0.3), win("base", "b", 0.1), win("a", "b", 0.2)],
            "b has the highest score, 0.8 at a KL of 9 nats; its win rate over base is 90 % [84, 96].",
        ),
    ],
)
def test_the_headline(
    tmp_path: Path, models: list[dict[str, Any]], wins: list[dict[str, Any]], sentence: str
) -> None:
    assert headline(read(tmp_path, results(models, wins))) == sentence


@pytest.mark.parametrize(
    ("finished", "sentence"),
    [
        (
            (0.9, 0.9, 0.0),
            "Not ranked, as no response ends: b. a has the highest score, 0.4 at a KL of 5 nats; its win "
            "rate over base is 70 % [64, 76].",
        ),
        (
            (0.9, 0.0, 0.0),
            "Not ranked, as no response ends: a and b. No model does better than base on average.",
        ),
        (
            (0.0, 0.9, 0.0),
            "Not ranked, as no response ends: base and b. a has the highest score, 0.4 at a KL of 5 nats; "
            "its win rate over base is 70 % [64, 76].",
        ),
        (
            (0.0, 0.0, 0.0),
            "No response of any model ends within compare.max_new_tokens: no model is called the best.",
        ),
    ],
)
def test_a_model_of_which_no_response_ends_is_not_the_best(
    tmp_path: Path, finished: tuple[float, ...], sentence: str
) -> None:
    models = [
        model("base", None, 0.1, finished=finished[0]),
        model("a", 5, 0.4, finished=finished[1]),
        model("b", 3, 0.8, finished=finished[2]),
    ]
    wins = [win("base", "a", 0.3), win("base", "b", 0.1), win("a", "b", 0.2)]
    found = read(tmp_path, results(models, wins))
    assert headline(found) == sentence
    assert not any("than b" in text for text in warnings(found))


def test_equal_scores_are_called_equal(tmp_path: Path) -> None:
    models = [model("base", None, 0.3), model("a", 3, 0.9), model("b", 2, 0.9), model("c", 2.1, 0.9)]
    wins = [*(win("base", name, 0.2) for name in "abc"), win("a", "b", 0.5), win("b", "c", 0.5)]
    assert headline(read(tmp_path, results(models, wins))) == (
        "b, c and a have the same highest score, 0.9; their win rates over base are all 80 % [74, 86]."
    )
    less = [differing("b", other, kl=(0.1, 0.9)) for other in "ac"]
    assert headline(read(tmp_path, results(models, wins, differences=less))).endswith(
        " b has the least KL of them."
    )
    models[0]["score"] = 0.9
    assert headline(read(tmp_path, results(models, [win("base", name, 0.5) for name in "abc"]))) == (
        "b, c, a and base have the same highest score, 0.9."
    )


def test_less_kl_needs_an_interval(tmp_path: Path) -> None:
    """The intervals of both KLs overlap; that of their difference over the same prompts is clear."""
    models = [model("base", None, 0.3), model("near", 8, 0.5), model("far", 9, 0.6), model("last", 9.5, 0.1)]
    wins = [*(win("base", name, 0.2) for name in ("near", "far", "last")), win("near", "far", 0.48)]
    start = "far has the highest score, 0.6 at a KL of 9 nats; its win rate over base is 80 % [74, 86]."
    found = read(tmp_path, results(models, wins))
    assert headline(found) == f"{start} near cannot be distinguished from it."
    assert warnings(found) == ["last has a lower score than base and more KL."]
    paired = [
        differing("near", "far", kl=(0.5, 1.5)),
        differing("last", "far", kl=(-1, -0.1), score=(0.4, 0.6)),
    ]
    found = read(tmp_path, results(models, wins, differences=paired))
    assert headline(found) == (
        "near cannot be distinguished from the best (win rate 48 % [42, 54] over far), with 89 % of its KL. "
        + start
    )
    assert warnings(found) == ["last has a lower score than far and more KL."]


def test_models_of_equal_kl_have_not_less_of_it(tmp_path: Path) -> None:
    """Two names of one model: every difference is 0, and so are the ends of its interval."""
    models = [model("base", None, 0.3), model("a", 5, 0.5), model("twin", 5, 0.6)]
    wins = [win("base", "a", 0.2), win("base", "twin", 0.2), win("a", "twin", 0.5)]
    same = [differing("a", "twin", kl=(0.0, 0.0), score=(0.05, 0.15))]
    found = read(tmp_path, results(models, wins, differences=same))
    assert not found.has_less_kl(found.models[1], found.models[2])
    assert headline(found).endswith(" a cannot be distinguished from it.")
    assert warnings(found) == []


def test_at_most_five_warnings_those_about_quality_first(tmp_path: Path) -> None:
    bad = {"length": 300, "finished": 0.5, "refusals": 0.4, "empty": 0.3}
    models = [model("base", None, 0.5), model("a", 3, 0.3, **bad), model("b", 4, 0.2, **bad)]
    found = warnings(read(tmp_path, results(models, [win("base", "a", 0.7), win("base", "b", 0.8)])))
    assert len(found) == 5
    assert found[:4] == [
        "a has a lower score than base and more KL.",
        "b has a lower score than base and more KL.",
        "a is worse than base: win rate 30 % [24, 36].",
        "b is worse than base: win rate 20 % [14, 26].",
    ]


def test_a_model_that_wins_over_the_one_with_the_highest_mean_is_named(tmp_path: Path) -> None:
    models = [model("base", None, 0.3), model("a", 3, 0.5), model("b", 3, 0.6)]
    wins = [win("base", "a", 0.3), win("base", "b", 0.5), win("a", "b", 0.6)]
    assert headline(read(tmp_path, results(models, wins))) == (
        "b has the highest score, 0.6 at a KL of 3 nats, but its win rate over base is 50 % [44, 56], which "
        "chance explains. But a wins over base on 70 % [64, 76] of the prompts."
    )
    wins[1] = win("base", "b", 0.4)
    assert headline(read(tmp_path, results(models, wins))).endswith(
        "But a wins over it on 60 % [54, 66] of the prompts."
    )


def test_models_about_as_far_from_the_base(tmp_path: Path) -> None:
    models = [model("base"), model("a", 20), model("b", 19.5), model("c", 2)]
    assert headline(read(tmp_path, results(models, []))) == (
        "Without a judge the models can be compared by KL and style only. a and b are farthest from base: 20 "
        "and 19.5 nats per response, a difference that chance explains."
    )


def test_a_change_of_style_within_chance_is_no_warning(tmp_path: Path) -> None:
    models = [model("base", None, 0.5), model("new", 3, 0.7, refusals=0.1)]
    content = results(models, [win("base", "new", 0.3)])
    assert warnings(read(tmp_path, content)) == ["new: 10 % of responses are refusals (base: 2 %)."]
    content["differences"] = [differing("base", "new", refusals=(-0.02, 0.18))]
    assert warnings(read(tmp_path, content)) == []


def test_without_faults_there_is_no_warning(tmp_path: Path) -> None:
    content = results([model("base", None, 0.5), model("new", 3, 0.7)], [win("base", "new", 0.3)])
    assert warnings(read(tmp_path, content)) == []


def test_a_model_worse_than_the_base_and_short_responses_are_warnings(tmp_path: Path) -> None:
    content = results([model("base", None, 0.5), model("new", 3, 0.3, length=40)], [win("base", "new", 0.7)])
    assert warnings(read(tmp_path, content)) == [
        "new has a lower score than base and more KL.",
        "new is worse than base: win rate 30 % [24, 36].",
        "new: responses have 40 % of the length of those of base.",
    ]


def test_responses_that_are_cut_off_are_a_warning(tmp_path: Path) -> None:
    models = [model("base", None, 0.5, finished=0.4), model("new", 3, 0.7, finished=0.4)]
    assert warnings(read(tmp_path, results(models, [win("base", "new", 0.3)]))) == [
        "60 % of the responses of base do not end within compare.max_new_tokens: the models are compared by "
        "beginnings of responses."
    ]


def test_numbers_that_are_none_are_not_known(tmp_path: Path) -> None:
    content = results([model("base", None, 0.5), model("new", 3, 0.7)], [win("base", "new", 0.3)])
    content["models"][1] |= {"kl": 10**400, "score": "high", "style": {"length": None, "finished": True}}
    content["wins"][0]["interval"] = [None, 0.4]
    found = read(tmp_path, content)
    assert (found.models[1].kl, found.models[1].score, dict(found.models[1].style)) == (None, None, {})
    assert found.rates["base", "new"].low is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"base": "a", "models": [1], "prompts": 2}', "[" * 100_000]
)
def test_a_damaged_file_is_an_error_of_data(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(DataError, match=r"comparison\.json"):
        read_results(tmp_path / "comparison.json")
    with pytest.raises(DataError):
        read_results(tmp_path / "missing.json")
