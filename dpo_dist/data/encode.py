"""Encode a preference record as token ids: one prompt, and the responses that continue it."""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dpo_dist.data.config import DataConfig, Truncation
from dpo_dist.data.counts import Outcome
from dpo_dist.data.example import Example, Mask, TokenIds
from dpo_dist.data.images import ExpandedImage, ImageProcessor
from dpo_dist.data.read.images import has_tag
from dpo_dist.data.read.plain import NUMBERS
from dpo_dist.data.records import (
    SCORERS,
    BadRecord,
    Dialogue,
    Message,
    PreferenceRecord,
    Record,
    UnusableRecordError,
    training_examples,
    turns_of,
)
from dpo_dist.data.text.render import AS_TURN, RenderedRecord, render_record, with_images
from dpo_dist.data.text.thoughts import DEFAULT_MARKS
from dpo_dist.data.text.tokenizer import TokenizerFacts, tokenizer_facts
from dpo_dist.data.text.turns import Span
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.types import Tokenizer

_SCORE_ID = 0
"""What stands behind a response, where the last token predicts its score; no model reads it."""


@dataclass(frozen=True, eq=False)
class EncodedExample(Example):
    """An example, with the changes that encoding made to its record."""

    images: tuple[ExpandedImage, ...] = ()
    changes: frozenset[str] = frozenset()  # names in counts.yaml
    truncated: tuple[bool, ...] = ()  # for each response, whether its end and its end-of-turn token were cut
    read_as: str = ""
    scorer_prompts: Mapping[str, TokenIds] = field(default_factory=dict)  # of scorers with another prompt


def encode_pair(
    record: PreferenceRecord,
    config: DataConfig,
    tokenizer: Tokenizer,
    processor: ImageProcessor | None = None,
    systems: Mapping[str, str] | None = None,
) -> EncodedExample | BadRecord:
    """Encode a record's responses as one example, as `encode_record`; the images are `ExpandedImage`."""
    facts = tokenizer_facts(tokenizer, config, with_tools=bool(record.tools))
    tokens = 0
    try:
        images, has_tags = _images(record, processor)
        rendered = render_record(record, facts, config)
        if processor is not None and images:
            rendered = with_images(rendered, images, facts, processor)
        prompt, responses, masks, is_resplit = _encoded(rendered, facts, config)
        prompt, prefix_length = facts.with_prefix(prompt, is_whole=rendered.is_whole)
        least = prefix_length
        if processor is not None:
            least += _tokens_from_images(
                prompt, responses, images, processor.placeholder_id, facts.special_ids
            )
        is_usable = len(prompt) > prefix_length and all(mask.any() for mask in masks)
        if is_usable and _are_distinct(responses):
            tokens = len(prompt) + max(map(len, responses))
        cut_prompt, cut_responses = _truncated(prompt, responses, prefix_length, least, config)
        pairs = zip(cut_responses, responses, strict=True)
        truncated = tuple(len(cut) < len(response) for cut, response in pairs)
        if not _are_distinct(cut_responses):
            step = "truncation" if any(truncated) else "encoding"
            raise UnusableRecordError(f"identical_after_{step}")
        masks = [mask[: len(ids)] for mask, ids in zip(masks, cut_responses, strict=False)]
        if not all(mask.any() for mask in masks):
            raise UnusableRecordError("no_trained_token", "the loss would count no token of a response")
        tokens = 0
        scorer_prompts = dict[str, TokenIds]()
        replaces_system = False
        is_scorer_resplit = False
        for scorer in SCORERS:
            system = (systems or {}).get(scorer)
            if system is not None and isinstance(record.prompt, str) and AS_TURN not in rendered.read_as:
                detail = f"{scorer}.system before a text that is no user's turn"
                raise UnusableRecordError("scorer_prompt_differs", detail)
            other, replaces = _read_by(scorer, record, system)
            replaces_system |= replaces
            if other is None:
                continue
            rendered_other = render_record(other, facts, config)
            if processor is not None and images:
                rendered_other = with_images(rendered_other, images, facts, processor)
            if rendered_other.responses != rendered.responses:
                detail = f"the template writes the responses differently after the {scorer}'s prompt"
                raise UnusableRecordError("scorer_prompt_differs", detail)
            longest = max(map(len, cut_responses))
            scorer_prompts[scorer], resplits = _scorer_ids(scorer, rendered_other, longest, facts, config)
            is_scorer_resplit |= resplits
    except UnusableRecordError as fault:
        return replace(fault.as_bad_record(record.origin), tokens=tokens)
    except RecursionError:
        return BadRecord(
            "template_rejected", record.origin, "tools, calls or arguments are nested too deeply"
        )
    has_change = {
        "boundary_resplit": is_resplit,
        "prompt_truncated": len(cut_prompt) < len(prompt),
        "response_truncated": any(truncated),
        "sides_exchanged": record.is_exchanged,
        "scores_contradict": record.scores is not None and record.scores[0] < record.scores[-1],
        "partly_trained": bool(masks),
        "image_tag_in_text": has_tags,
        "scorer_system_replaced": replaces_system,
        "scorer_boundary_resplit": is_scorer_resplit,
    }
    if config.for_scores:
        cut_responses = [[*ids, _SCORE_ID] for ids in cut_responses]
        masks = [np.arange(len(ids)) == len(ids) - 1 for ids in cut_responses]
    changes = [name for name, is_so in has_change.items() if is_so]
    return EncodedExample(
        np.array(cut_prompt, dtype=np.int32),
        tuple(np.array(ids, dtype=np.int32) for ids in cut_responses),
        tuple(masks),
        images,
        changes=rendered.changes.union(record.numbers, changes),
        truncated=truncated,
        read_as=rendered.read_as,
        scorer_prompts=scorer_prompts,
    )


