"""Choose examples of findings for the doctor's page, and decode them.

The page shows these texts inert, and hides them at first.
"""

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from dpo_dist.data import BadRecord, DataConfig, DataSource, ImageProcessor, PreferenceRecord, TokenIds
from dpo_dist.data.encode import encode_pair
from dpo_dist.foundation.text import pluralize, without_secrets
from dpo_dist.foundation.types import Tokenizer
from dpo_dist.tools.doctor.measures.texts import plain_texts
from dpo_dist.tools.findings import Finding
from dpo_dist.tools.pages.blocks import Answers, Piece
from dpo_dist.tools.pages.thumbnails import shown_tokens, thumbnails

_EXAMPLES_PER_FINDING = 2
_MAX_RESPONSES = 4
_MAX_TOKENS, _MAX_CHARACTERS = 2000, 8000

_Part = tuple[str, str, Sequence[Piece]]
"""Name, notes and text of the prompt or of a response; a number of tokens is that before anything is cut."""


def show_pairs(
    config: DataConfig,
    tokenizer: "Tokenizer | None",
    findings: Sequence[Finding],
    processor: ImageProcessor | None = None,
) -> list[Answers]:
    """Return examples of the findings, in the order of the data.

    Without a tokenizer texts are shown as they are in the record.
    """
    rules: dict[str, list[str]] = {}
    for finding in findings:
        origins = ", ".join(finding.examples).split(", ") if finding.examples else []
        for origin in origins[:_EXAMPLES_PER_FINDING]:
            rules.setdefault(origin, []).append(finding.rule)
    pairs = []
    for source in [*config.train, *config.eval]:
        for record in _choose(DataSource(source).pinned(), rules):
            origin = str(record.origin)
            reason, (prompt, *responses) = _parts(record, config, tokenizer, processor)
            notes = [*dict.fromkeys(rules[origin]), *([f"dropped: {reason}"] if reason else []), prompt[1]]
            images = thumbnails(record.images)
            pairs.append(
                Answers(without_secrets(origin), "; ".join(filter(None, notes)), prompt[2], responses, images)
            )
    return pairs


def _choose(source: DataSource, origins: Collection[str]) -> Iterator[PreferenceRecord]:
    """Yield the records at these origins; the rest of a source after the last of them is not read."""
    folder = os.path.dirname(source.path.split("*", 1)[0])  # noqa: PTH120  (also of a URL)
    missing = {origin for origin in origins if folder in ("", ".") or origin.startswith(folder)}
    for record in source.records() if missing else ():
        origin = str(record.origin)
        if isinstance(record, PreferenceRecord) and origin in origins:
            yield record
        missing.discard(origin)
        if not missing:
            return


def _parts(
    record: PreferenceRecord,
    config: DataConfig,
    tokenizer: "Tokenizer | None",
    processor: ImageProcessor | None,
) -> tuple[str, list[_Part]]:
    """Return why a record is dropped, and its parts with all tokens, also those that are cut."""
    if tokenizer is None:
        return "", _plain_parts(record)
    uncut = encode_pair(record, config.without_limits(), tokenizer, processor)
    example = encode_pair(record, config, tokenizer, processor)
    if isinstance(uncut, BadRecord):
        return uncut.reason, _plain_parts(record)
    note = ""
    if isinstance(example, BadRecord):
        note = example.reason
        example = uncut
    prompt = uncut.prompt_ids
    # Tokens in front, such as BOS, stay: those after them are cut.
    missing = len(prompt) - len(example.prompt_ids)
    front = 0
    while missing and (prompt[front + missing :] != example.prompt_ids[front:]).any():
        front += 1
    # The limits never cut an image, so what is cut has none.
    placeholder_id = None if processor is None else processor.placeholder_id
    ids = prompt[shown_tokens(prompt, uncut.images, placeholder_id)]
    is_trained = [False] * len(ids)
    cut = range(front, front + missing)
    parts: list[_Part] = [
        ("prompt", f"{len(prompt):,} tokens", list(_segments(ids, is_trained, cut, tokenizer)))
    ]
    for index, name, score in _names(record):
        ids = uncut.responses[index]
        is_trained = uncut.trained[index].tolist() if uncut.trained else [True] * len(ids)
        cut = range(len(example.responses[index]), len(ids))
        notes = f"{pluralize(len(ids), 'token')}{score}"
        parts.append((name, notes, list(_segments(ids, is_trained, cut, tokenizer))))
    return note, parts


def _names(record: PreferenceRecord) -> Iterator[tuple[int, str, str]]:
    """Yield index and name of each response to show, and its score in words."""
    count = len(record.responses)
    for index in range(min(count, _MAX_RESPONSES)):
        if record.labelled_side is not None:
            name = "good response" if record.labelled_side == "chosen" else "bad response"
        elif count == 2:
            name = ("chosen", "rejected")[index]
        else:
            name = f"response {index + 1} of {count}"
        score = "" if record.scores is None else f", score {record.scores[index]:g}"
        yield index, name, score


def _segments(ids: TokenIds, is_trained: Sequence[bool], cut: range, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield runs of tokens of one kind; a long part ends after its first tokens."""
    special = set(tokenizer.all_special_ids)
    for number, token in tokenizer.added_tokens_decoder.items():
        if str(token).strip():  # an added token of white space is ordinary text
            special.add(number)
    tokens = ids[:_MAX_TOKENS].tolist()
    kinds = []
    for place, token in enumerate(tokens):
        kind = "special " if token in special else ""
        if place in cut:
            kind += "cut"
        elif is_trained[place]:
            kind += "trained"
        kinds.append(kind)
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    stop = 0
    before = ""
    for kind, group in itertools.groupby(kinds):
        stop += len(list(group))
        # Decoded together with all tokens before: some tokenizers drop the first space of a text.
        text = str(decode(tokens[:stop]))
        yield text[len(before) :], kind
        before = text
    if len(ids) > len(tokens):
        yield f"{len(ids) - len(tokens):,} tokens not shown", "omitted"


def _plain_parts(record: PreferenceRecord) -> list[_Part]:
    texts = plain_texts(record)
    prompt = "\n\n".join(f"{role}: {content}" for role, content in texts.turns)
    parts: list[_Part] = [("prompt", "", _plain_segments(prompt))]
    for index, name, score in _names(record):
        parts.append((name, score.removeprefix(", "), _plain_segments(texts.responses[index])))
    return parts


def _plain_segments(text: str) -> list[Piece]:
    segments = [(text[:_MAX_CHARACTERS], "")]
    if len(text) > _MAX_CHARACTERS:
        segments.append(("further characters not shown", "omitted"))
    return segments
