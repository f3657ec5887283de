"""Choose records for the doctor's page (examples of findings, a sample of each source), and decode them.

The page shows these texts inert, and hides them at first.
"""

import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dpo_dist.data import BadRecord, DataConfig, DataSource, ImageProcessor, PreferenceRecord, TokenIds
from dpo_dist.data.encode import encode_pair
from dpo_dist.foundation.types import Tokenizer
from dpo_dist.tools.doctor.measures.texts import plain_texts
from dpo_dist.tools.findings import Finding
from dpo_dist.tools.pages.thumbnails import ThumbnailRoom, Thumbnails, shown_tokens, thumbnails

_SAMPLED_RECORDS = 2000
"""A source's sample is drawn from this many of its first records."""
_EXAMPLES_PER_FINDING = 2
_MAX_RESPONSES = 4
_MAX_TOKENS, _MAX_CHARACTERS = 2000, 8000

TextSpan = tuple[str, str]
"""The text of consecutive tokens, and their CSS classes: some of "special trained cut", or "omitted"."""


@dataclass(frozen=True)
class ShownPart:
    """The prompt or a response of a shown record; `tokens` counts it before anything is cut."""

    name: str
    segments: Sequence[TextSpan]
    tokens: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class ShownPair:
    """One record of the page: the prompt, then the responses, best first."""

    origin: str
    rules: tuple[str, ...]  # rules that it breaks, as an example; empty in the random sample
    note: str  # why training drops it, or empty
    parts: Sequence[ShownPart]
    images: Thumbnails = ()


def show_pairs(
    config: DataConfig,
    tokenizer: "Tokenizer | None",
    findings: Sequence[Finding],
    count: int,
    processor: ImageProcessor | None = None,
) -> list[ShownPair]:
    """Return examples of the findings, and a sample of `count` records from each source.

    Without a tokenizer texts are shown as they are in the record.
    """
    rules: dict[str, list[str]] = {}
    for finding in findings:
        origins = (origin for example in finding.examples for origin in example.split(", "))
        for origin in itertools.islice(origins, _EXAMPLES_PER_FINDING):
            rules.setdefault(origin, []).append(finding.rule)
    shown = []
    room = ThumbnailRoom()
    for source in [*config.train, *config.eval]:
        for record in _choose(DataSource(source).pinned(), rules, count):
            origin = str(record.origin)
            names = tuple(dict.fromkeys(rules.get(origin, ())))
            note, parts = _parts(record, config, tokenizer, processor)
            images = room.fitting(thumbnails(record.images))
            shown.append(ShownPair(origin, names, note, parts, images))
    return shown


def _choose(source: DataSource, rules: Mapping[str, Sequence[str]], count: int) -> list[PreferenceRecord]:
    """Return the records at the origins of `rules`, and a sample of the first ones."""
    examples: list[PreferenceRecord] = []
    others: list[PreferenceRecord] = []
    folder = os.path.dirname(source.path.split("*", 1)[0])  # noqa: PTH120  (also of a URL)
    missing = {origin for origin in rules if folder in ("", ".") or origin.startswith(folder)}
    for number, record in enumerate(source.records()):
        missing.discard(str(record.origin))
        if isinstance(record, PreferenceRecord):
            if str(record.origin) in rules:
                examples.append(record)
            elif number < _SAMPLED_RECORDS:
                others.append(record)
        if number >= _SAMPLED_RECORDS and not missing:
            break
    return examples + random.Random(0).sample(others, min(count, len(others)))  # noqa: S311


def _parts(
    record: PreferenceRecord,
    config: DataConfig,
    tokenizer: "Tokenizer | None",
    processor: ImageProcessor | None,
) -> tuple[str, list[ShownPart]]:
    """Return why a record is dropped, and its parts with all tokens, also those that are cut."""
    if tokenizer is None:
        return "", _plain_parts(record)
    whole = encode_pair(record, tokenizer, config.without_limits(), processor)
    kept = encode_pair(record, tokenizer, config, processor)
    if isinstance(whole, BadRecord):
        return whole.reason, _plain_parts(record)
    note = ""
    if isinstance(kept, BadRecord):
        note = kept.reason
        kept = whole
    prompt = whole.prompt_ids
    # Tokens in front, such as BOS, stay: those after them are cut.
    missing = len(prompt) - len(kept.prompt_ids)
    front = 0
    while missing and (prompt[front + missing :] != kept.prompt_ids[front:]).any():
        front += 1
    # The limits never cut an image, so what is cut has none.
    placeholder_id = None if processor is None else processor.placeholder_id
    read = prompt[shown_tokens(prompt, whole.images, placeholder_id)]
    is_trained = [False] * len(read)
    cut = range(front, front + missing)
    parts = [ShownPart("prompt", list(_segments(read, is_trained, cut, tokenizer)), len(prompt))]
    for index, name, score in _names(record):
        ids = whole.responses[index]
        is_trained = whole.trained[index].tolist() if whole.trained else [True] * len(ids)
        cut = range(len(kept.responses[index]), len(ids))
        parts.append(ShownPart(name, list(_segments(ids, is_trained, cut, tokenizer)), len(ids), score))
    return note, parts


def _names(record: PreferenceRecord) -> Iterator[tuple[int, str, float | None]]:
    """Yield index, name and score of each response to show."""
    count = len(record.responses)
    for index in range(min(count, _MAX_RESPONSES)):
        name = ("chosen", "rejected")[index] if count == 2 else f"response {index + 1} of {count}"
        name = {"chosen": "good response", "rejected": "bad response", None: name}[record.labelled_side]
        yield index, name, record.scores[index] if record.scores is not None else None


def _segments(
    ids: TokenIds, is_trained: Sequence[bool], cut: range, tokenizer: Tokenizer
) -> Iterator[TextSpan]:
    """Yield runs of tokens of one kind; a long part ends after its first tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    special = added | set(tokenizer.all_special_ids)  # an added token of white space is ordinary text
    tokens = ids[:_MAX_TOKENS].tolist()
    stop = 0
    before = ""
    kinds = []
    for place, token in enumerate(tokens):
        use = "trained" if is_trained[place] else ""
        kinds.append(("special " if token in special else "") + ("cut" if place in cut else use))
    for kind, group in itertools.groupby(kinds):
        stop += sum(1 for _ in group)
        # Decoded together with all tokens before: some tokenizers drop the first space of a text.
        decoded = str(
            tokenizer.decode(tokens[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        yield decoded[len(before) :], kind
        before = decoded
    if len(ids) > len(tokens):
        yield f"{len(ids) - len(tokens):,} tokens not shown", "omitted"


def _plain_parts(record: PreferenceRecord) -> list[ShownPart]:
    texts = plain_texts(record)
    prompt = "\n\n".join(f"{role}: {content}" for role, content in texts.turns)
    named: list[tuple[str, str, float | None]] = [("prompt", prompt, None)]
    named += [(name, texts.responses[index], score) for index, name, score in _names(record)]
    omitted = ("further characters not shown", "omitted")
    return [
        ShownPart(
            name, [(text[:_MAX_CHARACTERS], ""), *[omitted] * (len(text) > _MAX_CHARACTERS)], score=score
        )
        for name, text, score in named
    ]
