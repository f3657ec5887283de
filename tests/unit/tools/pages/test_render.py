"""The guard of all pages: texts are escaped, and nothing but the page's own style and scripts may act."""

import base64
import hashlib
import re
from html import unescape
from pathlib import Path

import pytest
from markupsafe import Markup

from dpo_dist.tools import pages
from dpo_dist.tools.pages.blocks import Answers, Chart, Choices, Folded, Heading, Line, Table, Text
from dpo_dist.tools.pages.render import inert, page
from tests.unit.tools.pages.made_run import HOSTILE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>&\"'</b>", "&lt;b&gt;&amp;&quot;&#x27;&lt;/b&gt;"),
        ("a\u202eb", 'a<i class="mark" title="RIGHT-TO-LEFT OVERRIDE">U+202E</i>b'),
        ("\x1b[31m", '<i class="mark" title="U+001B">ESC</i>[31m'),
        ("\ud800", '<i class="mark" title="U+D800">U+D800</i>'),
        (Markup("<b>"), "<b>"),
        (None, ""),
    ],
)
def test_html_has_no_markup_and_no_invisible_character(text: object, expected: str) -> None:
    assert inert(text) == expected


def blocks_of(text: str) -> list[Heading | Text | Table | Chart | Answers | Folded | Choices]:
    """Every block, with a text in each of its fields."""
    chart = Chart(text, [Line(text, [0, 1], [1, 2])], text, text, ticks={0: text, 1: text}, note=text)
    answers = Answers(text, text, [(text, "cut")], [(text, text, [(text, "")])], [text, None])
    choices = Choices([(text, text, text)], {text: text}, text)
    table = Table([text], [[f"{text}\n{text}"]])
    return [
        Heading(text),
        Text(text, "", text),
        Text(text, "code"),
        table,
        chart,
        answers,
        Folded(text, [table]),
        choices,
    ]


def tags(html: str) -> list[str]:
    body = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL)
    names = re.findall(r"<(/?[\w!-]+)", body)
    return [name for name in names if name not in ("i", "/i")]  # marks of characters


def test_a_text_in_any_field_of_any_block_adds_no_element_and_no_attribute() -> None:
    hostile = page(HOSTILE, blocks_of(HOSTILE), [("good", HOSTILE)])
    plain = page("plain", blocks_of("plain"), [("good", "plain")])
    assert tags(hostile) == tags(plain)
    body = re.sub(r"<(style|script)>.*?</\1>", "", hostile, flags=re.DOTALL)
    for tag in re.findall(r"<[^>]*>", body):
        outside = re.sub(r'"[^"]*"', "", tag)
        assert not re.search(r"\son\w+=|javascript", outside), tag
    attributes = re.findall(r' (?:value|src|name|data-keys)="([^"]*)"', body)
    assert attributes.count("choice") == attributes.count("viewport") == attributes.count("referrer") == 1
    texts = [unescape(value) for value in attributes if value not in ("choice", "viewport", "referrer")]
    assert texts == [HOSTILE] * 6, "an attribute has the text itself"
    assert not {"\u202e", "\x1b", "\u200b"} & set(re.sub(r'"[^"]*"', "", body))


def test_only_the_own_style_and_scripts_are_allowed_and_uplot_is_as_it_was_published() -> None:
    html = page("x", blocks_of("x"))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', unescape(html))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        found = re.findall(rf"<{kind}>(.*?)</{kind}>", html, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found]
        [allowed] = re.findall(rf"{kind}-src ([^;]*);", policy)
        assert allowed.split() == [f"'sha256-{digest}'" for digest in digests]
    assert policy.endswith("img-src data:; base-uri 'none'; form-action 'self'")
    assert "form-action 'none'" in unescape(page("x", [Text("x")]))
    uplot = Path(pages.__file__).parent / "uplot"
    assert "uPlot (v1.6.32)" in (uplot / "uPlot.iife.min.js").read_text()[:100]
    assert "MIT License" in (uplot / "LICENSE").read_text()


def test_a_table_has_the_same_cells_on_a_page_and_in_a_terminal() -> None:
    table = Table(["run", "loss"], [["a", "0.5\n[0.4, 0.6]"], ["bb", "-"]])
    assert table.lines() == ["run  loss", "a    0.5 [0.4, 0.6]", "bb   -"]
    assert "<td>0.5<small>[0.4, 0.6]</small></td>" in page("x", [table])
