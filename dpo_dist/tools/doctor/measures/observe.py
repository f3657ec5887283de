"""Collect the facts about each record, in worker processes; the report is made from these facts."""

import re
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations, islice

from dpo_dist.data import (
    BadRecord,
    ChatTemplate,
    DataConfig,
    EncodedExample,
    ImageFile,
    ImageProcessor,
    Origin,
    Part,
    PreferenceRecord,
    UnusableRecordError,
    encode_record,
    prompt_hash,
)
from dpo_dist.data.images import decode_image
from dpo_dist.data.text.escape import any_of
from dpo_dist.foundation.types import Tokenizer
from dpo_dist.tools.doctor.measures.texts import (
    Texts,
    calls_in,
    differences,
    measure_features,
    plain_texts,
    text_names,
)
from dpo_dist.tools.doctor.rules import RULE_BY_KIND

SIDES = ("prompt", "chosen", "rejected")
Lengths = tuple[int, int, int]
"""A number for each of `SIDES`; -1 for a response that is missing."""

_CUT = {"prompt_truncated", "response_truncated"}
# Most preferences of one ranking that are compared with other records.
_MAX_PREFERENCES = 64


@dataclass(frozen=True)
class PairFacts:
    """Facts about the form of a record's first and last response, or of its labelled response."""

    record: int  # the record's key, by which a sample is drawn
    prompt: int  # the prompt's key
    differences: dict[str, float]  # `texts.differences`, with `tokens` in place of `characters` if encoded
    side: str | None = None  # of a labelled response, whose features are in `differences`
    is_call: bool = False  # a tool call against a text, or a labelled call: the form is the preference itself


@dataclass(eq=False, slots=True)
class RecordFacts:
    """Facts about a record; only a readable record has those after `detail`."""

    origin: Origin
    dropped: str | None = None  # why training drops the record
    detail: str = ""  # of that reason, without texts
    is_readable: bool = False
    is_held_out: bool = False  # whether `data.eval_share` draws the record for evaluation
    names: tuple[str, ...] = ()  # rules that it breaks, and their kinds
    characters: Lengths = (0, 0, -1)
    tokens: Lengths | None = None  # before anything is cut; None: not encoded
    of_scorers: dict[str, int] = field(default_factory=dict)  # tokens of their own prompts, in the record
    cut: Lengths = (0, 0, 0)  # tokens that the limits cut from each side of a kept record
    changed: dict[str, int] = field(default_factory=dict)  # what encoding changes
    examples: int = 1  # into which encoding makes it
    pair: PairFacts | None = None  # None: a single response
    # Keys, by which records are compared.
    prompt: int = 0  # ignores case and white space
    record: int = 0  # of the prompt and all responses
    hash: int = 0  # `prompts.prompt_hash`
    preferences: tuple[int, ...] = ()  # that of the opposite differs in the lowest bit


