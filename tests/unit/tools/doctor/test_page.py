"""The doctor's page, JSON and lines: complete, and inert whatever the data are."""

import json
from pathlib import Path
from typing import Any

from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.doctor.page import diagnosis_lines, write_doctor_page, write_doctor_report
from tests.support.doctor_data import diagnosis
from tests.unit.tools.pages.made_run import HOSTILE, text_of


def test_the_page_is_complete(tmp_path: Path) -> None:
    folder = DoctorFolder(tmp_path / "run")
    write_doctor_page(folder, diagnosis("plain"))
    page = text_of(folder.doctor_page)
    for text in (
        "1 error 1 warning 1 note",
        "8 of 10 records can be used.",
        "error rule error, plain plain To do: plain First: plain:4",
        "plain train 10 8 2 8 3 tokens 3 tokens",
        "dropped: empty_response 2 plain:1; plain:2",
        "prompt truncated 3",
        "length mean 25 % 50 % 95 % largest cut",
        "chosen tokens 7 1 3 30 30 1 20 tokens",
        "plain:1 rule; dropped: plain prompt 9 not shown chosen plain plain plain plain",
    ):
        assert text in page, text


def test_json_is_complete_and_has_no_texts(tmp_path: Path) -> None:
    folder = DoctorFolder(tmp_path)
    write_doctor_report(folder, diagnosis("plain"), 1)
    content: dict[str, Any] = json.loads(folder.doctor_report.read_text())
    assert (content["format"], content["exit_code"]) == (1, 1)
    assert content["findings"][0].keys() == {
        *("rule", "level", "text", "source", "count", "share", "examples", "remedy")
    }
    dropped = {"empty_response": {"count": 2, "examples": ["plain:1", "plain:2"]}}
    assert content["sources"][0]["dropped"] == dropped
    assert content["across"]["duplicates"] == 5
    assert "shown" not in content


def test_the_lines_for_a_screen_are_complete_and_inert() -> None:
    lines = diagnosis_lines(diagnosis("data.jsonl"), DoctorFolder(Path("out/run")))
    assert lines[1].split() == ["data.jsonl", "train", "10", "8", "2", "8", "3", "tokens", "3", "tokens"]
    finding = ["error rule_error data.jsonl", "  data.jsonl", "  to do: data.jsonl", "  first: data.jsonl:4"]
    at = lines.index(finding[0])
    assert lines[at : at + 5] == [*finding, "warning rule_warning data.jsonl"]
    assert lines[-2:] == ["1 error, 1 warning, 1 note", "page: out/run/doctor/doctor.html"]
    hostile = diagnosis_lines(diagnosis(f"{HOSTILE}\nforged"), DoctorFolder(Path("out/run")))
    assert not {"\x1b", "\u202e", "\u200b", "\n"} & set("".join(hostile))
