"""Responses side by side: inert, marked, complete in words where a text is empty, cut or not known."""

import re

from dpo_dist.insight.pages.side_by_side import Response, end_notes, side_by_side


def test_words_that_differ_from_one_response_are_marked() -> None:
    shown = side_by_side(
        "Who?",
        [
            Response("reference", "I am a cat"),
            Response("first", "I am a dog"),
            Response("last", "I am a cat"),
        ],
        against="reference",
    )
    assert re.findall("<mark>(.*?)</mark>", shown) == ["dog"]
    assert "<h4>first <small>25 % of its words not in reference</small></h4>" in shown
    assert "<h4>last <small>the same text as reference</small></h4>" in shown
    assert "<h4>reference</h4>" in shown


def test_of_two_responses_both_are_marked() -> None:
    shown = side_by_side("Who?", [Response("a", "one cat"), Response("b", "one dog")], against="a")
    assert re.findall("<mark>(.*?)</mark>", shown) == ["cat", "dog"]


def test_a_text_with_hardly_a_common_word_is_not_marked() -> None:
    ours, theirs = (" ".join(f"{side}{number}" for number in range(30)) for side in "ab")
    shown = side_by_side("Who?", [Response("a", ours), Response("b", f"{theirs} a29")], against="a")
    assert "<mark>" not in shown
    assert "97 % of its words not in a, not marked" in shown


def test_without_a_response_to_compare_nothing_is_marked() -> None:
    texts = [Response("a", "one cat"), Response("b", "one dog")]
    for against in (None, "missing"):
        assert "<mark>" not in side_by_side("Who?", texts, against)
    for text in (None, "", " \n"):
        shown = side_by_side("Who?", [Response("a", text), Response("b", "one dog")], "a")
        assert "<mark>" not in shown
        assert "words" not in shown


def test_empty_and_unknown_responses_are_said_in_words() -> None:
    shown = side_by_side(
        " ", [Response("a", None), Response("b", ""), Response("c", "\n\n"), Response("d", "text")], "d"
    )
    assert "not known" in shown
    assert "empty: no text" in shown
    assert "only white space: 2 characters" in shown
    assert "prompt: empty" in shown
    assert "%" not in shown


def test_notes_of_length_and_end() -> None:
    assert end_notes(184, False) == "184 tokens, did not end"
    assert end_notes(1, True) == "1 token"
    assert end_notes(None, None) == ""
    assert end_notes(True, "no") == ""


def test_texts_are_inert_everywhere() -> None:
    hostile = "</div><script>alert(1)</script>\u202eabc\x1b"
    shown = side_by_side(hostile, [Response(hostile, hostile, hostile), Response("b", "x")], against=hostile)
    assert "<script" not in shown
    assert "\u202e" not in shown
    assert "\x1b" not in shown
    assert shown.count("U+202E") >= 4
    assert shown.count("<div") == shown.count("</div>")


def test_white_space_and_code_are_kept() -> None:
    text = "Run:\n```python\ndef f():\n\treturn  1\n```\ndone"
    shown = side_by_side("q", [Response("a", text.replace("1", "2")), Response("b", text)], against="a")
    assert (
        "<code>```python\ndef f():\n\treturn  </code><code><mark>1</mark></code><code>\n```</code>" in shown
    )
    assert "<code>```\nnever closed</code>" in side_by_side("q", [Response("a", "```\nnever closed")])
    assert "the same words as a, other white space" in side_by_side(
        "q", [Response("a", "x y"), Response("b", "x  y")], "a"
    )


def test_a_long_text_is_cut_and_says_so() -> None:
    text = "begin " + "middle " * 1000 + "end"
    shown = side_by_side("q", [Response("a", text), Response("b", text + "s")], against="a", longest=100)
    assert "begin" in shown
    assert re.search("end(</mark>)?</div>", shown)
    assert "6,909 characters not shown" in shown
    assert "in the part shown" in shown
    assert len(shown) < 1500


def test_almost_all_is_not_all() -> None:
    words = [f"w{number}" for number in range(300)]
    shown = side_by_side("q", [Response("a", " ".join(words)), Response("b", " ".join([*words, "new"]))], "a")
    assert "0.33 % of its words" in shown