def _read_by(
    scorer: str, record: PreferenceRecord, system: str | None
) -> tuple[PreferenceRecord | None, bool]:
    """Return the record as a scorer reads it, None if as the policy does; whether its own system went."""
    prompt = record.scorer_prompts.get(scorer, record.prompt)
    replaces = False
    if system is not None:
        turns = turns_of(prompt, "user")
        replaces = bool(turns) and turns[0].role == "system" and turns[0].content != system
        first = 1 if turns and turns[0].role == "system" else 0
        prompt = (Message("system", system), *turns[first:])
    if prompt == record.prompt:
        return None, False
    responses = record.responses
    if isinstance(record.prompt, Dialogue):  # whose responses the template gets without spaces around them
        responses = tuple(text.strip() if isinstance(text, str) else text for text in responses)
    return replace(record, prompt=prompt, responses=responses), replaces


def _scorer_ids(
    scorer: str,
    rendered: RenderedRecord,
    longest: int,
    facts: TokenizerFacts,
    config: DataConfig,
) -> tuple[TokenIds, bool]:
    """Return the ids of a scorer's prompt, and whether a response behind it would join its last token.

    Behind it stand the policy's ids of the responses, `longest` at most. It is never cut: what is cut may be
    what the scorer has to know.
    """
    ids, _, resplits = facts.encoder.encode_after(rendered.prompt, rendered.responses, keeps_boundary=True)
    ids, prefix_length = facts.with_prefix(ids, is_whole=rendered.is_whole)
    if len(ids) == prefix_length:
        raise UnusableRecordError("scorer_prompt_differs", f"the {scorer}'s prompt has no tokens")
    tokens = len(ids) + longest
    limit = config.max_scorer_length or config.max_length
    if tokens > limit:
        raise UnusableRecordError(
            "scorer_prompt_too_long", f"{tokens} tokens of the {scorer}, at most {limit}"
        )
    return np.array(ids, dtype=np.int32), resplits


def _are_distinct(responses: Sequence[Sequence[int]]) -> bool:
    return len(set(map(tuple, responses))) == len(responses)


