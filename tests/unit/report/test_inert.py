"""Text of data is shown without markup, control codes and invisible characters."""

import pytest

from dpo_dist.foundation.streams import printable
from dpo_dist.insight.pages.render import inert_html, joined_origins


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain text", "plain text"),
        ("<b>&\"'</b>", "&lt;b&gt;&amp;&quot;&#x27;&lt;/b&gt;"),
        ("a\n\tb", "a\n\tb"),
        ("a\u202eb", 'a<i class="mark" title="RIGHT-TO-LEFT OVERRIDE">U+202E</i>b'),
        ("\u200b", '<i class="mark" title="ZERO WIDTH SPACE">U+200B</i>'),
        ("\r", '<i class="mark" title="U+000D">CR</i>'),
        ("\x1b[31m", '<i class="mark" title="U+001B">ESC</i>[31m'),
        ("\ufffd", '<i class="mark" title="REPLACEMENT CHARACTER">U+FFFD</i>'),
        ("\ud800", '<i class="mark" title="U+D800">U+D800</i>'),
        ("\u3164", '<i class="mark" title="HANGUL FILLER">U+3164</i>'),
        ("שלום 你好 é", "שלום 你好 é"),
    ],
)
def test_html_has_no_markup_and_no_invisible_character(text: str, html: str) -> None:
    assert inert_html(text) == html


def test_a_terminal_gets_no_control_code() -> None:
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"
    assert printable("data/é.jsonl:3") == "data/é.jsonl:3"
    assert printable("\ud800") == "\\ud800"


def test_a_file_is_named_once() -> None:
    assert (
        joined_origins(("a.jsonl:1", "a.jsonl:2, b.jsonl:1", "b.jsonl:4"), 3)
        == "a.jsonl:1, :2 (with b.jsonl:1), :4"
    )
    assert joined_origins(("a.jsonl:1", "a.jsonl:2"), 1) == "a.jsonl:1"
