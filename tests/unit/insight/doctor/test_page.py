"""The doctor's page and JSON: complete, self-contained, and inert whatever the data are."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import FolderConfig, RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.insight.doctor.examine import Diagnosis
from dpo_dist.insight.doctor.findings import Finding, Level
from dpo_dist.insight.doctor.shown_pairs import Part, ShownPair
from dpo_dist.insight.pages.doctor import diagnosis_lines, write_doctor_page, write_doctor_report
from tests.support.read_only import read_only
from tests.unit.insight.pages.made_run import Page

HOSTILE = (
    "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\u200b\x1b[2J"
    '"><a href="javascript:alert(3)">x</a><!-- <b onclick=\'x\'>'
)
LENGTHS = {
    "count": 4,
    "mean": 7.0,
    "smallest": 0,
    "largest": 30,
    "percentiles": {25: 1.0, 50: 3.0, 95: 30.0},
    "edges": [0.0, 10.0, 20.0, 30.0],
    "counts": [3, 0, 1],
}
SIDE = {"characters": LENGTHS, "tokens": LENGTHS, "cut": 1, "cut_tokens": 20}
EMPTY: dict[str, Any] = {
    **{"label": "a", "path": "a", "is_eval": False, "read": 0, "kept": 0, "pairs": 0, "held_out": None},
    **{"dropped": {}, "changed": {}, "sides": {}, "prefix": None, "shares": {}, "languages": {}},
    **{"scores": {}, "margins": {}, "leaks": [], "notes": []},
}
ACROSS = dict.fromkeys(
    ("near_duplicates", "contradictions", "repeated_prompts", "leaked_prompts", "near_leaked_prompts"), 0
) | {"duplicates": 5, "clusters": [3, 2], "benchmark_hits": 0}


def diagnosis(text: str = HOSTILE) -> Diagnosis:
    """A diagnosis with `text` wherever data, paths and labels of a user can occur."""
    test = {"feature": "first_word", "accuracy": 0.9, "low": 0.8, "high": 0.95, "detail": text}
    source = EMPTY | {
        **{"label": text, "path": text, "read": 10, "kept": 8, "pairs": 8},
        "dropped": {"empty_response": {"count": 2, "examples": [f"{text}:1", f"{text}:2"]}},
        "changed": {"prompt_truncated": 3},
        "sides": dict.fromkeys(("prompt", "chosen", "rejected"), SIDE),
        "prefix": {"tokens": 100, "unique_tokens": 60, "share": 0.4, "expected_gain": 1.67},
        **{"shares": {"refusal_chosen": 0.5}, "languages": {"en": 0.9, "fr": 0.1}},
        **{"scores": {"ties": 3.0}, "margins": {"prefers_chosen": 0.75}, "leaks": [test], "notes": [text]},
    }
    findings = tuple(
        Finding(f"rule_{level}", level, text, text, 3, 0.3, (f"{text}:4",), text)
        for level in (Level.error, Level.warning, Level.note)
    )
    part = Part("chosen", [(text, "trained"), (text, "special "), (text, "cut")])
    pair = ShownPair(f"{text}:1", ("rule",), text, [part, Part("prompt", [("9 not shown", "omitted")])])
    store = {"folder": text, "pairs": 10, "stored": 4, "numerics": [text], "margins": {text: LENGTHS}}
    return Diagnosis([source], ACROSS, findings, Path(text), store, (pair,))


def written(folder: Path, found: Diagnosis) -> str:
    config = RunConfig(
        run=FolderConfig(str(folder / "run")), data=DataConfig(train=[SourceConfig(HOSTILE, name=HOSTILE)])
    )
    write_doctor_page(RunFolder.of(config), found, config)
    return RunFolder.of(config).doctor_page.read_text(encoding="utf-8")


def test_hostile_text_adds_no_element_and_no_control_character(tmp_path: Path) -> None:
    html = written(tmp_path, diagnosis())
    page, plain = Page(html), Page(written(tmp_path, diagnosis("plain")))
    assert [tag for tag in page.tags if tag != "i"] == [tag for tag in plain.tags if tag != "i"]
    assert not {"script", "img", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "style")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not {"\u202e", "\u200b", "\x1b"} & set(html)
    assert "U+202E" in page.text


def test_the_page_says_everything(tmp_path: Path) -> None:
    text = Page(written(tmp_path, diagnosis("plain"))).text
    for expected in (
        *("1 error", "1 warning", "1 note", "8 of 10 records can be used", "rule_error", "To do: plain"),
        *("empty_response", "prompt truncated", "1 cut", "saves 40 % of the tokens", "first word", "90 %"),
        *("4 of 10 pairs in the store", "Show all 1 texts"),
        *("dropped: plain", "9 not shown", "nats per token"),
    ):
        assert expected in text, expected


def test_sections_without_content_are_missing(tmp_path: Path) -> None:
    page = written(tmp_path, Diagnosis([EMPTY], ACROSS, ()))
    text = Page(page).text
    assert "no findings" in text
    assert "Without a model" in text
    assert 'id="pairs"' not in page
    assert 'id="reference"' not in page


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new" / "run").check_writable()
    assert not list(tmp_path.iterdir()), "nothing is created"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").check_writable()
    with read_only(tmp_path), pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "new" / "run").check_writable()


def test_json_is_complete_and_has_no_texts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    found = diagnosis("plain")
    write_doctor_report(folder, found, 1)
    content: dict[str, Any] = json.loads(folder.doctor_report.read_text())
    assert content["format"] == 1
    assert content["exit_code"] == 1
    assert content["versions"].keys() == {"dpo_dist", "python"}
    assert [finding["level"] for finding in content["findings"]] == ["error", "warning", "note"]
    assert content["findings"][0].keys() == {
        *("rule", "level", "text", "source", "count", "share", "examples", "remedy")
    }
    assert content["sources"][0]["dropped"] == {
        "empty_response": {"count": 2, "examples": ["plain:1", "plain:2"]}
    }
    assert content["store"]["stored"] == 4
    assert content["across"]["duplicates"] == 5
    assert "shown" not in content


def test_the_lines_for_a_screen_are_complete_and_inert() -> None:
    lines = diagnosis_lines(diagnosis("data.jsonl"), RunFolder(Path("out/run")))
    assert lines[1].split() == ["data.jsonl", "train", "10", "8", "2", "8", "3", "tokens", "3", "tokens"]
    finding = ["error rule_error data.jsonl", "  data.jsonl", "  to do: data.jsonl", "  first: data.jsonl:4"]
    at = lines.index(finding[0])
    assert lines[at : at + 5] == [*finding, "warning rule_warning data.jsonl"]
    assert lines[-2:] == ["1 error, 1 warning, 1 note", "page: out/run/doctor/doctor.html"]
    assert any("4 of 10 pairs in the store" in line for line in lines)
    hostile = diagnosis_lines(diagnosis(f"{HOSTILE}\nforged"), RunFolder(Path("out/run")))
    assert not {"\x1b", "\u202e", "\u200b", "\n"} & set("".join(hostile))
