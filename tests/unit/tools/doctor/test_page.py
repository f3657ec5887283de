"""The doctor's page, JSON and lines: complete, and inert whatever the data are."""

import json
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import FolderConfig, RunConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.tools.doctor.examine import Diagnosis
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.doctor.page import diagnosis_lines, write_doctor_page, write_doctor_report
from tests.support.doctor_data import diagnosis
from tests.unit.tools.pages.made_run import HOSTILE, Page


def written(folder: Path, found: Diagnosis) -> str:
    config = RunConfig(
        run=FolderConfig(str(folder / "run")), data=DataConfig(train=[SourceConfig(HOSTILE, name=HOSTILE)])
    )
    write_doctor_page(DoctorFolder(config.run.path), found, config.data, config.doctor)
    return DoctorFolder(config.run.path).doctor_page.read_text(encoding="utf-8")


def test_hostile_text_adds_no_element_and_no_control_character(tmp_path: Path) -> None:
    html = written(tmp_path, diagnosis(HOSTILE))
    page, plain = Page(html), Page(written(tmp_path, diagnosis("plain")))
    assert [tag for tag in page.tags if tag != "i"] == [tag for tag in plain.tags if tag != "i"]
    assert not {"script", "img", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "style")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not {"\u202e", "\u200b", "\x1b"} & set(html)
    assert "U+202E" in page.text
    assert "data.max_prompt_length null" in page.section("Settings")
    assert "doctor.texts true" in page.section("Settings")
    assert ("optimum", "0.5") in page.attributes, "a leak has the colour of a fault"


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
