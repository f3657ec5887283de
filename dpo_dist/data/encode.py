"""Encode a preference record as token ids: one prompt, and each response as its continuation."""

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data_schema import DataConfig, Truncation
from dpo_dist.data.counts import NO_CHANGES, Changes
from dpo_dist.data.records import BadRecord, Dialogue, Origin, PreferenceRecord, UnusableRecordError
from dpo_dist.data.tokenization.escaped_encoder import SpecialTokenInTextError
from dpo_dist.data.tokenization.loss_mask import Mask, counted_characters, token_mask, untrained_parts
from dpo_dist.data.tokenization.marks import RESERVED, RESERVED_CHARACTER, any_text
from dpo_dist.data.tokenization.render_conversation import Rendered
from dpo_dist.data.tokenization.rendering import render_record
from dpo_dist.data.tokenization.tokenizer import TokenizerFacts, tokenizer_facts
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """A record as token ids; the input of a model is the prompt followed by one response.

    Attributes:
        prompt_ids: int32 [prompt tokens], at least one.
        responses: int32 [response tokens] each, best first; the last id ends the turn unless it was cut.
        changes: what was changed or is particular.
        trained: bool [response tokens] for each response, whether the loss counts a token; empty: all count.
        truncated: for each response whether its end was cut, and with it its end of turn.
    """

    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]
    changes: Changes = NO_CHANGES
    trained: tuple[Mask, ...] = ()
    truncated: tuple[bool, ...] = ()


@dataclass(frozen=True)
class _Tokens:
    prompt: list[int]
    responses: list[list[int]]
    prefix_length: int
    changes: Changes
    trained: list[Mask]


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
        data_config: limits in tokens, truncation, and the keys about templates and untrained parts.

    Returns:
        The example, or a bad record with the reason `template_rejected`, `tools_not_rendered`,
        `calls_not_rendered`, `thought_not_rendered`, `turn_not_rendered`, `turns_not_found`,
        `reserved_character`, `special_token_in_text`, `empty_prompt`, `too_long`, `prompt_fills_max_length`,
        `response_fills_max_length`, `no_trained_token`, `identical_after_encoding` or
        `identical_after_truncation`.

    Raises:
        ConfigError: the tokenizer has no chat template for messages, no EOS, or an unusable template.
    """
    facts = tokenizer_facts(tokenizer, data_config, with_tools=bool(record.tools))
    try:
        if _has_reserved_character(record):
            return BadRecord("reserved_character", record.origin, "a text has the noncharacter U+FDD0")
        tokens = _tokenise(render_record(record, facts, data_config), facts, data_config)
    except UnusableRecordError as fault:
        return fault.at(record.origin)
    except RecursionError:
        return BadRecord(
            "template_rejected", record.origin, "tools, calls or arguments are nested too deeply"
        )
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


def _has_reserved_character(record: PreferenceRecord) -> bool:
    """Return whether a text that is encoded or given to the chat template has it."""
    prompt = record.prompt.text if isinstance(record.prompt, Dialogue) else record.prompt
    for part in (prompt, *record.responses):
        if isinstance(part, str):
            if RESERVED_CHARACTER in part:
                return True
        elif any(RESERVED_CHARACTER in turn.content for turn in part) or any_text(
            [turn.fields for turn in part if turn.fields], RESERVED
        ):
            return True
    return any_text((*record.tools, record.template_arguments), RESERVED)


def _tokenise(rendered: Rendered, facts: TokenizerFacts, config: DataConfig) -> _Tokens:
    texts = [response.text for response in rendered.responses]
    prompt, responses, resplit = facts.encoder.encode_after(rendered.prompt, texts)
    formatting = facts.around_turns if "formatting" in config.untrained else None
    parts = untrained_parts(tuple(config.untrained), formatting)
    counted = [
        counted_characters(rendered.prompt, response.text, response.counted, parts)
        for response in rendered.responses
    ]
    trained = []
    if any(spans is not None for spans in counted):
        for text, ids, spans in zip(texts, responses, counted, strict=True):
            if spans is None:
                trained.append(np.ones(len(ids), dtype=np.bool_))
                continue
            starts = facts.encoder.token_starts(rendered.prompt, text, ids)
            trained.append(token_mask(starts, len(text), spans))
    prompt, prefix_length = facts.with_prefix(prompt)
    changes = replace(rendered.changes, boundary_resplit=resplit)
    return _Tokens(prompt, responses, prefix_length, changes, trained)


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
    return _example(prompt, responses, tokens, origin)


def _example(
    prompt: list[int], responses: list[list[int]], tokens: _Tokens, origin: Origin
) -> EncodedExample | BadRecord:
    truncated = tuple(len(ids) < len(whole) for ids, whole in zip(responses, tokens.responses, strict=True))
    if len(set(map(tuple, responses))) < len(responses):
        cause = "truncation" if any(truncated) else "encoding"
        return BadRecord(f"identical_after_{cause}", origin)
    trained = tuple(mask[: len(ids)] for mask, ids in zip(tokens.trained, responses, strict=False))
    if not all(mask.any() for mask in trained):
        return BadRecord("no_trained_token", origin, "the loss would count no token of a response")
    return EncodedExample(
        np.array(prompt, dtype=np.int32),
        tuple(np.array(ids, dtype=np.int32) for ids in responses),
        replace(
            tokens.changes,
            prompt_truncated=len(prompt) < len(tokens.prompt),
            response_truncated=any(truncated),
            partly_trained=bool(trained),
        ),
        trained,
        truncated,
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
