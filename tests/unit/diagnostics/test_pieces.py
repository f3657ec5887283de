"""Sketches, samples, ratings, margins, templates and benchmark files of the doctor."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.config.data import DataConfig
from dpo_dist.foundation.errors import DataError
from dpo_dist.insight.doctor.duplicates import near_groups
from dpo_dist.insight.doctor.findings import PERCENTILES
from dpo_dist.insight.doctor.margins import ReferencePairs, bag_distance, margin_findings
from dpo_dist.insight.doctor.rules import Judge
from dpo_dist.insight.doctor.sources import LengthSketch, Reservoir
from dpo_dist.insight.doctor.words import ratings_contradict, read_benchmarks, signature
from tests.support import tiny
from tests.support.doctor_data import clean_pairs, examined, lines, of_rule
from tests.support.records import assistant, user


def test_percentiles_are_exact_below_1024_and_within_one_percent_above() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.integers(0, 1024, 3000), rng.integers(1024, 3_000_000, 3000)])
    sketch = LengthSketch()
    for block in np.split(values, 4):
        sketch.add(block)
    found = sketch.distribution()
    assert found is not None
    assert (found.count, found.mean) == (6000, values.mean())
    assert (found.smallest, found.largest) == (values.min(), values.max())
    for percent in PERCENTILES:
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert found.percentiles[percent] == pytest.approx(exact, rel=0 if exact < 1024 else 0.01)
    assert sum(found.counts) == 6000
    assert len(found.edges) == len(found.counts) + 1


@pytest.mark.parametrize("values", [[0], [5, 5], [0, 10**12]])
def test_a_distribution_of_few_values_has_a_histogram(values: list[int]) -> None:
    sketch = LengthSketch()
    assert sketch.distribution() is None
    sketch.add(np.array(values))
    found = sketch.distribution()
    assert found is not None
    assert sum(found.counts) == len(values)
    assert list(found.edges) == sorted(set(found.edges))


def test_a_reservoir_is_a_uniform_sample() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        sample: Reservoir[int] = Reservoir(5, seed)
        sample.add(range(20))
        assert len(set(sample.items)) == 5
        counts[sample.items] += 1
    # 500 each, with a standard deviation of 19.4.
    assert np.abs(counts - 500).max() < 80


def test_near_copies_are_found_among_many_texts() -> None:
    pairs = clean_pairs(500)
    texts = [(pair["prompt"] + pair["chosen"], pair["chosen"] + pair["rejected"]) for pair in pairs]
    copies = [(prompt.upper() + "!", responses.replace(" ", "\n", 5)) for prompt, responses in texts[:50]]
    signatures = np.stack([np.stack(list(map(signature, pair))) for pair in texts + copies])
    groups = near_groups(signatures, 0.7)
    assert groups.first[500:].tolist() == list(range(50))
    assert (groups.first[:500] == np.arange(500)).all()


@pytest.mark.parametrize(
    ("fields", "scores", "is_contradiction"),
    [
        ({"chosen_rating": 3, "rejected_rating": 4.5}, None, True),
        ({"chosen_rating": 4.5, "rejected_rating": 3}, None, False),
        ({"metadata": {"rating_chosen": "2", "rating_rejected": "5"}}, (8.0, 7.0), True),
        # Inverted scores are a rule of their own.
        ({"score_chosen": 1.0, "score_rejected": 2.0}, (1.0, 2.0), False),
        ({"chosen_rating": None, "rejected_rating": 4}, None, False),
        ({"chosen_rating": True, "rejected_rating": 4}, None, False),
        ({"chosen": "a", "rejected": "b", "chosen_model": 1, "rejected_model": 2}, None, False),
    ],
)
def test_ratings_of_the_sides(
    fields: dict[str, object], scores: tuple[float, ...] | None, is_contradiction: bool
) -> None:
    assert ratings_contradict(fields, scores) is is_contradiction


def test_ratings_by_aspect_are_compared_with_the_overall_score(tmp_path: Path) -> None:
    def response(text: str, overall: float, rating: str) -> dict[str, object]:
        return {
            "response": text,
            "overall_score": overall,
            "annotations": {"helpfulness": {"Rating": rating}},
        }

    wrong = {"prompt": "q", "completions": [response("good", 10, "1"), response("bad", 4, "4")]}
    right = {"prompt": "r", "completions": [response("good", 10, "5"), response("bad", 4, "N/A")]}
    assert ratings_contradict(wrong, None)
    assert not ratings_contradict(right, None)
    ratings = {"chosen_rating": 5, "rejected_rating": 2, "score_chosen": 8, "score_rejected": 7}
    pairs = [pair | ratings for pair in clean_pairs(20)]
    pairs[6]["rejected_rating"] = 6
    assert lines(of_rule(examined(tmp_path, pairs), "ratings_contradict")[0]) == [7]


def test_margins_of_the_reference() -> None:
    tokens = np.full(100, 40)
    rng = np.random.default_rng(0)
    per_token = rng.normal(-1, 0.1, (100, 2))
    per_token[7] = (-3.5, -1)
    per_token[8] = (-2.9, -1)
    per_token[9] = (-0.2, -2.9)
    distances = np.where(np.arange(100) == 5, 0.05, 0.8)
    pairs = ReferencePairs(per_token[:, 0] * 40, per_token[:, 1] * 40, tokens, tokens, distances)
    facts, findings = margin_findings(pairs, lambda index: f"a:{index}", "a", Judge.with_thresholds({}))
    found = {finding.rule: finding.examples for finding in findings}
    assert found == {
        "reference_disagrees": ("a:7", "a:8"),
        "reference_solved": ("a:9",),
        "nearly_equal_sides": ("a:5",),
    }
    assert facts["reference_disagrees"] == 0.02
    assert margin_findings(
        ReferencePairs(*(np.empty(0),) * 2, *(np.empty(0, np.int64),) * 2),
        str,
        "a",
        Judge.with_thresholds({}),
    ) == ({}, [])


def test_a_margin_of_a_single_token_is_within_noise() -> None:
    one = np.array([1])
    pairs = ReferencePairs(np.array([-5.0]), np.array([-0.1]), one, one)
    assert margin_findings(pairs, str, "a", Judge.with_thresholds({}))[1] == []


def test_bag_distance() -> None:
    first, second = np.array([1, 2, 2, 3], np.int32), np.array([3, 2, 4], np.int32)
    assert bag_distance(first, first[::-1]) == 0
    assert bag_distance(first, second) == pytest.approx(3 / 7)


def test_tools_that_the_template_does_not_render_are_an_error(tmp_path: Path) -> None:
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
    records = [
        {
            "prompt": [user(pair["prompt"])],
            "chosen": [assistant(pair["chosen"])],
            "rejected": [assistant(pair["rejected"])],
        }
        for pair in clean_pairs(20)
    ]
    records[2]["tools"] = [tool]
    report = examined(tmp_path, records, tokenizer=tiny.qwen())
    assert lines(of_rule(report, "tools_not_rendered")[0]) == [3]
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{% if deep %}deep{% endif %}" + tiny.CHATML
    tokenizer = tiny.with_template(tiny.qwen(), template)
    report = examined(tmp_path, records, tokenizer=tokenizer)
    assert not of_rule(report, "tools_not_rendered")
    assert of_rule(report, "template_argument_unset")[0].text.endswith(": 'deep'")
    config = {"template_arguments": {"deep": True}}
    report = examined(tmp_path, records, tokenizer=tokenizer, config=config)
    assert not of_rule(report, "template_argument_unset")


def test_benchmark_files_of_several_kinds(tmp_path: Path) -> None:
    question = "one two three four five six seven eight nine"
    files = {
        "a.jsonl": json.dumps({"turns": [question, "and then"]}),
        "b.jsonl": json.dumps(question),
        "c.txt": f"\n{question}\n",
        "d.csv": f'id,question\n1,"{question}"\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        benchmark = read_benchmarks([tmp_path / name])
        assert benchmark is not None
        assert benchmark.items_in("nothing", f"{question.upper()}! and then more") == [0]
        assert benchmark.items_in(question.replace("five", "six")) == []


@pytest.mark.parametrize("content", ["", "{", '{"answer": "42"}', "\xff"])
def test_a_bad_benchmark_file_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError):
        read_benchmarks([tmp_path / "a.jsonl"])


def test_prompts_of_the_evaluation_data_can_be_kept_out_of_training(tmp_path: Path) -> None:
    pairs = clean_pairs(20)
    [kept_out] = of_rule(
        examined(tmp_path, pairs, pairs[:2], config={"drop_eval_prompts": True}), "train_eval_leak"
    )
    assert (kept_out.level, kept_out.count) == ("note", 2)
    # Training compares case too: it does not drop this prompt.
    other_case = [pairs[0] | {"prompt": pairs[0]["prompt"].upper()}, pairs[1]]
    left, removed = of_rule(
        examined(tmp_path, pairs, other_case, config={"drop_eval_prompts": True}), "train_eval_leak"
    )
    assert (left.level, left.count, lines(left)) == ("error", 1, [1])
    assert (removed.level, removed.count, lines(removed)) == ("note", 1, [2])
    assert DataConfig().drop_eval_prompts is False
