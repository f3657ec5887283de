"""Every count that docs/data.md explains, and every change of a record, has words for people."""

import re
from pathlib import Path

from dpo_dist.data.counts import CHANGES, in_words

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


def documented() -> set[str]:
    """The names in the first column of the tables of counts and reasons."""
    names: set[str] = set()
    for part in re.findall(
        r"^\| (?:count|reason) \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE
    ):
        for line in part.splitlines():
            names |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    return names


def test_every_count_has_words() -> None:
    names = documented() | CHANGES.keys()
    assert {"unparsable", "held_out_for_eval", "too_long"} <= names
    assert [name for name in sorted(names) if in_words(name) == name.replace("_", " ")] == []


def test_unread_fields_and_unknown_counts_are_readable() -> None:
    assert in_words("unread_images") == "the field images is not read"
    assert in_words("of_a_later_version") == "of a later version"
