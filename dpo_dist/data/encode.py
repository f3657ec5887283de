"""From a preference record to token ids: one prompt, and each response as it goes on from it."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from dpo_dist.config.schema import DataConfig, Truncation
from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages, Origin, PreferenceRecord
from dpo_dist.data.tokens import RESERVED_CHARACTER, SpecialTokenInTextError, TokenizerFacts, tokenizer_facts
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """A record as token ids; what a model reads is the prompt followed by one response.

    Attributes:
        prompt_ids: int32 [prompt tokens], at least one.
        responses: int32 [response tokens] each, best first; the last id ends the turn unless it was cut.
        prompt_truncated: whether the start of the prompt was cut.
        response_truncated: whether the end of a response was cut.
        boundary_resplit: whether a response was tokenised by itself, because together with the prompt the
            prompt's last tokens would have come out otherwise.
    """

    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]
    prompt_truncated: bool = False
    response_truncated: bool = False
    boundary_resplit: bool = False


@dataclass(frozen=True)
class _Written:
    """What will be tokenised, escaped: each response with its end of turn."""

    prompt: str
    responses: tuple[str, ...]


@dataclass(frozen=True)
class _Tokens:
    prompt: list[int]
    responses: list[list[int]]
    prefix_length: int
    boundary_resplit: bool


def encode_pair(
    record: PreferenceRecord, tokenizer: "PreTrainedTokenizerBase", data_config: DataConfig
) -> EncodedPair | BadRecord:
    """Encode one record within the configured lengths.

    Messages, and dialogues where the tokenizer has a chat template, go through that template; plain text
    never does unless `data.text_as_messages`. A prompt starts with the tokenizer's BOS exactly once; a
    response ends with its end-of-turn token (plain text: EOS) exactly once. A special token spelt in a
    content is encoded as text.

    Args:
        record: what `read_records` gives.
        tokenizer: of the policy; probed at its first use.
        data_config: `max_length`, `max_prompt_length` (tokens), `truncation` and `text_as_messages` are used.

    Returns:
        The pair, or why it cannot be one: `template_rejected`, `reserved_character`,
        `special_token_in_text`, `empty_prompt`, `too_long`, `prompt_fills_max_length`,
        `response_fills_max_length`, `identical_after_encoding`, `identical_after_truncation`.

    Raises:
        ConfigError: messages for a tokenizer without chat template; no EOS; a template unfit for chats.
    """
    facts = tokenizer_facts(tokenizer)
    if RESERVED_CHARACTER in _all_text(record):
        return BadRecord("reserved_character", record.origin, "U+FDD0, a noncharacter, stands in a text")
    try:
        tokens = _tokenise(_write(record, facts, data_config.text_as_messages), facts)
    except TemplateError as fault:
        return BadRecord("template_rejected", record.origin, str(fault))
    except SpecialTokenInTextError:
        return BadRecord("special_token_in_text", record.origin, "the tokenizer cannot write it as text")
    return _fit(tokens, data_config, record.origin)


def response_key(prompt_ids: TokenIds, response_ids: TokenIds) -> bytes:
    """Content address of a response after a prompt: 16 bytes over the exact token ids (law L3)."""
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
    return prompt + "".join(record.responses)


def _write(record: PreferenceRecord, facts: TokenizerFacts, text_as_messages: bool) -> _Written:
    match record.prompt:
        case str() if text_as_messages:
            return _write_messages((Message("user", record.prompt),), record.responses, facts, record.origin)
        case str():
            return _write_text(record.prompt, record.responses, facts)
        case Dialogue() if facts.chat_template is not None:
            answers = tuple(response.strip() for response in record.responses)
            return _write_messages(record.prompt.messages(), answers, facts, record.origin)
        case Dialogue():
            return _write_text(record.prompt.text, record.responses, facts)
        case _:
            return _write_messages(record.prompt, record.responses, facts, record.origin)


def _write_text(prompt: str, responses: tuple[str, ...], facts: TokenizerFacts) -> _Written:
    return _Written(
        facts.escape(prompt), tuple(facts.escape(response) + facts.end_of_text for response in responses)
    )


def _write_messages(
    messages: Messages, answers: tuple[str, ...], facts: TokenizerFacts, origin: Origin
) -> _Written:
    if facts.chat_template is None:
        raise ConfigError(
            "the data are conversations and the tokenizer has no chat template",
            where=str(origin),
            got="messages",
            expected="plain prompt, chosen and rejected texts, or a tokenizer with a chat template",
            remedy="use the tokenizer of an instruction-tuned model, leave data.text_as_messages off, "
            "or write the conversations as texts",
        )
    prompt = facts.render(messages, add_generation_prompt=True)
    return _Written(prompt, tuple(facts.rendered_answer(messages, answer, prompt) for answer in answers))


def _tokenise(written: _Written, facts: TokenizerFacts) -> _Tokens:
    prompt, responses, resplit = facts.encode_after(written.prompt, written.responses)
    prompt, prefix_length = facts.with_prefix(prompt)
    return _Tokens(prompt, responses, prefix_length, resplit)


def _fit(tokens: _Tokens, limits: DataConfig, origin: Origin) -> EncodedPair | BadRecord:
    """Cut what is too long as `data.truncation` says, or give the reason why that leaves no pair."""
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
    return EncodedPair(
        np.array(prompt, dtype=np.int32),
        tuple(np.array(ids, dtype=np.int32) for ids in responses),
        prompt_truncated=len(prompt) < len(tokens.prompt),
        response_truncated=response_truncated,
        boundary_resplit=tokens.boundary_resplit,
    )


def _cut_to_limit(prompt: list[int], limit: int, prefix_length: int) -> list[int]:
    if limit <= prefix_length:
        raise ConfigError(
            "data.max_prompt_length leaves room for nothing but the tokens that start every prompt",
            where="data.max_prompt_length",
            got=str(limit),
            expected=f"more than {prefix_length} (BOS)",
            remedy="raise data.max_prompt_length, or remove it",
        )
    return _cut_left(prompt, limit, prefix_length)


def _cut_left(prompt: list[int], length: int, prefix_length: int) -> list[int]:
    """The last tokens of the prompt with its BOS kept before them, `length` in all."""
    if len(prompt) <= length:
        return prompt
    kept = max(length - prefix_length, 0)
    return prompt[:prefix_length] + prompt[len(prompt) - kept :]
