"""The doctor's findings about the real files; each number was counted by a plain script too."""

import json
from collections import Counter
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.insight.doctor.examine import Diagnosis, examine
from dpo_dist.insight.doctor.findings import RULES, Level
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
pytestmark = pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")

HH, ZH, SCORED = "hh_rlhf_sample.jsonl", "llama_factory_sharegpt_zh.json", "ultrafeedback_plain_scored.jsonl"
RANKED, ORCA = "ranked_oasst_history_zh.json", "orca_system_question.csv"
V1, TEMPLATED = "llama_factory_v1_message_pairs.jsonl", "templated_near_duplicates.jsonl"
# Findings with their records; then those above a note.
FINDINGS: dict[str, tuple[str, str]] = {
    HH: (
        "dropped 9, markup_in_text 45, one_response_starts_the_other 1, repeated_prompts 1, "
        "response_repeats_prompt 2, short_response 3, turns 4",
        "markup_in_text",
    ),
    "llama_factory_sharegpt_en.json": (
        "broken_text 6, duplicates 5, language_differs 1, short_response 1",
        "broken_text, duplicates",
    ),
    ZH: (
        "broken_text 8, duplicates 11, markup_in_text 1, one_response_starts_the_other 1, short_response 10",
        "broken_text, duplicates",
    ),
    SCORED: (
        "broken_text 7, dropped 7, language_differs 6, markup_in_text 7, one_response_starts_the_other 6, "
        "score_ties 30, short_response 15",
        "broken_text, dropped, markup_in_text, one_response_starts_the_other, score_ties",
    ),
    RANKED: (
        "dropped 6, length_bias 244, markup_in_text 1, nearly_equal_sides 1, "
        "one_response_starts_the_other 2, repeated_prompts 4, response_repeats_prompt 4, short_response 16",
        "dropped, length_bias, response_repeats_prompt",
    ),
    "system_history_question_zh.jsonl": ("broken_text 2, language_differs 1, short_response 4", ""),
    "sharegpt_string_answers_zh.jsonl": ("broken_text 1, language_differs 1, short_response 3", ""),
    ORCA: (
        "label_leak 120, language_differs 1, length_bias 60, style_bias 60",
        "label_leak, length_bias, style_bias",
    ),
    V1: ("label_leak 10, nearly_equal_sides 1, short_response 1", "label_leak, nearly_equal_sides"),
    TEMPLATED: ("length_bias 40, near_duplicates 37", "length_bias, near_duplicates"),
    "llama_factory_kto_en.json": ("dropped 60, no_records 60", "dropped, no_records"),
}


@cache
def report(name: str) -> Diagnosis:
    assert SHARED is not None
    return examine(DataConfig(train=[SourceConfig(path=str(SHARED / name))], processes=1), None, RULES)


@pytest.mark.parametrize("name", FINDINGS)
def test_the_findings_are_the_known_ones(name: str) -> None:
    counts = Counter[str]()
    for finding in report(name).findings:
        counts[finding.rule] += finding.count
    alarms = {finding.rule for finding in report(name).findings if finding.level is not Level.note}
    shown = ", ".join(f"{rule} {count}" for rule, count in sorted(counts.items()))
    assert (shown, ", ".join(sorted(alarms))) == FINDINGS[name]


def contents(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in contents(part)]


def test_no_finding_quotes_a_text() -> None:
    assert SHARED is not None
    for name in (HH, ZH, SCORED):
        text = (SHARED / name).read_text(encoding="utf-8")
        records = (
            json.loads(text) if name.endswith(".json") else list(map(json.loads, text.strip().split("\n")))
        )
        shown = json.dumps(asdict(report(name)), ensure_ascii=False)
        assert not [one for one in contents(records) if len(one) > 30 and one.strip()[:30] in shown]
        assert str(SHARED / name) in shown
