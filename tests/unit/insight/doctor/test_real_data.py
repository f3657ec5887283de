"""The doctor finds the known faults of the real files, with the numbers that a plain script counts."""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.insight.doctor.examine import Diagnosis, examine
from dpo_dist.insight.doctor.findings import RULES
from tests.support.doctor_data import of_rule
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
pytestmark = pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")

HH = "hh_rlhf_sample.jsonl"
EN, ZH = "llama_factory_sharegpt_en.json", "llama_factory_sharegpt_zh.json"
SCORED = "ultrafeedback_plain_scored.jsonl"
RANKED = "ranked_oasst_history_zh.json"
MEDICAL, STRINGS = "system_history_question_zh.jsonl", "sharegpt_string_answers_zh.jsonl"
ORCA = "orca_system_question.csv"
V1, TEMPLATED = "llama_factory_v1_message_pairs.jsonl", "templated_near_duplicates.jsonl"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

Record = dict[str, Any]


@cache
def raw(name: str) -> list[Record]:
    assert SHARED is not None
    text = (SHARED / name).read_text(encoding="utf-8")
    if name.endswith(".csv"):
        with (SHARED / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return (
        list(json.loads(text))
        if name.endswith(".json")
        else [json.loads(line) for line in text.split("\n") if line]
    )


@cache
def report(name: str) -> Diagnosis:
    assert SHARED is not None
    return examine(DataConfig(train=[SourceConfig(path=str(SHARED / name))], processes=1), None, RULES)


def sides(record: Record) -> tuple[str, str]:
    """Return the texts of the two responses of a record in any of the files."""
    if "output" in record:
        return record["output"][0], record["output"][-1]
    chosen, rejected = (
        record.get(f"response_{side}", record.get(f"{side}_messages", record.get(side)))
        for side in ("chosen", "rejected")
    )
    return text_of(chosen), text_of(rejected)


def text_of(value: Any) -> str:
    if isinstance(value, str):
        return value.rpartition("\n\nAssistant:")[2]
    if isinstance(value, list):
        return text_of(value[-1].get("content", value[-1].get("value")))
    return str(value.get("value", value.get("content")))


def is_used(record: Record) -> bool:
    """Return whether the reader keeps a record: no empty response, no identical ones, one history."""
    texts = record["output"] if "output" in record else sides(record)
    stripped = [text.strip() for text in texts]
    if isinstance(record.get("chosen"), str) and record["chosen"].startswith("\n\nHuman:"):
        before = {record[side].rpartition("\n\nAssistant:")[0] for side in ("chosen", "rejected")}
        if len(before) > 1:
            return False
    return all(stripped) and len(set(stripped)) == len(stripped)


def contents(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for part in value for text in contents(part)] if isinstance(value, list) else []


def dialogue_turns(record: Record) -> list[tuple[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", record["chosen"])[1:]
    return [*list(zip(parts[::2], parts[1::2], strict=True)), ("Assistant", text_of(record["rejected"]))]


def prompt_of(record: Record) -> str:
    return json.dumps([record.get(key) for key in ("instruction", "input", "history")])


def has_role_mark(record: Record) -> bool:
    return any(re.search(r"\b(Human|Assistant):", text) for _role, text in dialogue_turns(record))


def repeats_role(record: Record) -> bool:
    roles = [role for role, _text in dialogue_turns(record)][:-1]
    return any(one == other for one, other in itertools.pairwise(roles))


COUNTED: list[tuple[str, str, Callable[[Record], object]]] = [
    (HH, "role mark", has_role_mark),
    (HH, "same role twice", repeats_role),
    *(
        (name, f"short {side}", lambda record, at=at: len(sides(record)[at].strip()) < 3)
        for name in (HH, EN, ZH, SCORED, RANKED, MEDICAL, STRINGS)
        for at, side in enumerate(("chosen", "rejected"))
    ),
    *(
        (name, "replacement character", lambda record: "\ufffd" in "".join(contents(record)))
        for name in (ZH, SCORED, MEDICAL, STRINGS)
    ),
    (EN, "control character", lambda record: CONTROL.search("".join(contents(record)))),
    (SCORED, "template mark", lambda record: "</s>" in record["rejected"]),
    (SCORED, "carriage return", lambda record: "\r" in "".join(contents(record))),
    (
        SCORED,
        "score_ties",
        lambda record: record["metadata"]["score_chosen"] == record["metadata"]["score_rejected"],
    ),
]


@pytest.mark.parametrize(("name", "rule", "is_fault"), COUNTED, ids=[f"{row[0]}-{row[1]}" for row in COUNTED])
def test_a_fault_has_the_count_of_a_plain_script(
    name: str, rule: str, is_fault: Callable[[Record], object]
) -> None:
    expected = sum(bool(is_fault(record)) for record in raw(name) if is_used(record))
    kinds = re.compile(rf"\b{rule} in (\d+)")
    counts = [finding.count for finding in of_rule(report(name), rule)]
    counts += [int(count) for finding in report(name).findings for count in kinds.findall(finding.text)]
    assert sum(counts) == expected


@pytest.mark.parametrize(
    ("name", "reason", "found"),
    [
        (HH, "empty_response", [58, 332, 606, 714]),
        (HH, "history_differs", [804, 1080, 1258, 1260, 1318]),
        (SCORED, "identical_responses", [84, 171, 227, 246, 261]),
        (SCORED, "empty_response", [134, 213]),
    ],
)
def test_unusable_records_are_located(name: str, reason: str, found: list[int]) -> None:
    dropped = report(name).sources[0]["dropped"][reason]
    assert [int(example.rpartition(":")[2]) - 1 for example in dropped["examples"]] == found
    assert [one.count for one in of_rule(report(name), "dropped") if reason in one.text] == [len(found)]


@pytest.mark.parametrize("name", [EN, ZH])
def test_exact_copies_are_counted(name: str) -> None:
    copies = len(raw(name)) - len({json.dumps(record) for record in raw(name)})
    assert copies > 0
    assert of_rule(report(name), "duplicates")[0].count == copies


def test_repeated_prompts_are_counted() -> None:
    [finding] = of_rule(report(HH), "repeated_prompts")
    assert finding.count == 1
    assert {int(one.rpartition(":")[2]) - 1 for one in finding.examples[0].split(", ")} == {157, 945}
    counts = Counter(prompt_of(record) for record in raw(RANKED) if is_used(record))
    repeated = sum(count - 1 for count in counts.values())
    assert report(RANKED).across["repeated_prompts"] == repeated


def test_templated_records_are_three_groups() -> None:
    [finding] = of_rule(report(TEMPLATED), "near_duplicates")
    assert finding.count == 37
    assert finding.text.endswith("14, 13, 13 records; 37 of them with other numbers in the prompt")
    assert report(TEMPLATED).across["clusters"] == [14, 13, 13]


@pytest.mark.parametrize("name", [ORCA, V1])
def test_a_leading_space_is_a_label_leak(name: str) -> None:
    leaks = [one for one in of_rule(report(name), "label_leak") if "leading space" in one.text]
    assert [one.share for one in leaks] == [1.0]


@pytest.mark.parametrize(("name", "side"), [(RANKED, "longer"), (ORCA, "shorter")])
def test_length_bias_is_named_as_such(name: str, side: str) -> None:
    [finding] = of_rule(report(name), "length_bias")
    assert f"the {side} one" in finding.text


@pytest.mark.parametrize("name", [HH, SCORED, MEDICAL, STRINGS, EN])
def test_other_files_have_no_label_leak(name: str) -> None:
    assert not [one for one in report(name).findings if one.rule in ("label_leak", "length_bias")]


def test_unpaired_data_are_no_records() -> None:
    assert of_rule(report("llama_factory_kto_en.json"), "no_records")


def test_no_finding_quotes_a_text() -> None:
    assert SHARED is not None
    for name in (HH, ZH, SCORED):
        texts = {text.strip() for record in raw(name) for text in contents(record) if len(text) > 30}
        shown = json.dumps(asdict(report(name)), ensure_ascii=False)
        assert not [text for text in texts if text[:30] in shown]
        assert str(Path(SHARED / name)) in shown