class Observer:
    """Collects facts about records, also about their tokens if there is a tokenizer; can be pickled."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: "Tokenizer | None",
        processor: ImageProcessor | None = None,
    ):
        self._config = config
        self._without_limits = self._config.without_limits()
        self._tokenizer = tokenizer
        self._processor = processor
        # Where a model reads only text, images do not distinguish prompts.
        self._reads_images = tokenizer is None or processor is not None
        self._held_out = Part.to_evaluate(config) if config.eval_share else None
        template = None
        special = []
        if tokenizer is not None:
            template = ChatTemplate(tokenizer, config.chat_template).text(with_tools=True)
            for token in tokenizer.all_special_tokens:
                if not token.isalnum() and not token.isspace():
                    special.append(token)
        self._omits_tools = template is not None and not re.search(r"\btools\b", template)
        self._special = any_of(special)

    def observe(self, records: Sequence[PreferenceRecord | BadRecord]) -> list[RecordFacts]:
        """Return the facts about each record. Raises ConfigError as encoding does."""
        facts = []
        for record in records:
            try:
                if isinstance(record, PreferenceRecord):
                    facts.append(self._facts(record))
                    continue
                bad = record
            except UnusableRecordError as fault:  # of an image
                bad = fault.as_bad_record(record.origin)
            facts.append(RecordFacts(bad.origin, bad.reason, bad.detail))
        return facts

    def _images(self, record: PreferenceRecord) -> Sequence[ImageFile]:
        return record.images if self._reads_images else ()

    def _is_held_out(self, prompt: int) -> bool:
        return self._held_out is not None and self._held_out.has(prompt)

    def _facts(self, record: PreferenceRecord) -> RecordFacts:
        files = self._images(record)
        hash_of_prompt = prompt_hash(record.prompt, files)
        digests = [file.digest.hex() for file in files]
        texts = plain_texts(record)
        for file in files:
            decode_image(file.read())  # raises UnusableRecordError
        prompt = texts.prompt
        responses = texts.responses
        side = record.labelled_side
        same_prompt = _same_prompt(texts, digests)
        prompt_key = text_key(same_prompt)
        parts = [same_prompt, *map(str.strip, responses)]
        if side is not None:
            parts.append(side)
        record_key = text_key(*parts)
        pair = None
        if side is not None or len(responses) > 1:
            pair = _pair_facts(record, texts, prompt_key, record_key)
        facts = RecordFacts(
            record.origin,
            is_readable=True,
            is_held_out=self._is_held_out(hash_of_prompt),
            characters=(len(prompt), *_ends(responses, side)),
            pair=pair,
            prompt=prompt_key,
            record=record_key,
            hash=hash_of_prompt,
            preferences=tuple(_preferences(record, responses, prompt_key)),
        )
        names = {*text_names(record, texts)}
        if any(map(self._special.search, (prompt, *responses))):
            names.add("special_token")
        if record.tools and self._omits_tools:
            names.add("tools_not_rendered")
        if self._tokenizer is not None:
            names |= self._encode(record, facts, self._tokenizer)
        rules = {RULE_BY_KIND[name] for name in names if name in RULE_BY_KIND}
        facts.names = tuple(sorted(names | rules))
        return facts

    def _encode(self, record: PreferenceRecord, facts: RecordFacts, tokenizer: Tokenizer) -> set[str]:
        """Add the facts about the record's tokens; return the names of faults in a kept record's tokens."""
        encoded = encode_record(record, self._config, tokenizer, self._processor)
        uncut = encoded
        if isinstance(encoded, BadRecord) or not _CUT.isdisjoint(encoded.example.changes):
            uncut = encode_record(record, self._without_limits, tokenizer, self._processor)
        if not isinstance(uncut, BadRecord):
            facts.tokens = _lengths(uncut.example, record.labelled_side)
            facts.of_scorers = {name: len(ids) for name, ids in uncut.example.scorer_prompts.items()}
        if facts.pair is not None:
            facts.pair.differences.pop("characters", None)
            best = uncut if isinstance(encoded, BadRecord) else encoded
            if not isinstance(best, BadRecord):
                counts = [int(mask.sum()) for mask in best.example.masks]
                other = 0 if facts.pair.side else counts[-1]
                if counts[0] != other:
                    facts.pair.differences["tokens"] = float(counts[0] - other)
        if isinstance(encoded, BadRecord):
            facts.dropped = encoded.reason
            facts.detail = encoded.detail
            return set()
        assert not isinstance(uncut, BadRecord)
        assert facts.tokens is not None
        before = facts.tokens
        after = _lengths(encoded.example, record.labelled_side)
        facts.cut = before[0] - after[0], before[1] - after[1], before[2] - after[2]
        facts.changed = dict(encoded.outcome.changed)
        facts.examples = len(encoded.ranks)
        start = uncut.example.prompt_ids[:2]
        bos = tokenizer.bos_token_id
        names = set(facts.changed)
        if bos is not None and start.tolist() == [bos, bos]:
            names.add("doubled_bos")
        special = set(tokenizer.all_special_ids)
        for ids in uncut.example.responses:
            if len(ids) > 1 and ids[-1] == ids[-2] and int(ids[-1]) in special:
                names.add("doubled_end")
        return names


def _pair_facts(record: PreferenceRecord, texts: Texts, prompt_key: int, record_key: int) -> PairFacts:
    first = texts.responses[0]
    last = texts.responses[-1]
    starts_with_call = bool(calls_in(record.responses[0]))
    if record.labelled_side is not None:
        form = measure_features(first)
        is_call = starts_with_call
    else:
        form = differences(first, last)
        is_call = starts_with_call != bool(calls_in(record.responses[-1]))
    return PairFacts(record_key, prompt_key, form, record.labelled_side, is_call)


def _lengths(encoded: EncodedExample, side: str | None) -> Lengths:
    return len(encoded.prompt_ids), *_ends(encoded.responses, side)


def _ends(responses: Sequence[Sized], side: str | None) -> tuple[int, int]:
    """Return the lengths of the chosen and the rejected response; -1 for one that is missing."""
    if side == "rejected":
        return -1, len(responses[0])
    rejected = len(responses[-1]) if len(responses) > 1 else -1
    return len(responses[0]), rejected


def _same_prompt(texts: Texts, images: Sequence[str]) -> str:
    """Return a text that is the same for prompts which differ only in case or white space."""
    turns = (f"{role}: {' '.join(turn.casefold().split())}" for role, turn in texts.turns)
    return "\n".join([*turns, *images])


def text_key(*texts: str) -> int:
    """Return a 64-bit key of texts; equal texts have equal keys."""
    digest = blake2b(digest_size=8)
    for text in texts:
        content = text.encode("utf-8", "replace")
        digest.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(digest.digest(), "little")


def _preferences(record: PreferenceRecord, responses: tuple[str, ...], prompt: int) -> Iterator[int]:
    """Yield the key of each preference, or of a label; that of its opposite differs in the lowest bit.

    Texts that differ only in case or white space have the same key; a text that occurs twice is ignored.
    """
    keys = [text_key(" ".join(response.casefold().split())) for response in responses]
    if record.labelled_side is not None:
        yield text_key(f"{prompt} {keys[0]}") & ~1 | (record.labelled_side == "chosen")
    scores = record.scores or tuple(range(len(keys), 0, -1))
    once = [index for index, key in enumerate(keys) if keys.count(key) == 1]
    for better, worse in islice(combinations(once, 2), _MAX_PREFERENCES):
        if scores[better] != scores[worse]:
            low, high = sorted((keys[better], keys[worse]))
            yield text_key(f"{prompt} {low} {high}") & ~1 | (keys[better] == high)