def _images(
    record: PreferenceRecord, processor: ImageProcessor | None
) -> tuple[tuple[ExpandedImage, ...], bool]:
    """Return the images of a record, and whether a text has a tag of images that is no place of one.

    Raises UnusableRecordError, also for a tag in the prompt of a record without images.
    """
    if record.images and processor is None:
        raise UnusableRecordError("media_not_read", "model.images is null", ("images",))
    prompt = [turn.content for turn in turns_of(record.prompt)]
    responses = [[turn.content for turn in turns_of(response)] for response in record.responses]
    if processor is None:
        return (), False
    if not processor.reads_several and len(record.images) > 1:
        raise UnusableRecordError(
            "several_images", f"{len(record.images)} images; this model reads one in a prompt"
        )
    images = tuple(processor.expanded(image.read()) for image in record.images)
    in_prompt = any(has_tag(text, processor.tokens) for text in prompt)
    if in_prompt and not images:
        raise UnusableRecordError("image_count", "a tag of images, and no image", record.unread)
    return images, in_prompt or any(has_tag(text, processor.tokens) for text in itertools.chain(*responses))


def _tokens_from_images(
    prompt: list[int],
    responses: list[list[int]],
    images: Sequence[ExpandedImage],
    placeholder_id: int,
    special_ids: Collection[int],
) -> int:
    """Return how many of the prompt's tokens are from its first image on; 0 without images.

    Raises UnusableRecordError: there is not a placeholder for each feature of the images.
    """
    expected = sum(image.tokens for image in images)
    in_prompt = prompt.count(placeholder_id)
    placeholders = in_prompt + sum(ids.count(placeholder_id) for ids in responses)
    if not in_prompt == placeholders == expected:
        detail = f"{placeholders} placeholders in the tokens, for {len(images)} images of {expected}"
        raise UnusableRecordError("image_count", detail)
    if not images:
        return 0
    start = prompt.index(placeholder_id)
    while start and prompt[start - 1] in special_ids:  # such as the token before the placeholders
        start -= 1
    return len(prompt) - start


def _encoded(
    rendered: RenderedRecord, facts: TokenizerFacts, config: DataConfig
) -> tuple[list[int], list[list[int]], list[Mask], bool]:
    """Return the prompt's ids, each response's ids and mask, and whether a response was tokenised alone.

    A mask marks the tokens that the loss counts; there are no masks if the loss counts all tokens.
    """
    parts = [] if config.for_scores else _untrained_parts(facts, config)
    counted = [
        _counted_characters(rendered.prompt, text, turns, parts)
        for text, turns in zip(rendered.responses, rendered.counted, strict=True)
    ]
    has_masks = counted != [None] * len(counted)
    prompt, encoded, is_resplit = facts.encoder.encode_after(
        # Whoever asks for a score has the text of prompt and response in one.
        *(rendered.prompt, rendered.responses, has_masks),
        keeps_boundary=not config.for_scores,
    )
    responses = [ids for ids, _ in encoded]
    if not has_masks:
        return prompt, responses, [], is_resplit
    masks = []
    for text, (ids, starts), spans in zip(rendered.responses, encoded, counted, strict=True):
        if spans is None:
            masks.append(np.ones(len(ids), np.bool_))
        else:
            masks.append(_token_mask(starts, len(text), spans))
    return prompt, responses, masks, is_resplit


def _untrained_parts(facts: TokenizerFacts, config: DataConfig) -> list[tuple[str, re.Pattern[str]]]:
    """Return patterns of the parts in `data.untrained`, each with the opening tag that may end a prompt."""
    names = config.untrained
    parts = [("", facts.tokens_around_turns)] if "formatting" in names else []
    if not (facts.thoughts.is_known or {"thoughts", "empty_thoughts"}.isdisjoint(names)):
        raise ConfigError(
            "the chat template writes thoughts between marks that are not known",
            where="data.untrained",
            got=", ".join(names),
            expected="a token before and after a thought, or the marks that docs/data.md lists",
            remedy="set data.untrained=[]",
        )
    # The template's thoughts, and those of contents in which it looks for none.
    thoughts = {marks.tags: marks for marks in (facts.thoughts, DEFAULT_MARKS)}
    if "empty_thoughts" in names:
        parts += [(marks.tags[0], marks.empty_start) for marks in thoughts.values()]
    if "thoughts" in names:
        for first, last in thoughts:
            parts.append((first, re.compile(rf"(?s){re.escape(first)}.*?(?:{re.escape(last)}\s*|\Z)")))
    return parts


