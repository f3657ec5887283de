"""Distributions, samples, margins, templates and benchmark files of the doctor."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.config.data import DataConfig
from dpo_dist.foundation.errors import DataError
from dpo_dist.insight.doctor.benchmarks import read_benchmarks
from dpo_dist.insight.doctor.duplicates import near_groups
from dpo_dist.insight.doctor.margins import ReferencePairs, margin_findings
from dpo_dist.insight.doctor.rules import RULES, Judge
from dpo_dist.insight.doctor.sources import Reservoir, distribution
from dpo_dist.insight.doctor.texts import signature
from tests.support import tiny
from tests.support.doctor_data import clean_pairs, examined, lines, of_rule
from tests.support.records import assistant, user


@pytest.mark.parametrize("values", [[0], [5, 5], [0, 10**9], list(range(1000))])
def test_a_distribution_has_every_value(values: list[int]) -> None:
    found = distribution(np.array(values), np.array([0.0, 3.0, 10.0]))
    assert (found.count, sum(found.counts)) == (len(values), len(values))
    assert (found.smallest, found.largest, found.mean) == (min(values), max(values), np.mean(values))
    assert found.percentiles[50] == sorted(values)[(len(values) - 1) // 2]


def test_a_reservoir_is_a_uniform_sample() -> None:
    sample: Reservoir[int] = Reservoir(2000)
    sample.add(range(20_000))
    assert (sample.seen, len(set(sample.items))) == (20_000, 2000)
    # 200 of each tenth, with a standard deviation of 12.7.
    assert np.abs(np.histogram(sample.items, 10, (0, 20_000))[0] - 200).max() < 60


def test_near_copies_are_found_among_many_texts() -> None:
    pairs = clean_pairs(500)
    texts = [(pair["prompt"] + pair["chosen"], pair["chosen"] + pair["rejected"]) for pair in pairs]
    copies = [(prompt.upper() + "!", responses.replace(" ", "\n", 5)) for prompt, responses in texts[:50]]
    signatures = np.stack([np.stack(list(map(signature, pair))) for pair in texts + copies])
    groups = near_groups(signatures, 0.7)
    assert groups.first[500:].tolist() == list(range(50))
    assert (groups.first[:500] == np.arange(500)).all()


def test_margins_of_the_reference() -> None:
    tokens = np.full(100, 40)
    rng = np.random.default_rng(0)
    per_token = rng.normal(-1, 0.1, (100, 2))
    per_token[7] = (-3.5, -1)
    per_token[8] = (-2.9, -1)
    per_token[9] = (-0.2, -2.9)
    pairs = ReferencePairs(per_token[:, 0] * 40, per_token[:, 1] * 40, tokens, tokens)
    facts, findings = margin_findings(pairs, [f"a:{index}" for index in range(100)], "a", Judge(RULES))
    found = {finding.rule: finding.examples for finding in findings}
    assert found == {"reference_disagrees": ("a:7", "a:8")}
    assert (facts["reference_disagrees"], facts["reference_solved"]) == (0.02, 0.01)
    assert margin_findings(
        ReferencePairs(*(np.empty(0),) * 2, *(np.empty(0, np.int64),) * 2),
        [],
        "a",
        Judge(RULES),
    ) == ({}, [])


def test_a_margin_of_a_single_token_is_within_noise() -> None:
    one = np.array([1])
    pairs = ReferencePairs(np.array([-5.0]), np.array([-0.1]), one, one)
    assert margin_findings(pairs, ["a:1"], "a", Judge(RULES))[1] == []


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
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tiny.CHATML
    tokenizer = tiny.with_template(tiny.qwen(), template)
    report = examined(tmp_path, records, tokenizer=tokenizer)
    assert not of_rule(report, "tools_not_rendered")


def test_benchmark_files_of_several_kinds(tmp_path: Path) -> None:
    question = "one two three four five six seven eight nine"
    files = {
        "a.jsonl": json.dumps({"turns": [question, "and then"]}),
        "b.jsonl": json.dumps(question),
        "c.txt": f"\n{question}\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        benchmark = read_benchmarks([str(tmp_path / name)])
        line = 2 if name == "c.txt" else 1
        found = benchmark.item_in("nothing", f"{question.upper()}! and then more")
        assert found == f"{tmp_path / name}:{line}"
        assert benchmark.item_in(question.replace("five", "six")) is None


@pytest.mark.parametrize("content", ["", "{", '{"answer": "42"}', "\xff"])
def test_a_bad_benchmark_file_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError):
        read_benchmarks([str(tmp_path / "a.jsonl")])


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
