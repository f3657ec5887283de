"""The table of formats in docs/data.md: each example is read, by detection and by the name of its format."""

import json
import re

import pytest

from dpo_dist.config.data import DataFormat
from dpo_dist.data.columns import FIELDS
from dpo_dist.data.messages import TAGS
from tests.support.pages import ROOT
from tests.support.records import good

PAGE = (ROOT / "docs" / "data.md").read_text()
ROWS = re.findall(
    r"^\| `(\w+)` \| `(\{.+\})` \| ", PAGE.split("| format | example", 1)[1].split("\n\n")[0], re.M
)


@pytest.mark.parametrize(("name", "example"), ROWS)
def test_the_example_of_a_format_is_read_by_detection_and_by_name(name: str, example: str) -> None:
    record = good(json.loads(example))
    assert good(json.loads(example), DataFormat(name)) == record
    assert "2 + 2" in (record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content)
    best, *others = map(str, record.responses)
    assert "4" in best or "add" in best
    assert not others or "5" in others[0]


def test_every_format_and_field_is_on_the_page() -> None:
    assert {name for name, _ in ROWS} == set(DataFormat) - {DataFormat.auto}
    listed = PAGE.split("The fields are ", 1)[1].split(".\n", 1)[0]
    assert sorted(re.findall(r"`([^`]+)`", listed)) == sorted(FIELDS)
    page = (ROOT / "docs" / "coming_from.md").read_text()
    for key, known in (("columns", (*FIELDS, "COLUMN")), ("tags", tuple(TAGS))):
        written = " ".join(re.findall(rf"{key}: {{(.*?)}}", page))
        assert set(re.findall(r"(\w+): (?!null)", written)) <= set(known)
