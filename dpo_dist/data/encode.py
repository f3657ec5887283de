"""Encode a preference record as token ids: one prompt, and each response as its continuation."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from dpo_dist.config.data_schema import DataConfig, TextTemplate, Truncation
from dpo_dist.data.chat_template import (
    ends_opened_thought,
    ends_thought,
    opens_thought,
    within_thought,
    without_open_thought,
)
from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages, Origin, PreferenceRecord
from dpo_dist.data.tokenizer import (
    RESERVED_CHARACTER,
    SpecialTokenInTextError,
    TokenizerFacts,
    tokenizer_facts,
)
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """A record as token ids; the input of a model is the prompt followed by one response.

    Attributes:
        prompt_ids: int32 [prompt tokens], at least one.
        responses: int32 [response tokens] each, best first; the last id ends the turn unless it was cut.
        prompt_truncated: whether the start of the prompt was cut.
        response_truncated: whether the end of a response was cut.
        boundary_resplit: whether a response was tokenised by itself, because tokenising it together with the
            prompt would have changed the last tokens of the prompt.
        templated_text: whether a text prompt seems to be the output of a chat template, or a response to a
            text prompt ends as in such an output.
        opened_thought_joined: whether the template opens a thought in the prompt, and the opening of the
            same thought was removed from a response.
        opened_thought_removed: whether the thought that the template opens in the prompt was removed, because
            a response has no thought.
        trained: bool [response tokens] for each response, whether the loss counts a token; empty: all count.
    """

    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]
    prompt_truncated: bool = False
    response_truncated: bool = False
    boundary_resplit: bool = False
    templated_text: bool = False
    opened_thought_joined: bool = False
    opened_thought_removed: bool = False
    trained: tuple[Mask, ...] = ()


@dataclass(frozen=True)
class _Rendered:
    """Texts to tokenise, escaped; each response with its end of turn. Flags as in `EncodedExample`."""

    prompt: str
    responses: tuple[str, ...]
    templated_text: bool = False
    opened_thought_joined: bool = False
    opened_thought_removed: bool = False


@dataclass(frozen=True)
class _Tokens:
    rendered: _Rendered
    prompt: list[int]
    responses: list[list[int]]
    prefix_length: int
    boundary_resplit: bool


def encode_pair(
    record: PreferenceRecord, tokenizer: "PreTrainedTokenizerBase", data_config: DataConfig
) -> EncodedExample | BadRecord:
    """Encode one record within the configured lengths.

    The chat template renders messages, and dialogues if the tokenizer has one; plain text only with
    `data.text_as_messages`. With `data.template=applied` special tokens are encoded as such in a text that
    seems to be the output of a template. A prompt starts with the tokenizer's BOS exactly once; a response
    ends with its end-of-turn token (plain text: EOS) exactly once. A special token spelled in a content is
    encoded as text.

    Args:
        record: from `read_records`.
        tokenizer: of the policy; probed at its first use.
        data_config: `max_length`, `max_prompt_length` (tokens), `truncation`, `text_as_messages`,
            `template` and `template_date` are used.

    Returns:
        The example, or a bad record with the reason `template_rejected`, `reserved_character`,
        `special_token_in_text`, `empty_prompt`, `too_long`, `prompt_fills_max_length`,
        `response_fills_max_length`, `identical_after_encoding` or `identical_after_truncation`.

    Raises:
        ConfigError: the tokenizer has no chat template for messages, no EOS, or an unusable template.
    """
    facts = tokenizer_facts(tokenizer, data_config.template_date)
    if RESERVED_CHARACTER in _all_text(record):
        return BadRecord("reserved_character", record.origin, "a text has the noncharacter U+FDD0")
    try:
        tokens = _tokenise(_render(record, facts, data_config), facts)
    except TemplateError as fault:
        return BadRecord("template_rejected", record.origin, str(fault))
    except SpecialTokenInTextError:
        return BadRecord("special_token_in_text", record.origin, "the tokenizer cannot encode it as text")
    return _truncate(tokens, data_config, record.origin)


def response_key(prompt_ids: TokenIds, response_ids: TokenIds) -> bytes:
    """Return the content key of a response to a prompt: 16 bytes over the exact token ids (law L3)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, dtype=np.int32).tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype=np.int32).tobytes())
    return digest.digest()


def _all_text(record: PreferenceRecord) -> str:
    match record.prompt:
        case str():
            prompt = record.prompt
        case Dialogue():
            prompt = record.prompt.text
        case _:
            prompt = "".join(message.content for message in record.prompt)
    return prompt + "".join(record.response_texts)


def _render(record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig) -> _Rendered:
    match record.prompt:
        case str() if facts.is_templated(record.prompt):
            if config.template is TextTemplate.applied:
                ended = tuple(facts.end_templated(response) for response in record.response_texts)
                return _Rendered(record.prompt, ended, templated_text=True)
            return replace(_render_plain(record.prompt, record, facts, config), templated_text=True)
        case str() if any(map(facts.is_ended, record.response_texts)):
            if config.template is TextTemplate.applied:
                bare = tuple(map(facts.without_end, record.response_texts))
                record = replace(record, responses=bare)
            return replace(_render_plain(str(record.prompt), record, facts, config), templated_text=True)
        case str():
            return _render_plain(record.prompt, record, facts, config)
        case Dialogue() if facts.chat_template is not None:
            responses = tuple(response.strip() for response in record.response_texts)
            return _render_messages(record.prompt.messages(), responses, facts, record.origin)
        case Dialogue():
            return _render_text(record.prompt.text, record.response_texts, facts)
        case _:
            return _render_messages(record.prompt, record.response_texts, facts, record.origin)