def _counted_characters(
    prompt: str, text: str, turns: Sequence[Span], untrained: Sequence[tuple[str, re.Pattern[str]]]
) -> list[Span] | None:
    """Return the spans of a response `text` that the loss counts; None: all of the text.

    `turns` are the spans of the response's trained turns.
    """
    counted = list[Span]()
    for start, end in turns:
        before = prompt + text[:start]
        omitted = list[Span]()
        for tag, pattern in untrained:
            is_opened = tag and before.rstrip().endswith(tag)
            opening = before[before.rindex(tag) :] if is_opened else ""
            for match in pattern.finditer(opening + text[start:end]):
                first, stop = match.span()
                omitted.append((start + first - len(opening), start + stop - len(opening)))
        position = start
        for first, stop in sorted(omitted):
            if position < first:
                counted.append((position, first))
            position = max(position, stop)
        if position < end:
            counted.append((position, end))
    return None if counted == [(0, len(text))] else counted


def _token_mask(starts: Sequence[int], length: int, counted: Iterable[Span]) -> Mask:
    """Return for each token whether it has a character in `counted`: then the loss counts the token.

    `starts`: the positions of the tokens' first characters, ascending, in a text of `length` characters.
    """
    begins = np.array(starts, dtype=np.int64)
    # A character of several tokens (bytes) belongs to each of them.
    following = np.searchsorted(np.append(begins, length), begins, side="right")
    ends = np.append(begins, length)[np.minimum(following, len(begins))]
    mask = np.zeros(len(begins), dtype=np.bool_)
    for start, end in counted:
        mask |= (begins < end) & (ends > start)
    return mask


def _truncated(
    prompt: list[int], responses: list[list[int]], prefix_length: int, least: int, limits: DataConfig
) -> tuple[list[int], list[list[int]]]:
    """Truncate by `data.truncation`; of the prompt, BOS and the last tokens, `least` in all, are never cut.

    Raises UnusableRecordError: nothing is left to train on, or an image would be cut.
    """
    prompt_tokens = len(prompt)
    limit = limits.max_prompt_length or prompt_tokens
    if min(limit, prompt_tokens) <= prefix_length:
        raise UnusableRecordError("empty_prompt", "no token but BOS, or no room in data.max_prompt_length")
    prompt = _cut_left(prompt, limit, prefix_length)
    longest = max(map(len, responses))
    prompt_room, room = _kept_tokens(len(prompt), longest, prefix_length, limits)
    if least > prefix_length and prompt_room < min(least, prompt_tokens):
        room_in_words = f"room for {max(prompt_room, 0)}"
        detail = f"{least} tokens of {prompt_tokens} from the first image on, and {room_in_words}"
        raise UnusableRecordError("image_does_not_fit", detail)
    if room:
        return _cut_left(prompt, prompt_room, prefix_length), [ids[:room] for ids in responses]
    match limits.truncation:
        case Truncation.drop:
            raise UnusableRecordError("too_long", f"{len(prompt) + longest} tokens")
        case Truncation.keep_end:
            raise UnusableRecordError("response_fills_max_length", f"{longest} tokens")
        case _:
            raise UnusableRecordError("prompt_fills_max_length", f"{len(prompt)} tokens")


