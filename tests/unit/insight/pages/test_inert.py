"""Text of data is inert on pages, by one guard of all templates, and on terminals."""

import re

import pytest
from markupsafe import Markup

from dpo_dist.foundation.streams import printable
from dpo_dist.insight.pages.render import inert, joined_origins, page, part

HOSTILE = "<b>\u202e\x1b</b>"


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
        (Markup("<b>"), "<b>"),
        (7, "7"),
        (None, ""),
    ],
)
def test_html_has_no_markup_and_no_invisible_character(text: object, html: str) -> None:
    assert inert(text) == html


def test_templates_are_guarded_and_the_policy_allows_the_own_style_and_script_only() -> None:
    shown = part("macros.jinja", "table", [HOSTILE], [[HOSTILE]])
    assert shown.count("&lt;b&gt;") == shown.count(">U+202E<") == shown.count(">ESC<") == 2
    content = {"runs": [], "settings": [(HOSTILE,) * 3], "others": [], "results": []}
    html = page("difference.jinja", HOSTILE, **content)
    assert "script" not in html
    assert "\u202e" not in html
    html = page("difference.jinja", HOSTILE, ["charts.js"], **content)
    assert html.count("<script>") == 1
    assert re.search(r"style-src 'sha256-[\w+/=]{44}'; script-src 'sha256-[\w+/=]{44}'; ", html)
    assert "unsafe" not in html


def test_a_terminal_gets_no_control_code() -> None:
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"
    assert printable("data/é.jsonl:3") == "data/é.jsonl:3"
    assert printable("\ud800") == "\\ud800"


def test_a_file_is_named_once() -> None:
    examples = ("a.jsonl:1", "a.jsonl:2, b.jsonl:1", "b.jsonl:4")
    assert joined_origins(examples, 3) == "a.jsonl:1, :2 (with b.jsonl:1), :4"
    assert joined_origins(("a.jsonl:1", "a.jsonl:2"), 1) == "a.jsonl:1"
