"""Responses to a prompt side by side, with the words marked that differ; HTML without a script.

Pages add `SIDE_STYLE` to their style sheet.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from dpo_dist.foundation.text import counted, percent
from dpo_dist.generation.text_facts import WORD
from dpo_dist.insight.pages.render import inert_html

Span = tuple[int, int]
"""First index and end of a passage, in characters or words."""


@dataclass(frozen=True)
class Difference:
    """The words of a text that another text lacks.

    Attributes:
        spans: passages of such words, in characters, in order; white space between two of them is in one.
        new: number of such words.
        words: number of all words of the text.
        similarity: twice the common words over the words of both texts; 1 for two texts without words.
    """

    spans: tuple[Span, ...]
    new: int
    words: int
    similarity: float


def difference(text: str, other: str) -> Difference:
    """Return the words of `text` that `other` lacks. White space is not compared.

    A few common words among many different ones count as different: their order agrees by chance.

    Args:
        text: its words get the spans.
        other: the text that it is compared with. Time and memory grow with the product of both numbers of
            words, divided by 64.
    """
    found, others = list(WORD.finditer(text)), WORD.findall(other)
    words = [each.group() for each in found]
    common = _without_chance(_common_runs(words, others), words, len(others))
    kept = sum(stop - start for start, stop in common)
    edges = [(0, 0), *common, (len(words), len(words))]
    spans = [
        (found[stop].start(), found[start - 1].end())
        for (_, stop), (start, _) in pairwise(edges)
        if start > stop
    ]
    total = len(words) + len(others)
    return Difference(tuple(spans), len(words) - kept, len(words), 2 * kept / total if total else 1.0)


def _without_chance(runs: Sequence[tuple[Span, Span]], words: Sequence[str], others: int) -> list[Span]:
    """Return the passages of `words` that are common, without short ones between long changes."""
    kept: list[Span] = []
    last = (0, 0)
    bounds = [*runs, ((len(words), len(words)), (others, others))]
    for ((start, stop), (at, end)), ((next_start, _), (next_at, _)) in pairwise(bounds):
        before = max(start - last[0], at - last[1])
        after = max(next_start - stop, next_at - end)
        has_letters = any(word[0].isalnum() for word in words[start:stop])
        if min(before, after) < (2 * (stop - start) if has_letters else 1):
            kept.append((start, stop))
            last = (stop, end)
    return kept


def _common_runs(words: Sequence[str], others: Sequence[str]) -> list[tuple[Span, Span]]:
    """Return the passages of a longest common subsequence: where they are in `words` and in `others`."""
    runs: list[tuple[Span, Span]] = []
    for index, at in _common_words(words, others):
        if runs and runs[-1][0][1] == index and runs[-1][1][1] == at:
            (start, _), (first, _) = runs.pop()
            runs.append(((start, index + 1), (first, at + 1)))
        else:
            runs.append(((index, index + 1), (at, at + 1)))
    return runs


def _common_words(words: Sequence[str], others: Sequence[str]) -> Iterator[Span]:
    """Yield the indices of equal words of a longest common subsequence.

    Bit-parallel (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): a row of the dynamic programme
    is one integer, so that words that repeat cost no more than others.
    """
    shortest = min(len(words), len(others))
    head = next((at for at in range(shortest) if words[at] != others[at]), shortest)
    rest = shortest - head
    tail = next((at for at in range(rest) if words[-1 - at] != others[-1 - at]), rest)
    yield from ((at, at) for at in range(head))
    middle, other = words[head : len(words) - tail], others[head : len(others) - tail]
    yield from ((head + index, head + at) for index, at in _aligned(middle, other))
    yield from ((len(words) - at, len(others) - at) for at in range(tail, 0, -1))


def _aligned(words: Sequence[str], others: Sequence[str]) -> list[Span]:
    positions: defaultdict[str, int] = defaultdict(int)
    for index, word in enumerate(words):
        positions[word] |= 1 << index
    full = (1 << len(words)) - 1
    row, rows = full, []
    for word in others:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
        rows.append(row)
    found = []
    index, at = len(words), len(others)
    while index and at:
        bit = 1 << (index - 1)
        if rows[at - 1] & bit:
            index -= 1
            continue
        at -= 1
        if at and not rows[at - 1] & bit:
            continue
        index -= 1
        found.append((index, at))
    return found[::-1]


LONGEST = 20_000
"""Characters of a text that are shown: of longer ones the beginning and the end."""

_HEAD_SHARE = 0.75
_CODE = re.compile(r"^ {0,3}(```|~~~).*?(?:^ {0,3}\1[^\n]*|\Z)", re.MULTILINE | re.DOTALL)
_IS_DIFFERENT, _IS_CODE = 1, 2
_TITLE_CHARACTERS = 120
# Marks on nearly all words of a text show nothing.
_FEW_WORDS, _MOST_MARKED = 20, 0.9
_TEMPLATE_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")
_ROLE = re.compile(r"\A\s*(system|user|assistant|model)\s*(\n|\Z)")


@dataclass(frozen=True)
class Response:
    """A response as it is shown.

    Attributes:
        label: its model, such as "step 300".
        text: None: not known.
        notes: plain text behind the label: "184 tokens, did not end".
    """

    label: str
    text: str | None
    notes: str = ""


@dataclass(frozen=True)
class _Shown:
    """The part of a text that is shown: its beginning, and its end from index `gap` on."""

    text: str
    gap: int
    omitted: int


def side_by_side(
    prompt: str, responses: Sequence[Response], against: str | None = None, longest: int = LONGEST
) -> str:
    """Return a prompt and its responses as HTML: columns on wide screens, one under the other on narrow ones.

    Args:
        prompt: its text.
        responses: in the order of the columns.
        against: label of the response that the others are compared with: words of theirs that it lacks are
            marked, unless they are nearly all, and the notes give their share. With only one other response
            its words are marked as well. None, or a response without text: no marks.
        longest: characters of a text that are shown.
    """
    texts = [_shortened(each.text or "", longest) for each in responses]
    columns = [
        _column(response, text, None if other is None else texts[other], str(against))
        for response, text, other in zip(responses, texts, _compared(responses, against), strict=True)
    ]
    title = "prompt" if prompt.strip() else "prompt: empty"
    head = f"<h4>{title}</h4>{_block(_shortened(prompt, longest), ()) if prompt else ''}"
    return f'<div class="side">{head}<div class="side-columns">{"".join(columns)}</div></div>'


def end_notes(tokens: object, is_finished: object) -> str:
    """Return "184 tokens, did not end"; empty without facts.

    Args:
        tokens: number of tokens; anything else is not known.
        is_finished: whether the response ended by itself; not a bool: not known.
    """
    known = isinstance(tokens, int) and not isinstance(tokens, bool)
    notes = [counted(int(str(tokens)), "token")] if known else []
    return ", ".join([*notes, "did not end"] if is_finished is False else notes)


def prompt_title(prompt: str) -> str:
    """Return the `excerpt` of a prompt as HTML."""
    return inert_html(excerpt(prompt)) or "empty prompt"


def excerpt(prompt: str) -> str:
    """Return the beginning of a prompt's last turn on one line, without the template's tokens."""
    turns = [_ROLE.sub("", turn).split() for turn in _TEMPLATE_TOKEN.split(prompt)]
    return cut(" ".join(next((turn for turn in reversed(turns) if turn), ())))


def cut(text: str) -> str:
    """Return the first 120 characters of a text, with an ellipsis if it has more."""
    return text if len(text) <= _TITLE_CHARACTERS else text[:_TITLE_CHARACTERS] + "\u2026"


def _has_text(response: Response) -> bool:
    return bool(response.text and response.text.strip())


def _compared(responses: Sequence[Response], against: str | None) -> list[int | None]:
    """Return the index of the response that each one is compared with."""
    readable = [at for at, each in enumerate(responses) if _has_text(each)]
    base = next((at for at in readable if responses[at].label == against), None)
    if base is None:
        return [None] * len(responses)
    only_other = next((at for at in readable if at != base), None) if len(responses) == 2 else None
    return [
        None if at not in readable else only_other if at == base else base for at in range(len(responses))
    ]


def _column(response: Response, shown: _Shown, other: _Shown | None, against: str) -> str:
    notes: list[str] = [response.notes]
    spans: tuple[Span, ...] = ()
    if other is not None:
        found = difference(shown.text, other.text)
        is_other = found.words > _FEW_WORDS and found.new > _MOST_MARKED * found.words
        spans = () if is_other else found.spans
        if response.label != against:
            notes.append(
                _difference_note(found, shown, other, against) + (", not marked" if is_other else "")
            )
    text = "; ".join(filter(None, notes))
    small = f" <small>{inert_html(text)}</small>" if text else ""
    return f"<div><h4>{inert_html(response.label)}{small}</h4>{_content(response, shown, spans)}</div>"


def _content(response: Response, shown: _Shown, different: Sequence[Span]) -> str:
    if _has_text(response):
        return _block(shown, different)
    if response.text is None:
        return '<p class="side-empty">not known</p>'
    count = counted(len(response.text), "character")
    return f'<p class="side-empty">{f"only white space: {count}" if response.text else "empty: no text"}</p>'


def _difference_note(found: Difference, shown: _Shown, other: _Shown, name: str) -> str:
    part = " in the part shown" if shown.omitted or other.omitted else ""
    if shown == other:
        return f"the same text as {name}{part}"
    if found.similarity == 1:
        return f"the same words as {name}{part}, other white space"
    if not found.new:
        return f"no words that {name} lacks{part}"
    return f"{percent(found.new / found.words)} of its words not in {name}{part}"


def _shortened(text: str, longest: int) -> _Shown:
    if len(text) <= longest:
        return _Shown(text, len(text), 0)
    head = round(longest * _HEAD_SHARE)
    return _Shown(text[:head] + text[head - longest :], head, len(text) - longest)


def _block(shown: _Shown, different: Sequence[Span]) -> str:
    """Return a text as HTML; its passages `different` are marked, fenced code has a monospaced font."""
    flags = bytearray(len(shown.text))
    for start, stop in different:
        flags[start:stop] = bytes([_IS_DIFFERENT]) * (stop - start)
    for fence in _CODE.finditer(shown.text):
        for at in range(*fence.span()):
            flags[at] |= _IS_CODE
    gap = (
        f'<span class="side-gap">{counted(shown.omitted, "character")} not shown</span>'
        if shown.omitted
        else ""
    )
    body = _pieces(shown.text, flags, 0, shown.gap) + gap + _pieces(shown.text, flags, shown.gap, len(flags))
    return f'<div class="side-text" dir="auto">{body}</div>'


def _pieces(text: str, flags: bytearray, start: int, stop: int) -> str:
    pieces = []
    for flag, places in groupby(range(start, stop), flags.__getitem__):
        end = start + sum(1 for _ in places)
        piece = inert_html(text[start:end])
        piece = f"<mark>{piece}</mark>" if flag & _IS_DIFFERENT else piece
        pieces.append(f"<code>{piece}</code>" if flag & _IS_CODE else piece)
        start = end
    return "".join(pieces)


SIDE_STYLE = """
:root { --different: #cfe6ff; --different-line: #1f6fc4; }
@media (prefers-color-scheme: dark) { :root { --different: #163a5f; --different-line: #7db7f5; } }
.sample, .prompt { margin: 10px 0; border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; }
.sample summary, .prompt summary { overflow-wrap: anywhere; unicode-bidi: plaintext; }
.sample summary small, .prompt summary small { display: block; font-weight: 400; color: var(--quiet); }
.sample summary small, .prompt summary small { unicode-bidi: isolate; }
.side h4 { font-size: 13px; font-weight: 600; margin: 12px 0 4px; overflow-wrap: anywhere; }
.side h4 small { font-weight: 400; color: var(--quiet); font-size: 13px; }
.side-columns { display: grid; gap: 0 12px; }
.side-columns { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.side-columns > div { min-width: 0; display: flex; flex-direction: column; }
.side-text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; font-size: 14px; }
.side-text { unicode-bidi: plaintext; text-align: start; }
.side-text { border: 1px solid var(--line); border-radius: 6px; padding: 8px 10px; }
.side-text { max-height: min(420px, 60vh); overflow-y: auto; flex: 1; }
.side-text code { font: 13px/1.5 ui-monospace, monospace; }
.side-text mark { background: var(--different); color: inherit; border-radius: 2px; }
.side-text mark { text-decoration: underline 1px var(--different-line); text-underline-offset: 3px; }
.side-gap, .side-empty { color: var(--quiet); font-style: italic; }
.side-gap { display: block; text-align: center; unicode-bidi: isolate; }
.side-empty { border: 1px dashed var(--line); border-radius: 6px; padding: 8px 10px; }
.side-empty { margin: 0; font-size: 14px; }
"""
