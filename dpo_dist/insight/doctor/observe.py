"""Observe a chunk of records in a worker process: compact facts, from which the report is made."""

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import combinations, islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data import DataConfig, OnBadRecord, Truncation
from dpo_dist.data.counts import Outcome
from dpo_dist.data.encode import TokenIds, encode_chunk
from dpo_dist.data.prompts import eval_part, prompt_hash
from dpo_dist.data.records import BadRecord, Origin, PreferenceRecord
from dpo_dist.data.store import EncodedChunk
from dpo_dist.data.template import any_of
from dpo_dist.insight.doctor.features import edge_words, side_features
from dpo_dist.insight.doctor.texts import Texts, text_faults, texts_of
from dpo_dist.insight.doctor.words import Benchmark, numbers_of, signature

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


class Names(Protocol):
    """Counts records by name."""

    def add(self, name: str, origin: Origin) -> None:
        """Count a record under `name`."""


@dataclass(eq=False)
class TokenFacts:
    """Facts about encoded records.

    Attributes:
        kept: records with at least one example.
        pairs: examples.
        changed: changes made by encoding, by kind.
        lengths: [encoded, 3], tokens of prompt, first and last response before anything is cut; -1 for a
            missing rejected one. Records that are dropped because of their length are included.
        cut: kept records of which a side is cut, by side.
        cut_tokens: tokens cut from these, by side.
        tokens: of all responses, each with its prompt, as trained.
        unique_tokens: with each prompt counted once per record.
        response_tokens: of the responses of all examples.
        trained_tokens: those of them that the loss counts.
    """

    kept: int = 0
    pairs: int = 0
    changed: Counter[str] = field(default_factory=Counter)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    cut: Counter[str] = field(default_factory=Counter)
    cut_tokens: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    unique_tokens: int = 0
    response_tokens: int = 0
    trained_tokens: int = 0


def token_facts(
    records: Sequence[PreferenceRecord],
    chunk: EncodedChunk,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    names: Names,
) -> TokenFacts:
    """Return the facts about `records`, which were encoded as `chunk`; count faults in `names`."""
    tokens, ends = chunk.arrays["piece_tokens"], chunk.arrays["pair_pieces"]
    facts = TokenFacts(
        response_tokens=int(tokens.sum() - tokens[np.insert(ends, 0, 0)[:-1]].sum()),
        trained_tokens=int(chunk.arrays["trained_tokens"].sum()),
    )
    pieces = _pieces(chunk)
    long = [index for index, outcome in enumerate(chunk.outcomes) if _is_cut(outcome)]
    whole_config = replace(config, max_length=_NO_LIMIT, max_prompt_length=None, truncation=Truncation.drop)
    whole_chunk = encode_chunk([records[index] for index in long], whole_config, tokenizer)
    whole_pieces = dict(zip(long, _pieces(whole_chunk), strict=True))
    for index, (record, outcome, kept) in enumerate(zip(records, chunk.outcomes, pieces, strict=True)):
        whole = whole_pieces.get(index, kept)
        if not whole:
            continue
        lengths = _side_lengths(whole)
        facts.lengths.append(lengths)
        if outcome.dropped is None:
            facts.kept += 1
            facts.pairs += outcome.pairs
            facts.changed.update(dict(outcome.changed))
            _add_cuts(facts, lengths, _side_lengths(kept))
            _name(record, whole, outcome, tokenizer, names)
            prompt, *responses = map(len, kept)
            facts.tokens += prompt * len(responses) + sum(responses)
            facts.unique_tokens += prompt + sum(responses)
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


def _side_lengths(pieces: list[TokenIds]) -> tuple[int, int, int]:
    return len(pieces[0]), len(pieces[1]), len(pieces[-1]) if len(pieces) > 2 else -1


def _add_cuts(facts: TokenFacts, whole: tuple[int, int, int], kept: tuple[int, int, int]) -> None:
    for side, before, after in zip(("prompt", "chosen", "rejected"), whole, kept, strict=True):
        if before > after:
            facts.cut[side] += 1
            facts.cut_tokens[side] += before - after


def _name(
    record: PreferenceRecord,
    pieces: list[TokenIds],
    outcome: Outcome,
    tokenizer: "PreTrainedTokenizerBase",
    names: Names,
) -> None:
    prompt, *responses = pieces
    for name, _times in outcome.changed:
        names.add(name, record.origin)
    bos = tokenizer.bos_token_id
    if bos is not None and (prompt[:2] == bos).sum() > 1:
        names.add("doubled_bos", record.origin)
    special = set(tokenizer.all_special_ids)
    if any(len(ids) > 1 and ids[-1] == ids[-2] and int(ids[-1]) in special for ids in responses):
        names.add("doubled_end", record.origin)
    # The last token ends the turn.
    if any(len(ids) <= 2 for ids in responses):
        names.add("one_token_response", record.origin)


Records = Sequence[PreferenceRecord | BadRecord]

SHOWN_ORIGINS = 20
# Of a ranking, at most so many preferences are compared with those of other records.
_MAX_PREFERENCES = 64
_HEAD = 300


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


@dataclass(frozen=True, eq=False)
class PairFacts:
    """Facts about one record with at least two responses, kept for a sample of the records.

    Attributes:
        features: float32 [2, features], of the first and the last response.
        words: `features.edge_words` of these.
        prompt: key of the prompt.
        heads: the start of the prompt's last turn and of the two responses.
        scores: of the two responses; nan without scores.
        longer_by: characters that the chosen response is longer.
        origin: of the record.
    """

    features: npt.NDArray[np.float32]
    words: tuple[tuple[str, ...], tuple[str, ...]]
    prompt: int
    heads: tuple[str, str, str]
    scores: tuple[float, float]
    longer_by: int
    origin: Origin


