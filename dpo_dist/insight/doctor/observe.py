"""Observe a chunk of records in a worker process: compact facts, from which the report is made."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import combinations, islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data import DataConfig, OnBadRecord, Truncation
from dpo_dist.data.counts import Outcome
from dpo_dist.data.encode import TokenIds, encode_chunk
from dpo_dist.data.prompts import eval_part, prompt_hash
from dpo_dist.data.records import BadRecord, Origin, PreferenceRecord
from dpo_dist.data.store import EncodedChunk
from dpo_dist.data.template import any_of
from dpo_dist.insight.doctor.benchmarks import Benchmark
from dpo_dist.insight.doctor.features import edge_words, side_features
from dpo_dist.insight.doctor.findings import SIDES
from dpo_dist.insight.doctor.rules import RULE_OF
from dpo_dist.insight.doctor.texts import Signature, Texts, signature, text_names, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Records = Sequence[PreferenceRecord | BadRecord]
Lengths = tuple[int, int, int]
"""Of prompt, first and last response; -1 for a missing rejected one."""

SHOWN_ORIGINS = 20
# More tokens than any record has.
_NO_LIMIT = 2**31 - 1
_CUT = ("prompt_truncated", "response_truncated")
# With these reasons a record is encoded but too long.
_TOO_LONG = {
    "too_long",
    "prompt_fills_max_length",
    "response_fills_max_length",
    "identical_after_truncation",
}
# Of a ranking, at most so many preferences are compared with those of other records.
_MAX_PREFERENCES = 64
_HEAD = 300
_NUMBER = re.compile(r"\d+")


class Named:
    """Number of records by name, with the origins of the first ones."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, name: str, origin: Origin) -> None:
        """Count a record under `name`."""
        self.counts[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < SHOWN_ORIGINS:
            examples.append(str(origin))

    def update(self, later: "Named") -> None:
        """Add the counts of the following records."""
        self.counts.update(later.counts)
        for name, origins in later.examples.items():
            examples = self.examples.setdefault(name, [])
            examples += origins[: SHOWN_ORIGINS - len(examples)]


@dataclass(eq=False)
class TokenFacts:
    """Facts about encoded records.

    Attributes:
        sums: records with an example (`kept`), those of them that `data.eval_share` draws for evaluation
            (`held_out`), examples (`pairs`); `tokens` of all responses, each with its prompt, `unique_tokens`
            with each prompt counted once per record, `response_tokens`, and the `trained_tokens` of them;
            records of which a side is cut (`SIDE cut`) and tokens cut from them (`SIDE cut_tokens`).
        changed: changes made by encoding, by kind.
        lengths: tokens of each record before anything is cut, also of those dropped because of their length.
    """

    sums: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    lengths: list[Lengths] = field(default_factory=list)

    def add(self, later: "TokenFacts") -> None:
        """Add the facts about the following records."""
        self.sums.update(later.sums)
        self.changed.update(later.changed)
        self.lengths += later.lengths


@dataclass(frozen=True, eq=False)
class PairFacts:
    """Facts about the first and the last response of a record, kept for a sample of the records.

    Attributes:
        features: float32 [2, features].
        words: `features.edge_words`.
        prompt: key of the prompt.
        heads: the start of the prompt's last turn and of the two responses.
        scores: nan without scores.
    """

    features: npt.NDArray[np.float32]
    words: tuple[tuple[str, ...], tuple[str, ...]]
    prompt: int
    heads: tuple[str, str, str]
    scores: tuple[float, float]


@dataclass(frozen=True, eq=False)
class RecordKeys:
    """Keys of a readable record, of its prompt and of the prompt's numbers, to compare it with all others.

    Attributes:
        hash: `prompts.prompt_hash` of the prompt.
        is_held_out: whether `data.eval_share` draws the record for evaluation.
        preferences: key of each preference, and of the opposite one.
        signatures: uint32 [2, 64], MinHash of the prompt and of all responses.
        benchmark: origin of a benchmark item with which it overlaps, or None.
    """

    origin: Origin
    prompt: int
    record: int
    numbers: int
    hash: int
    is_held_out: bool
    preferences: tuple[tuple[int, int], ...]
    signatures: Signature
    benchmark: str | None


@dataclass(eq=False)
class Observed:
    """Facts about consecutive records of one source.

    Attributes:
        names: readable records by the rules that they break, by the kinds of these, and by properties.
        dropped: dropped records by reason.
        details: for each reason, details of the first record, without texts.
        tokens: None without a tokenizer.
        pairs: of the records with at least two responses.
    """

    read: int
    names: Named = field(default_factory=Named)
    dropped: Named = field(default_factory=Named)
    details: dict[str, str] = field(default_factory=dict)
    tokens: TokenFacts | None = None
    characters: list[Lengths] = field(default_factory=list)
    records: list[RecordKeys] = field(default_factory=list)
    pairs: list[PairFacts] = field(default_factory=list)


class Observer:
    """Observes chunks of records, encoded if there is a tokenizer; can be sent to other processes."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: "PreTrainedTokenizerBase | None",
        benchmark: Benchmark | None = None,
    ):
        self._config = replace(config, on_bad_record=OnBadRecord.drop)
        self._tokenizer = tokenizer
        self._benchmark = benchmark
        self._held_out = eval_part(config) if config.eval_share else None
        special = tokenizer.all_special_tokens if tokenizer is not None else ()
        self._special = any_of(token for token in special if not token.isalnum() and not token.isspace())

    def observe(self, records: Records) -> Observed:
        """Return the facts about consecutive records of one source. Raises ConfigError as encoding does."""
        observed = Observed(len(records))
        readable: list[PreferenceRecord] = []
        names: list[set[str]] = []
        for record in records:
            if isinstance(record, BadRecord):
                observed.dropped.add(record.reason, record.origin)
                observed.details.setdefault(record.reason, record.detail)
            else:
                readable.append(record)
                names.append(self._observe_texts(record, observed))
        if self._tokenizer is not None and readable:
            self._encode(readable, names, self._tokenizer, observed)
        for record, found in zip(readable, names, strict=True):
            for name in sorted(found | {RULE_OF[name] for name in found if name in RULE_OF}):
                observed.names.add(name, record.origin)
        return observed

    def _observe_texts(self, record: PreferenceRecord, observed: Observed) -> set[str]:
        """Add the facts about a record's texts; return the names under which it is counted."""
        texts = texts_of(record)
        prompt, responses = texts.prompt, texts.responses
        prompt_key, prompt_number = text_key(texts.prompt_identity), prompt_hash(record.prompt)
        names = {*text_names(record, texts), *_record_names(record)}
        if any(map(self._special.search, (prompt, *responses))):
            names.add("special_token")
        observed.records.append(
            RecordKeys(
                origin=record.origin,
                prompt=prompt_key,
                record=text_key(texts.prompt_identity, *map(str.strip, responses)),
                numbers=text_key(*_NUMBER.findall(prompt)),
                hash=prompt_number,
                is_held_out=self._held_out is not None and self._held_out.has(prompt_number),
                preferences=tuple(_preferences(record, responses, prompt_key)),
                signatures=np.stack([signature(prompt), signature("\n".join(responses))]),
                benchmark=None if self._benchmark is None else self._benchmark.item_in(prompt, *responses),
            )
        )
        rejected = len(responses[-1]) if len(responses) > 1 else -1
        observed.characters.append((len(prompt), len(responses[0]), rejected))
        if len(responses) > 1:
            observed.pairs.append(_pair_facts(record, texts, prompt_key))
        return names

    def _encode(
        self,
        records: Sequence[PreferenceRecord],
        names: Sequence[set[str]],
        tokenizer: "PreTrainedTokenizerBase",
        observed: Observed,
    ) -> None:
        """Add the facts about the records' tokens, and names of those that are kept."""
        chunk = encode_chunk(records, self._config, tokenizer)
        observed.tokens = facts = _token_facts(records, names, chunk, self._config, tokenizer)
        for outcome, record, keys in zip(chunk.outcomes, records, observed.records, strict=True):
            if outcome.dropped is not None:
                observed.dropped.add(outcome.dropped, record.origin)
            elif keys.is_held_out:
                facts.sums["held_out"] += 1
        for _index, bad in chunk.bad:
            observed.details.setdefault(bad.reason, bad.detail)


def _token_facts(
    records: Sequence[PreferenceRecord],
    names: Sequence[set[str]],
    chunk: EncodedChunk,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> TokenFacts:
    facts = TokenFacts()
    tokens, ends = chunk.arrays["piece_tokens"], chunk.arrays["pair_pieces"]
    facts.sums["response_tokens"] = int(tokens.sum() - tokens[np.insert(ends, 0, 0)[:-1]].sum())
    facts.sums["trained_tokens"] = int(chunk.arrays["trained_tokens"].sum())
    pieces = _pieces(chunk)
    long = [index for index, outcome in enumerate(chunk.outcomes) if _is_cut(outcome)]
    whole_config = replace(config, max_length=_NO_LIMIT, max_prompt_length=None, truncation=Truncation.drop)
    whole_chunk = encode_chunk([records[index] for index in long], whole_config, tokenizer)
    whole_pieces = dict(zip(long, _pieces(whole_chunk), strict=True))
    for index, (outcome, kept) in enumerate(zip(chunk.outcomes, pieces, strict=True)):
        whole = whole_pieces.get(index, kept)
        if not whole:
            continue
        lengths = _side_lengths(whole)
        facts.lengths.append(lengths)
        if outcome.dropped is not None:
            continue
        facts.changed.update(dict(outcome.changed))
        names[index].update(dict(outcome.changed), _token_names(whole, tokenizer))
        prompt, *responses = map(len, kept)
        unshared = prompt * len(responses) + sum(responses)
        facts.sums.update(kept=1, pairs=outcome.pairs, tokens=unshared, unique_tokens=prompt + sum(responses))
        for side, before, after in zip(SIDES, lengths, _side_lengths(kept), strict=True):
            if before > after:
                facts.sums.update({f"{side} cut": 1, f"{side} cut_tokens": before - after})
    return facts


def _is_cut(outcome: Outcome) -> bool:
    return outcome.dropped in _TOO_LONG or any(name in _CUT for name, _times in outcome.changed)


def _pieces(chunk: EncodedChunk) -> list[list[TokenIds]]:
    """Return the prompt and the different responses of each record, best first; empty if it was dropped."""
    found: list[list[TokenIds]] = []
    example = piece = 0
    for outcome in chunk.outcomes:
        spans: dict[int, int] = {}
        for _ in range(outcome.pairs):
            end = int(chunk.arrays["pair_pieces"][example])
            for at in range(piece, end):
                # Two responses of no tokens can start at the same offset; neither trains anything.
                spans[int(chunk.arrays["piece_starts"][at])] = int(chunk.arrays["piece_tokens"][at])
            example, piece = example + 1, end
        ids = chunk.arrays["ids"]
        found.append([ids[start : start + length] for start, length in sorted(spans.items())])
    return found


def _side_lengths(pieces: list[TokenIds]) -> Lengths:
    return len(pieces[0]), len(pieces[1]), len(pieces[-1]) if len(pieces) > 2 else -1


def _token_names(pieces: list[TokenIds], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    prompt, *responses = pieces
    if tokenizer.bos_token_id is not None and (prompt[:2] == tokenizer.bos_token_id).sum() > 1:
        yield "doubled_bos"
    special = set(tokenizer.all_special_ids)
    if any(len(ids) > 1 and ids[-1] == ids[-2] and int(ids[-1]) in special for ids in responses):
        yield "doubled_end"
    if any(len(ids) <= 2 for ids in responses):  # the last token ends the turn
        yield "one_token_response"


def text_key(*texts: str) -> int:
    """Return a 64-bit key of texts; equal texts have equal keys."""
    digest = blake2b(digest_size=8)
    for text in texts:
        content = text.encode("utf-8", "replace")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return int.from_bytes(digest.digest(), "little")


def _pair_facts(record: PreferenceRecord, texts: Texts, prompt_key: int) -> PairFacts:
    chosen, rejected = texts.responses[0], texts.responses[-1]
    scores = record.scores or (np.nan, np.nan)
    return PairFacts(
        features=np.stack([side_features(chosen), side_features(rejected)]),
        words=(edge_words(chosen), edge_words(rejected)),
        prompt=prompt_key,
        heads=(texts.turns[-1][1][:_HEAD], chosen[:_HEAD], rejected[:_HEAD]),
        scores=(scores[0], scores[-1]),
    )


def _record_names(record: PreferenceRecord) -> Iterator[str]:
    if record.tools:
        yield "tools"
    if len(record.responses) > 2:
        yield "ranking"
    if len(record.responses) < 2:
        yield "completion"
        return
    yield "pair_or_ranking"
    if record.scores is not None:
        yield "scored"
        if record.scores[0] == record.scores[-1]:
            yield "score_ties"
        if record.scores[0] < record.scores[-1]:
            yield "score_inversions"


def _preferences(
    record: PreferenceRecord, responses: tuple[str, ...], prompt: int
) -> Iterator[tuple[int, int]]:
    """Yield the key of each preference between two responses and of its opposite.

    Texts that differ in case or white space only have the same key; one that a ranking has twice is ignored.
    """
    keys = [text_key(" ".join(response.casefold().split())) for response in responses]
    scores = record.scores or tuple(range(len(keys), 0, -1))
    once = [index for index, key in enumerate(keys) if keys.count(key) == 1]
    for better, worse in islice(combinations(once, 2), _MAX_PREFERENCES):
        if scores[better] != scores[worse]:
            preferred = text_key(f"{prompt} {keys[better]} {keys[worse]}")
            yield preferred, text_key(f"{prompt} {keys[worse]} {keys[better]}")
