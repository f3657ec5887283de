"""Responses of one model to a part of the prompts, as rows: text, number, length, end."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.config.data_schema import Truncation
from dpo_dist.data.encode import TokenIds, encode_pair
from dpo_dist.data.records import DIALOGUE_TURN, BadRecord, Dialogue, Message, PreferenceRecord
from dpo_dist.data.tokenization.rendered_parts import THOUGHT_FIELDS
from dpo_dist.errors import ConfigError
from dpo_dist.generation.prompts import UNLIMITED, encode_prompt, prompt_key
from dpo_dist.generation.sampling.engine import Generator
from dpo_dist.generation.sampling.generate import NotFiniteError, Request, Sample, Sampling
from dpo_dist.generation.sampling.responder import Responder

_FIELD = THOUGHT_FIELDS[0]
_THOUGHT, _CONTENT = "probe thought", "probe content"
_PROBES = re.compile(f"{_THOUGHT}|{_CONTENT}")
# Tokens before a response with which it is decoded: a space or a character may depend on them.
_DECODED_BEFORE = 8


@dataclass(frozen=True)
class Numbers:
    """The numbers of a model's samples: `first`, `first + 1`, ... of each prompt."""

    first: int
    count: int


def respond(
    records: Sequence[PreferenceRecord],
    responder: Responder,
    generator: Generator,
    sampling: Sampling,
    numbers: Numbers,
    *,
    keeps_ids: bool = False,
) -> list[dict[str, Any]]:
    """Return a row for each prompt, in their order.

    Args:
        records: prompts.
        responder: encodes and decodes.
        generator: its weights.
        sampling: settings.
        numbers: of the samples.
        keeps_ids: add token ids: `prompt_ids` to rows and, with the token that ended them, `ids` to samples.

    Returns:
        `{"key": ..., "samples": [{"number", "content", "tokens", "finished", "same_ids"}]}`; a prompt that
        cannot be used has the reason as `dropped` and no samples. `same_ids` is whether training encodes the
        response as the generated tokens. A thought apart from the content is in `fields`, by its field.

    Raises:
        ConfigError: the model's logits are not finite.
    """
    prompts = [usable_prompt(record, responder, sampling.max_new_tokens) for record in records]
    requests = [
        Request(prompt, prompt_key(record), number)
        for record, prompt in zip(records, prompts, strict=True)
        if not isinstance(prompt, str)
        for number in range(numbers.first, numbers.first + numbers.count)
    ]
    try:
        samples = iter(generator.generate(requests, sampling))
    except NotFiniteError as fault:
        raise _not_finite(fault.request, records, responder.source.name) from fault
    rows = []
    for record, prompt in zip(records, prompts, strict=True):
        row: dict[str, Any] = {"key": prompt_key(record), "samples": []}
        if isinstance(prompt, str):
            row["dropped"] = prompt
        else:
            row["samples"] = [
                _described(next(samples), number, record, prompt, responder, keeps_ids)
                for number in range(numbers.first, numbers.first + numbers.count)
            ]
            row |= {"prompt_ids": prompt.tolist()} if keeps_ids else {}
        rows.append(row)
    return rows


def _not_finite(request: Request, records: Sequence[PreferenceRecord], model: str) -> ConfigError:
    origin = next(record.origin for record in records if prompt_key(record) == request.key)
    return ConfigError(
        "the model computes logits that are not finite",
        where=f"{model}, sample {request.number} of the prompt of {origin}",
        got="NaN or infinity",
        remedy="check the model's weights, or set model.dtype=fp32; finished parts are kept",
    )


def usable_prompt(record: PreferenceRecord, responder: Responder, new_tokens: int) -> TokenIds | str:
    """Return the ids of a prompt before `new_tokens` others, or the reason why it cannot be used."""
    prompt = encode_prompt(record, responder.tokenizer, responder.data)
    if isinstance(prompt, BadRecord):
        return prompt.reason
    if len(prompt) >= responder.data.max_length:
        return "prompt_fills_max_length"
    longest = responder.longest
    if longest is not None and len(prompt) + new_tokens > longest:
        return "too_long_for_the_model"
    return prompt


