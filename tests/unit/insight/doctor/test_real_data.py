"""The doctor's findings about the real files; each number was counted by a plain script too."""

import json
import re
from collections import Counter
from dataclasses import asdict
from functools import cache

import pytest

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.insight.doctor.examine import Diagnosis, examine
from dpo_dist.insight.doctor.findings import RULES, Level
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
pytestmark = pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")

HH, ZH, SCORED = "hh_rlhf_sample.jsonl", "llama_factory_sharegpt_zh.json", "ultrafeedback_plain_scored.jsonl"
RANKED, ORCA = "ranked_oasst_history_zh.json", "orca_system_question.csv"
TEMPLATED = "templated_near_duplicates.jsonl"
# Findings with their records; then those above a note.
FINDINGS: dict[str, tuple[str, str]] = {
    HH: (
        "dropped 9, markup_in_text 45, one_response_starts_the_other 1, repeated_prompts 1, "
        "response_repeats_prompt 2, short_response 3, turns 4",
        "markup_in_text",
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
    ORCA: (
        "label_leak 120, language_differs 1, length_bias 60, style_bias 60",
        "label_leak, length_bias, style_bias",
    ),
    TEMPLATED: ("length_bias 40, near_duplicates 37", "length_bias, near_duplicates"),
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


def test_no_finding_quotes_a_text() -> None:
    assert SHARED is not None
    for name in (HH, ZH, SCORED):
        texts = re.findall(r'"((?:[^"\\]|\\.){31,})"', (SHARED / name).read_text(encoding="utf-8"))
        shown = json.dumps(asdict(report(name)), ensure_ascii=False)
        assert len(texts) > 100
        assert not [text for text in texts if text.strip()[:30] in shown]
        assert str(SHARED / name) in shown
