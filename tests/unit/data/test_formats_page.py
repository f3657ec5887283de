"""The table of formats in docs/data.md: each example is read, by detection and by the name of its format."""

import json
import re
from pathlib import Path

import pytest

from dpo_dist.config.data import DataFormat, SourceConfig
from dpo_dist.data.columns import FIELDS
from dpo_dist.data.formats import read_records
from dpo_dist.data.messages import TAGS
from dpo_dist.data.records import PreferenceRecord
from tests.support.pages import ROOT
from tests.support.records import jsonl

PAGE = (ROOT / "docs" / "data.md").read_text()
ROWS = re.findall(
    r"^\| `(\w+)` \| `(\{.+\})` \| ", PAGE.split("| format | example", 1)[1].split("\n\n")[0], re.M
)


@pytest.mark.parametrize(("name", "example"), ROWS)
def test_the_example_of_a_format_is_read(name: str, example: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, json.loads(example))
    detected, named = (
        next(iter(read_records(SourceConfig(path=path, format=format_))))
        for format_ in (DataFormat.auto, DataFormat(name))
    )
    assert isinstance(detected, PreferenceRecord), detected
    assert named == detected
    prompt = detected.prompt
    assert "2 + 2" in (prompt if isinstance(prompt, str) else prompt[-1].content)
    best, *others = map(str, detected.responses)
    assert "4" in best or "add" in best
    assert not others or "5" in others[0]


def test_the_page_on_other_trainers_names_fields_and_tags_that_exist() -> None:
    page = (ROOT / "docs" / "coming_from.md").read_text()
    for key, known in (("columns", (*FIELDS, "COLUMN")), ("tags", tuple(TAGS))):
        names = [
            name
            for found in re.findall(rf"{key}: {{(.*?)}}", page)
            for name in re.findall(r"(\w+): (?!null)", found)
        ]
        assert names
        assert set(names) <= set(known)


def test_every_format_and_field_is_on_the_page() -> None:
    assert {name for name, _ in ROWS} == set(DataFormat) - {DataFormat.auto}
    listed = PAGE.split("The fields are ", 1)[1].split(".\n", 1)[0]
    assert re.findall(r"`([^`]+)`", listed) == list(FIELDS)