def _described(
    sample: Sample,
    number: int,
    record: PreferenceRecord,
    prompt: TokenIds,
    responder: Responder,
    keeps_ids: bool,
) -> dict[str, Any]:
    ids, finished = sample.ids, sample.is_finished
    ends = [] if sample.end is None else [sample.end]
    response, same = decode(ids, record, prompt, responder)
    if isinstance(response, Message):
        text, fields = response.content, dict(response.fields)
    else:
        text, fields = response, {}
    if isinstance(record.prompt, Dialogue) and (turn := DIALOGUE_TURN.search(text)):
        # The model speaks for the other side too: its response ends before that turn.
        text, finished, ends = text[: turn.start()], True, []
        ids = _ids_of(text, record, prompt, responder) or []
        same = ids == sample.ids[: len(ids)]
    row = {
        "number": number,
        "content": text,
        "tokens": len(ids),
        "finished": finished,
        "same_ids": same,
    }
    return row | ({"fields": fields} if fields else {}) | ({"ids": ids + ends} if keeps_ids else {})


def decode(
    ids: list[int], record: PreferenceRecord, prompt: TokenIds, responder: Responder
) -> tuple[str | Message, bool]:
    """Return a response as text or message, and whether training would encode it as the same tokens.

    A text may start with a space that only the tokens before it show, and a template may add or strip that
    space. A template may write the content and the thought of a message in another form than they have in a
    text (the channels of gpt-oss). The first form counts whose encoding has the generated tokens.
    """
    continued, alone = texts_after(ids, prompt, responder.tokenizer)
    forms = dict.fromkeys((continued, alone, alone.strip()))
    for form in (*forms, *_messages_of(continued, record, prompt, responder)):
        if _ids_of(form, record, prompt, responder) == ids:
            return form, True
    return continued, False


def texts_after(ids: list[int], prompt: TokenIds, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text of tokens after a prompt, and alone; special tokens are in it."""
    before = prompt[-_DECODED_BEFORE:].tolist()
    start, whole, alone = (
        str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for tokens in (before, before + ids, ids)
    )
    return whole.removeprefix(start) if whole.startswith(start) else alone, alone


def _messages_of(
    text: str, record: PreferenceRecord, prompt: TokenIds, responder: Responder
) -> Iterator[str | Message]:
    """Yield the contents, with thoughts in fields, of which the chat template may have written a text."""
    if not isinstance(record.prompt, tuple):
        return
    for fields in ({}, {_FIELD: _THOUGHT}):
        ids = _ids_of(Message("assistant", _CONTENT, fields), record, prompt, responder)
        if ids is None:
            continue
        around = _PROBES.split(texts_after(ids, prompt, responder.tokenizer)[0])
        if len(around) < 2:  # a tokenizer that does not decode to the text that it encoded
            continue
        first, *between, last = around
        rest = text.removeprefix(first).removesuffix(last)
        if not between:
            yield rest
        elif between[0] in rest:
            thought, _, content = rest.partition(between[0])
            yield Message("assistant", content, {_FIELD: thought})


def _ids_of(
    response: str | Message, record: PreferenceRecord, prompt: TokenIds, responder: Responder
) -> list[int] | None:
    """Return the tokens of a response after the same prompt, without its end; None if it cannot follow it."""
    limits = replace(responder.data, max_length=UNLIMITED, truncation=Truncation.drop)
    whole = response if isinstance(response, str) else (response,)
    encoded = encode_pair(replace(record, responses=(whole,)), responder.tokenizer, limits)
    if isinstance(encoded, BadRecord) or not np.array_equal(encoded.prompt_ids, prompt):
        return None
    return list(map(int, encoded.responses[0][:-1]))
