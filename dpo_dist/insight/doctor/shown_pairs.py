"""Records for the doctor's page, decoded from token ids: examples of findings, and a sample of each source.

The texts are data: the page shows them inert and hidden.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_dist.config.data import DataConfig, SourceConfig, Truncation
from dpo_dist.data.encode import EncodedExample, TokenIds, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, Dialogue, Message, PreferenceRecord, Prompt, Response
from dpo_dist.data.sources import pinned
from dpo_dist.data.turns import Mask
from dpo_dist.insight.doctor.findings import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SAMPLED_RECORDS = 2000
"""The sample of a source is drawn from this number of its first records."""

_SEED = 0
_EXAMPLES_OF_A_FINDING = 2
_MAX_RESPONSES = 4
_MAX_TOKENS = 2000
_MAX_CHARACTERS = 8000
_UNLIMITED = 2**30

Kind = StrEnum("Kind", ["text", "special", "omitted"])
"""Of a segment: ordinary text, special tokens, or a number of tokens or characters that are not shown."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind.

    Attributes:
        text: decoded; for `omitted` a number with its unit.
        kind: of the segment.
        is_trained: whether the loss counts these tokens.
        is_cut: whether `data.max_length` or `data.max_prompt_length` cuts them.
    """

    text: str
    kind: Kind = Kind.text
    is_trained: bool = False
    is_cut: bool = False


@dataclass(frozen=True)
class Part:
    """The prompt or a response of a shown record.

    Attributes:
        name: `prompt`, `chosen`, `rejected`, `response 2 of 4`, ...
        segments: its content in order.
        tokens: number of tokens, before anything is cut; None without a tokenizer.
        score: of the response, if the record has scores.
    """

    name: str
    segments: tuple[Segment, ...]
    tokens: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class ShownPair:
    """One record of the page.

    Attributes:
        origin: ``file:line``.
        rules: rules of which it is an example; empty for one of the sample.
        note: the reason why it is dropped; empty for a kept one.
        parts: the prompt, then the responses, best first.
    """

    origin: str
    rules: tuple[str, ...]
    note: str
    parts: tuple[Part, ...]


def show_pairs(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    findings: Sequence[Finding],
    count: int,
) -> list[ShownPair]:
    """Return examples of the findings, and of each source a sample of `count` records.

    Args:
        config: of the data.
        tokenizer: of the policy; None: texts are shown as they are in the record.
        findings: their examples name the records.
        count: size of the sample of each source.
    """
    rules: dict[str, list[str]] = {}
    for finding in findings:
        for origin in itertools.islice(_origins(finding), _EXAMPLES_OF_A_FINDING):
            rules.setdefault(origin, []).append(finding.rule)
    shown = []
    for source in [*config.train, *config.eval]:
        chosen = _chosen(pinned(source, Path(config.cache)), rules, count, np.random.default_rng(_SEED))
        for record in sorted(chosen, key=lambda record: str(record.origin) not in rules):
            names = tuple(dict.fromkeys(rules.get(str(record.origin), ())))
            shown.append(_shown(record, names, config, tokenizer))
    return shown


def _origins(finding: Finding) -> Iterator[str]:
    for example in finding.examples:
        yield from example.split(", ")


def _chosen(
    source: SourceConfig, rules: Mapping[str, Sequence[str]], count: int, chance: np.random.Generator
) -> list[PreferenceRecord]:
    """Return the records at the origins of `rules`, and a sample of the first ones (reservoir sampling)."""
    examples: list[PreferenceRecord] = []
    sample: list[PreferenceRecord] = []
    missing = {origin for origin in rules if _may_be_of(source, origin)}
    for number, record in enumerate(read_records(source)):
        missing.discard(str(record.origin))
        if isinstance(record, PreferenceRecord):
            if str(record.origin) in rules:
                examples.append(record)
            elif number < SAMPLED_RECORDS:
                if len(sample) < count:
                    sample.append(record)
                elif (place := int(chance.integers(number + 1))) < count:
                    sample[place] = record
        if number >= SAMPLED_RECORDS and not missing:
            break
    return examples + sample


def _may_be_of(source: SourceConfig, origin: str) -> bool:
    """Return whether a record of `source` may have this origin: a file in the folder of its path."""
    folder = str(Path(source.path.split("*", 1)[0]).parent)
    return folder == "." or origin.startswith(folder)


def _shown(
    record: PreferenceRecord,
    rules: tuple[str, ...],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> ShownPair:
    origin = str(record.origin)
    if tokenizer is None:
        return ShownPair(origin, rules, "", _plain_parts(record))
    unlimited = replace(
        config, max_length=_UNLIMITED, max_prompt_length=None, truncation=Truncation.keep_start
    )
    whole = encode_pair(record, tokenizer, unlimited)
    if isinstance(whole, BadRecord):
        return ShownPair(origin, rules, whole.reason, _plain_parts(record))
    kept = encode_pair(record, tokenizer, config)
    note = kept.reason if isinstance(kept, BadRecord) else ""
    return ShownPair(
        origin,
        rules,
        note,
        _token_parts(record, whole, whole if isinstance(kept, BadRecord) else kept, tokenizer),
    )


def _names(responses: int) -> Iterator[tuple[int, str]]:
    """Yield the index and the name of each response that is shown."""
    if responses <= 2:
        yield from list(enumerate(("chosen", "rejected") if responses == 2 else ("response",)))
        return
    shown = range(responses) if responses <= _MAX_RESPONSES else (*range(_MAX_RESPONSES - 1), responses - 1)
    for index in shown:
        yield index, f"response {index + 1} of {responses}"


def _token_parts(
    record: PreferenceRecord,
    whole: EncodedExample,
    kept: EncodedExample,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[Part, ...]:
    """Return the parts with every token, also those that `kept` lacks."""
    special = _special_ids(tokenizer)
    prompt, first, last = list(map(int, whole.prompt_ids)), *_cut_range(whole.prompt_ids, kept.prompt_ids)
    marks = [(token in special, False, first <= index < last) for index, token in enumerate(prompt)]
    parts = [Part("prompt", _segments(prompt, marks, tokenizer), len(prompt))]
    for index, name in _names(len(whole.responses)):
        ids = list(map(int, whole.responses[index]))
        used = len(kept.responses[index])
        trained = _trained(whole.trained, index, len(ids))
        marks = [
            (token in special, trained[place] and place < used, place >= used)
            for place, token in enumerate(ids)
        ]
        score = record.scores[index] if record.scores is not None else None
        parts.append(Part(name, _segments(ids, marks, tokenizer), len(ids), score))
    return tuple(parts)


def _trained(masks: Sequence[Mask], index: int, tokens: int) -> list[bool]:
    return [bool(each) for each in masks[index]] if masks else [True] * tokens


def _cut_range(whole: TokenIds, kept: TokenIds) -> tuple[int, int]:
    """Return the range of a prompt's tokens that are cut: after the tokens that stay in front (BOS)."""
    missing = len(whole) - len(kept)
    if missing <= 0:
        return 0, 0
    front = 0
    while front < len(kept) and not (whole[front + missing :] == kept[front:]).all():
        front += 1
    return front, front + missing


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of special and added tokens; added white space is ordinary text."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    return added | set(tokenizer.all_special_ids)


