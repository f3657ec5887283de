"""Records for the doctor's page, decoded from token ids: examples of findings, and a sample of each source.

The texts are data: the page shows them inert and hidden.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.data import DataConfig, SourceConfig, Truncation
from dpo_dist.data.encode import TokenIds, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.sources import pinned
from dpo_dist.insight.doctor.findings import Finding
from dpo_dist.insight.doctor.texts import texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLED_RECORDS = 2000
"""The sample of a source is drawn from this number of its first records."""
_EXAMPLES_OF_A_FINDING = 2
_MAX_RESPONSES = 4
_MAX_TOKENS, _MAX_CHARACTERS = 2000, 8000
_UNLIMITED = 2**30

Kind = StrEnum("Kind", ["text", "special", "omitted"])
"""Of a segment: ordinary text, special tokens, or a number of tokens or characters that are not shown."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind: whether the loss counts them, and whether the limits cut them."""

    text: str
    kind: Kind = Kind.text
    is_trained: bool = False
    is_cut: bool = False


@dataclass(frozen=True)
class Part:
    """The prompt or a response of a shown record, with its number of tokens before anything is cut."""

    name: str
    segments: tuple[Segment, ...]
    tokens: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class ShownPair:
    """One record of the page: the prompt, then the responses, best first."""

    origin: str
    rules: tuple[str, ...]  # of which it is an example; empty for one of the sample
    note: str  # the reason why it is dropped
    parts: tuple[Part, ...]


def show_pairs(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    findings: Sequence[Finding],
    count: int,
) -> list[ShownPair]:
    """Return examples of the findings, and of each source a sample of `count` records.

    Without a tokenizer texts are shown as they are in the record.
    """
    rules: dict[str, list[str]] = {}
    for finding in findings:
        origins = (origin for example in finding.examples for origin in example.split(", "))
        for origin in itertools.islice(origins, _EXAMPLES_OF_A_FINDING):
            rules.setdefault(origin, []).append(finding.rule)
    shown = []
    for source in [*config.train, *config.eval]:
        for record in _chosen(pinned(source, Path(config.cache)), rules, count):
            origin = str(record.origin)
            names = tuple(dict.fromkeys(rules.get(origin, ())))
            shown.append(ShownPair(origin, names, *_parts(record, config, tokenizer)))
    return shown


def _chosen(source: SourceConfig, rules: Mapping[str, Sequence[str]], count: int) -> list[PreferenceRecord]:
    """Return the records at the origins of `rules`, and a sample of the first ones."""
    examples: list[PreferenceRecord] = []
    others: list[PreferenceRecord] = []
    folder = str(Path(source.path.split("*", 1)[0]).parent)
    missing = {origin for origin in rules if folder == "." or origin.startswith(folder)}
    for number, record in enumerate(read_records(source)):
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
    record: PreferenceRecord, config: DataConfig, tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[str, tuple[Part, ...]]:
    """Return the reason why a record is dropped, and its parts with every token, also those that are cut."""
    if tokenizer is None:
        return "", _plain_parts(record)
    unlimited = replace(
        config, max_length=_UNLIMITED, max_prompt_length=None, truncation=Truncation.keep_start
    )
    whole, kept = encode_pair(record, tokenizer, unlimited), encode_pair(record, tokenizer, config)
    if isinstance(whole, BadRecord):
        return whole.reason, _plain_parts(record)
    note = ""
    if isinstance(kept, BadRecord):
        note, kept = kept.reason, whole
    prompt = whole.prompt_ids
    cut = _cut_range(prompt, kept.prompt_ids)
    parts = [_part("prompt", prompt, [False] * len(prompt), cut, tokenizer)]
    for index, name, score in _names(record):
        ids = whole.responses[index]
        trained = whole.trained[index].tolist() if whole.trained else [True] * len(ids)
        cut = range(len(kept.responses[index]), len(ids))
        parts.append(_part(name, ids, trained, cut, tokenizer, score))
    return note, tuple(parts)


def _names(record: PreferenceRecord) -> Iterator[tuple[int, str, float | None]]:
    """Yield the index, the name and the score of each response that is shown."""
    count = len(record.responses)
    shown = range(count) if count <= _MAX_RESPONSES else (*range(_MAX_RESPONSES - 1), count - 1)
    for index in shown:
        name = ("chosen", "rejected")[index] if count == 2 else f"response {index + 1} of {count}"
        yield index, name, record.scores[index] if record.scores is not None else None


def _cut_range(whole: TokenIds, kept: TokenIds) -> range:
    """Return the places of a prompt's tokens that are cut: after the tokens that stay in front (BOS)."""
    missing, front = len(whole) - len(kept), 0
    while missing and front < len(kept) and not (whole[front + missing :] == kept[front:]).all():
        front += 1
    return range(front, front + missing)


def _part(
    name: str,
    ids: TokenIds,
    is_trained: Sequence[bool],
    cut: range,
    tokenizer: "PreTrainedTokenizerBase",
    score: float | None = None,
) -> Part:
    """Return runs of tokens with equal marks; of a long part, its ends only."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    special = added | set(tokenizer.all_special_ids)  # added white space is ordinary text
    tokens, half = ids.tolist(), _MAX_TOKENS // 2
    marks = [
        (
            Kind.special if token in special else Kind.text,
            is_trained[place] and place not in cut,
            place in cut,
        )
        for place, token in enumerate(tokens)
    ]
    if len(tokens) <= _MAX_TOKENS:
        return Part(name, tuple(_runs(tokens, marks, tokenizer)), len(tokens), score)
    start = _runs(tokens[:half], marks[:half], tokenizer)
    end = _runs(tokens[-half:], marks[-half:], tokenizer)
    omitted = Segment(f"{len(tokens) - 2 * half:,} tokens", Kind.omitted)
    return Part(name, (*start, omitted, *end), len(tokens), score)


def _runs(
    ids: Sequence[int], marks: Sequence[tuple[Kind, bool, bool]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Segment]:
    stop, before = 0, ""
    for mark, group in itertools.groupby(marks):
        stop += sum(1 for _ in group)
        # With the tokens before it: alone it would lose its first space in some tokenizers.
        decoded = str(
            tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        yield Segment(decoded[len(before) :], *mark)
        before = decoded


def _plain_parts(record: PreferenceRecord) -> tuple[Part, ...]:
    """Return the texts of a record that is not encoded."""
    texts = texts_of(record)
    return (
        Part("prompt", _plain("\n\n".join(f"{role}: {content}" for role, content in texts.turns))),
        *(Part(name, _plain(texts.responses[index]), None, score) for index, name, score in _names(record)),
    )


def _plain(text: str) -> tuple[Segment, ...]:
    if len(text) <= _MAX_CHARACTERS:
        return (Segment(text),)
    half = _MAX_CHARACTERS // 2
    omitted = Segment(f"{len(text) - 2 * half:,} characters", Kind.omitted)
    return Segment(text[:half]), omitted, Segment(text[-half:])