def _render_plain(
    prompt: str, record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig
) -> _Rendered:
    if config.text_as_messages:
        return _render_messages((Message("user", prompt),), record.response_texts, facts, record.origin)
    return _render_text(prompt, record.response_texts, facts)


def _render_text(prompt: str, responses: tuple[str, ...], facts: TokenizerFacts) -> _Rendered:
    return _Rendered(
        facts.escape(prompt), tuple(facts.escape(response) + facts.end_of_text for response in responses)
    )


def _render_messages(
    messages: Messages, responses: tuple[str, ...], facts: TokenizerFacts, origin: Origin
) -> _Rendered:
    if facts.chat_template is None:
        raise ConfigError(
            "the data are conversations, but the tokenizer has no chat template",
            where=str(origin),
            got="messages",
            expected="plain prompt, chosen and rejected texts, or a tokenizer with a chat template",
            remedy="use the tokenizer of an instruction-tuned model, set data.text_as_messages=false, "
            "or convert the conversations to plain text",
        )
    prompt = facts.render(messages, add_generation_prompt=True)
    if opens_thought(prompt):
        return _render_after_thought(messages, responses, facts, prompt)
    return _Rendered(prompt, _render_responses(messages, responses, facts, prompt))


def _render_responses(
    messages: Messages, responses: tuple[str, ...], facts: TokenizerFacts, prompt: str
) -> tuple[str, ...]:
    rendered = (facts.rendered_response(messages, response, prompt) for response in responses)
    return tuple(
        facts.bare_response(response) if whole is None else whole
        for whole, response in zip(rendered, responses, strict=True)
    )


def _render_after_thought(
    messages: Messages, responses: tuple[str, ...], facts: TokenizerFacts, prompt: str
) -> _Rendered:
    """Render responses to a prompt that opens a thought: each ends it and none opens it again."""
    rendered = [facts.rendered_response(messages, response, prompt) for response in responses]
    if all(whole is not None and ends_opened_thought(whole) for whole in rendered):
        return _Rendered(prompt, tuple(map(str, rendered)))
    if all(map(ends_thought, responses)):
        joined = tuple(within_thought(response, prompt) for response in responses)
        return _Rendered(
            prompt, tuple(map(facts.bare_response, joined)), opened_thought_joined=joined != responses
        )
    prompt = without_open_thought(prompt)
    responses = tuple(
        facts.bare_response(response) if ends_thought(response) else whole
        for response, whole in zip(
            responses, _render_responses(messages, responses, facts, prompt), strict=True
        )
    )
    return _Rendered(prompt, responses, opened_thought_removed=True)


def _tokenise(rendered: _Rendered, facts: TokenizerFacts) -> _Tokens:
    prompt, responses, resplit = facts.encode_after(rendered.prompt, rendered.responses)
    prompt, prefix_length = facts.with_prefix(prompt)
    return _Tokens(rendered, prompt, responses, prefix_length, resplit)


def _truncate(tokens: _Tokens, limits: DataConfig, origin: Origin) -> EncodedExample | BadRecord:
    """Truncate by `data.truncation`, or return the reason why no example is left."""
    prompt, responses = tokens.prompt, tokens.responses
    if len(prompt) == tokens.prefix_length:
        return BadRecord("empty_prompt", origin, "the prompt has no tokens")
    if limits.max_prompt_length is not None:
        prompt = _cut_to_limit(prompt, limits.max_prompt_length, tokens.prefix_length)
    longest = max(map(len, responses))
    if len(prompt) + longest > limits.max_length:
        match limits.truncation:
            case Truncation.drop:
                return BadRecord("too_long", origin, f"{len(prompt) + longest} tokens")
            case Truncation.keep_start:
                if len(prompt) >= limits.max_length:
                    return BadRecord("prompt_fills_max_length", origin, f"{len(prompt)} tokens")
                responses = [ids[: limits.max_length - len(prompt)] for ids in responses]
            case Truncation.keep_end:
                if limits.max_length - longest <= tokens.prefix_length:
                    return BadRecord("response_fills_max_length", origin, f"{longest} tokens")
                prompt = _cut_left(prompt, limits.max_length - longest, tokens.prefix_length)
    response_truncated = sum(map(len, responses)) < sum(map(len, tokens.responses))
    if len(set(map(tuple, responses))) < len(responses):
        cause = "truncation" if response_truncated else "encoding"
        return BadRecord(f"identical_after_{cause}", origin)
    return EncodedExample(
        np.array(prompt, dtype=np.int32),
        tuple(np.array(ids, dtype=np.int32) for ids in responses),
        prompt_truncated=len(prompt) < len(tokens.prompt),
        response_truncated=response_truncated,
        boundary_resplit=tokens.boundary_resplit,
        templated_text=tokens.rendered.templated_text,
        opened_thought_joined=tokens.rendered.opened_thought_joined,
        opened_thought_removed=tokens.rendered.opened_thought_removed,
    )


def _cut_to_limit(prompt: list[int], limit: int, prefix_length: int) -> list[int]:
    if limit <= prefix_length:
        raise ConfigError(
            "data.max_prompt_length is too small: only BOS would be left of a prompt",
            where="data.max_prompt_length",
            got=str(limit),
            expected=f"more than {prefix_length} (BOS)",
            remedy="raise data.max_prompt_length, or remove it",
        )
    return _cut_left(prompt, limit, prefix_length)


def _cut_left(prompt: list[int], length: int, prefix_length: int) -> list[int]:
    """Return BOS and the last tokens of the prompt, `length` tokens in all."""
    if len(prompt) <= length:
        return prompt
    kept = max(length - prefix_length, 0)
    return prompt[:prefix_length] + prompt[len(prompt) - kept :]