@dataclass(eq=False)
class Observed:
    """Facts about consecutive records of one source.

    Attributes:
        read: number of records.
        names: readable records by the names of their faults and properties.
        dropped: dropped records by reason.
        details: for each reason, details of the first record, without texts.
        tokens: facts from encoding; None without a tokenizer.
        origins: [readable], of the records that could be read.
        characters: int64 [readable, 3], of prompt, first and last response; -1 for a missing rejected one.
        prompts: uint64 [readable], key of the prompt.
        records: uint64 [readable], key of prompt and responses.
        numbers: uint64 [readable], key of the numbers in the prompt.
        hashes: uint64 [readable], `prompt_split.prompt_hash` of the prompt.
        held_out: [readable], whether `data.eval_share` draws the record for evaluation.
        kept_held_out: number of these that encoding keeps (without a tokenizer: all); None without a split.
        preferences: uint64 [preferences, 3], index of the readable record, key of the preference, and key
            of the opposite preference.
        signatures: uint32 [readable, 2, 64], MinHash of the prompt and of all responses.
        pairs: facts of the records with at least two responses.
        benchmark: records that overlap with a benchmark: index in `origins` and number of the item.
    """

    read: int
    names: Named = field(default_factory=Named)
    dropped: Named = field(default_factory=Named)
    details: dict[str, str] = field(default_factory=dict)
    tokens: TokenFacts | None = None
    origins: list[Origin] = field(default_factory=list)
    characters: list[tuple[int, int, int]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    kept_held_out: int | None = None
    preferences: list[tuple[int, int, int]] = field(default_factory=list)
    signatures: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    pairs: list[PairFacts] = field(default_factory=list)
    benchmark: list[tuple[int, int]] = field(default_factory=list)


class Observer:
    """Observes chunks of records; can be sent to other processes.

    Args:
        config: as for training; `on_bad_record` is ignored.
        tokenizer: None: nothing is encoded.
        benchmark: items to look for.
    """

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
        readable = []
        for record in records:
            if isinstance(record, BadRecord):
                observed.dropped.add(record.reason, record.origin)
                observed.details.setdefault(record.reason, record.detail)
            else:
                readable.append(record)
                self._observe_texts(record, observed)
        if self._held_out is not None:
            observed.kept_held_out = sum(observed.held_out)
        if self._tokenizer is not None and readable:
            self._encode(readable, self._tokenizer, observed)
        return observed

    def _encode(
        self, records: Sequence[PreferenceRecord], tokenizer: "PreTrainedTokenizerBase", observed: Observed
    ) -> None:
        chunk = encode_chunk(records, self._config, tokenizer)
        for outcome, record in zip(chunk.outcomes, records, strict=True):
            if outcome.dropped is not None:
                observed.dropped.add(outcome.dropped, record.origin)
        if observed.kept_held_out is not None:
            kept = [outcome.dropped is None for outcome in chunk.outcomes]
            observed.kept_held_out = sum(map(operator.and_, observed.held_out, kept))
        for _index, bad in chunk.bad:
            observed.details.setdefault(bad.reason, bad.detail)
        observed.tokens = token_facts(records, chunk, self._config, tokenizer, observed.names)

    def _observe_texts(self, record: PreferenceRecord, observed: Observed) -> None:
        texts = texts_of(record)
        prompt, responses = texts.prompt, texts.responses
        index, prompt_key = len(observed.origins), text_key(texts.prompt_identity)
        names = {*text_faults(record, texts), *_record_names(record)}
        if any(map(self._special.search, (prompt, *responses))):
            names.add("special_token")
        for name in names:
            observed.names.add(name, record.origin)
        observed.origins.append(record.origin)
        observed.prompts.append(prompt_key)
        observed.records.append(text_key(texts.prompt_identity, *map(str.strip, responses)))
        observed.numbers.append(text_key(*numbers_of(prompt)))
        observed.hashes.append(prompt_hash(record.prompt))
        observed.held_out.append(self._held_out is not None and self._held_out.has(observed.hashes[-1]))
        observed.preferences += _preferences(record, responses, prompt_key, index)
        observed.signatures.append(np.stack([signature(prompt), signature("\n".join(responses))]))
        rejected = len(responses[-1]) if len(responses) > 1 else -1
        observed.characters.append((len(prompt), len(responses[0]), rejected))
        if self._benchmark is not None:
            items = self._benchmark.items_in(prompt, *responses)
            observed.benchmark += [(index, item) for item in items]
        if len(responses) > 1:
            observed.pairs.append(_pair_facts(record, texts, prompt_key))


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
        longer_by=len(chosen) - len(rejected),
        origin=record.origin,
    )


def _record_names(record: PreferenceRecord) -> Iterator[str]:
    if record.tools:
        yield "tools"
    if record.template_arguments:
        yield "template_arguments"
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
    record: PreferenceRecord, responses: tuple[str, ...], prompt: int, index: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the key of each preference between two responses and of its opposite.

    Texts that differ in case or white space only have the same key; one that a ranking has twice is ignored.
    """
    keys = [text_key(" ".join(response.casefold().split())) for response in responses]
    scores = record.scores or tuple(range(len(keys), 0, -1))
    once = [index for index, key in enumerate(keys) if keys.count(key) == 1]
    for better, worse in islice(combinations(once, 2), _MAX_PREFERENCES):
        if scores[better] != scores[worse]:
            preferred = text_key(f"{prompt} {keys[better]} {keys[worse]}")
            yield index, preferred, text_key(f"{prompt} {keys[worse]} {keys[better]}")