def _kept_tokens(prompt: int, longest: int, prefix: int, limits: DataConfig) -> tuple[int, int]:
    """Return how many tokens truncation leaves of a prompt and, at most, of each response; docs/data.md.

    `prefix` counts the tokens of BOS, which stay. Nothing is left of the responses if the record may not be
    cut, or has no room for both sides.
    """
    most = limits.max_length
    if prompt + longest <= most:
        return prompt, longest
    room = 0
    match limits.truncation:
        case Truncation.keep_start:
            room = max(most - prompt, 0)
        case Truncation.keep_end:
            room = longest if longest + prefix < most else 0
        case Truncation.both:
            room = most * longest // (prompt + longest)
            if 2 * prompt < most:
                room = most - prompt
            if 2 * longest < most:
                room = longest
            room = min(max(room, 1), max(most - prefix - 1, 0))
    return min(prompt, most - room), min(room, longest)


def _cut_left(prompt: list[int], length: int, prefix_length: int) -> list[int]:
    """Return BOS and the last tokens of the prompt, `length` tokens in all."""
    if len(prompt) <= length:
        return prompt
    return prompt[:prefix_length] + prompt[len(prompt) - (length - prefix_length) :]


@dataclass(frozen=True, eq=False)
class EncodedRecord:
    """The examples of one record. They share one encoding, so each response is stored and scored once."""

    example: EncodedExample  # with all responses that an example uses; only these must fit the limits
    ranks: list[list[int]]  # for each example the indices of its responses in `example`, best first
    scores: list[float]  # of the responses of `example`, nan if the record has none
    ties: int
    numbers: list[float]  # a value for each of `NUMBERS`; empty if none has an effect

    def examples(self) -> list[EncodedExample]:
        """Return the examples, each with its own responses."""
        source = self.example
        examples = []
        for ranks in self.ranks:
            example = replace(
                source,
                responses=tuple(source.responses[index] for index in ranks),
                trained=tuple(source.trained[index] for index in ranks if source.trained),
                truncated=tuple(source.truncated[index] for index in ranks),
            )
            examples.append(example)
        return examples

    @property
    def outcome(self) -> Outcome:
        """The record's result, for counts."""
        times = dict.fromkeys(self.example.changes, 1)
        times["ties_left_out"] = self.ties
        best, *others = self.example.truncated
        if others:
            times["chosen_truncated"] = int(best)
            times["rejected_truncated"] = int(any(others))
        changed = tuple(sorted((name, number) for name, number in times.items() if number))
        return Outcome(None, len(self.ranks), changed=changed, read_as=self.example.read_as)


def encode_record(
    record: Record,
    config: DataConfig,
    tokenizer: Tokenizer,
    processor: ImageProcessor | None = None,
    systems: Mapping[str, str] | None = None,
) -> EncodedRecord | BadRecord:
    """Encode the training examples of a record; a bad record is returned as it is.

    A prompt starts with the tokenizer's BOS exactly once; a response ends with its end-of-turn token (plain
    text: EOS) exactly once. A special token spelled in a content is encoded as text. Only a `processor` reads
    images. `systems`: system messages that scorers get in place of the record's, by the names in `SCORERS`.
    Raises ConfigError: the tokenizer or its chat template cannot be used.
    """
    if isinstance(record, BadRecord):
        return record
    ranks, ties = training_examples(record, config.ranked)
    is_taken_apart = config.takes_apart and len(record.responses) > 1
    if is_taken_apart:
        best_and_worst = (record.responses[0], record.responses[-1])
        record = replace(record, responses=best_and_worst, scores=(1.0, 0.0))
        ranks = [(0,), (1,)]
        ties = 0
    used = sorted(set().union(*ranks))
    responses = tuple(record.responses[index] for index in used)
    encoded = encode_pair(replace(record, responses=responses), config, tokenizer, processor, systems)
    if isinstance(encoded, BadRecord):
        return encoded
    if is_taken_apart:
        encoded = replace(encoded, changes=encoded.changes | {"taken_apart"})
    scores = record.scores or (np.nan,) * len(record.responses)
    numbers = list({**NUMBERS, **record.numbers}.values())
    return EncodedRecord(
        encoded,
        ranks=[list(map(used.index, example)) for example in ranks],
        scores=[scores[index] for index in used],
        ties=ties,
        numbers=numbers if record.numbers else [],
    )