def _segments(
    ids: Sequence[int], marks: Sequence[tuple[bool, bool, bool]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Segment, ...]:
    """Return runs of tokens with equal marks (special, trained, cut); of a long part, its ends only."""
    half = _MAX_TOKENS // 2
    if len(ids) > _MAX_TOKENS:
        omitted = Segment(f"{len(ids) - 2 * half:,} tokens", Kind.omitted)
        ends = (ids[:half], marks[:half]), (ids[-half:], marks[-half:])
        start, stop = (tuple(_runs(*end, tokenizer)) for end in ends)
        return (*start, omitted, *stop)
    return tuple(_runs(ids, marks, tokenizer))


def _runs(
    ids: Sequence[int], marks: Sequence[tuple[bool, bool, bool]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Segment]:
    before, stop = "", 0
    for (is_special, is_trained, is_cut), group in itertools.groupby(marks):
        start, stop = stop, stop + sum(1 for _ in group)
        kind = Kind.special if is_special else Kind.text
        # A run decoded by itself would lose its first space in some tokenizers.
        decoded = _decode(ids[:stop], tokenizer)
        alone = not decoded.startswith(before)
        text = _decode(ids[start:stop], tokenizer) if alone else decoded[len(before) :]
        before = decoded
        yield Segment(text, kind, is_trained, is_cut)


def _decode(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _plain_parts(record: PreferenceRecord) -> tuple[Part, ...]:
    """Return the texts of a record that is not encoded."""
    parts = [Part("prompt", _plain(_prompt_text(record.prompt)))]
    for index, name in _names(len(record.responses)):
        score = record.scores[index] if record.scores is not None else None
        parts.append(Part(name, _plain(_response_text(record.responses[index])), None, score))
    return tuple(parts)


def _plain(text: str) -> tuple[Segment, ...]:
    if len(text) <= _MAX_CHARACTERS:
        return (Segment(text),)
    half = _MAX_CHARACTERS // 2
    omitted = Segment(f"{len(text) - 2 * half:,} characters", Kind.omitted)
    return Segment(text[:half]), omitted, Segment(text[-half:])


def _prompt_text(prompt: Prompt) -> str:
    match prompt:
        case str():
            return prompt
        case Dialogue():
            return prompt.text
        case _:
            return _turns(prompt)


def _response_text(response: Response) -> str:
    return response if isinstance(response, str) else _turns(response)


def _turns(messages: Iterable[Message]) -> str:
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)
