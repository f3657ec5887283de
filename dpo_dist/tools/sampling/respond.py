"""Ask one model for responses to a part of the prompts; each is a row with text, number, length and end."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_dist.data import (
    BadRecord,
    DataConfig,
    Dialogue,
    EncodedExample,
    ImageInput,
    ImageProcessor,
    Message,
    PreferenceRecord,
    Response,
    TokenIds,
)
from dpo_dist.data.encode import encode_pair
from dpo_dist.data.text.escape import THOUGHT_FIELDS
from dpo_dist.data.text.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.kit import (
    ModelConfig,
    ModelSource,
    NotFiniteError,
    WrongGenerationError,
    context_length,
    find_stop_ids,
    load_config,
    load_encoder,
)
from dpo_dist.tools.sampling.generate import Request, Sample, generate
from dpo_dist.tools.sampling.settings import Sampling


@dataclass(frozen=True, eq=False)
class Responder:
    """Tokenizer, stop tokens and limits of a model that responds; `data` renders prompts as in training.

    Without a `processor`, records with images are bad ones.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    stop_ids: frozenset[int]
    longest: int | None  # tokens of a prompt and its response; None: no limit is known
    processor: ImageProcessor | None = None
    vocabulary: int | None = None  # ids of the model; None: unknown

    def encode(self, record: PreferenceRecord, response: Response) -> EncodedExample | BadRecord:
        """Return a prompt and a response as training encodes them, without the limits on their length."""
        limits = replace(self.data.without_limits(), max_prompt_length=self.data.max_prompt_length)
        return encode_pair(replace(record, responses=(response,)), limits, self.tokenizer, self.processor)

    def images(self, prompt: EncodedExample) -> tuple[ImageInput, ...]:
        """Return the images of a prompt with what the model's tower reads of each."""
        processor = self.processor
        if processor is None:
            return ()
        return tuple(replace(image, inputs=processor.inputs(image.content)) for image in prompt.images)


def open_responder(source: ModelSource, model: ModelConfig, data: DataConfig) -> Responder:
    """Return a model's tokenizer, the tokens that end its responses, its image processor; no weights.

    Raises ConfigError, also if `model.images` is set and the model reads none.
    """
    encoder = load_encoder(source.folder, source.adapter, model)
    tokenizer = encoder.tokenizer
    processor = encoder.processor
    stop_ids = find_stop_ids(tokenizer, data, source.folder, source.key)
    model_config = load_config(source.folder, ModelConfig(**vars(model)), source.key)
    longest = context_length(model_config)
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None)
    return Responder(source, tokenizer, data, stop_ids, longest, processor, vocabulary)


BATCH_TOKENS = 32768
"""Most tokens of a batch: rows times the longest prompt with its response."""
Generate = Callable[[Sequence[Request], Sampling], Sequence[Sample | None]]
"""Returns a sample for each request, in order; None: a server refuses the prompt."""


def open_generator(
    source: ModelSource, model: ModelConfig, data: DataConfig, device: torch.device
) -> tuple[Responder, Generate]:
    """Load a whole model onto `device`; return its responder and the function that generates."""
    responder = open_responder(source, model, data)
    causal_lm = source.load(model, device)
    return responder, partial(generate, causal_lm, stop_ids=responder.stop_ids, budget=BATCH_TOKENS)


_FIELD = THOUGHT_FIELDS[0]
_PLACEHOLDER = "response"
_THOUGHT, _CONTENT = "probe thought", "probe content"
_PROBES = re.compile(f"{_THOUGHT}|{_CONTENT}")
# A response is decoded together with this many last tokens of its prompt, because its first space or
# character may depend on them.
_DECODED_BEFORE = 8


@dataclass(frozen=True)
class Completion:
    """A model's response to a prompt, as text."""

    number: int  # among all samples of the prompt
    content: str  # of a dialogue: up to the next turn
    tokens: int  # without the ending token
    finished: bool  # ended by itself
    same_ids: bool  # whether training encodes the text as the generated tokens
    fields: dict[str, Any] = field(default_factory=dict)  # a thought that is not in the content
    ids: list[int] = field(default_factory=list)  # with the ending token
    model: int = 0  # index of the model
    score: float | None = None
    unused: str | None = None  # why it is in no pair

    @property
    def response(self) -> Response:
        """The text; a message if its thought is a field of its own."""
        return (Message("assistant", self.content, self.fields),) if self.fields else self.content


@dataclass(frozen=True)
class Completions:
    """A row of a part: the completions of a prompt, or the reason why the model cannot be asked."""

    completions: list[Completion]
    dropped: str | None = None
    prompt_ids: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # the judge's

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Completions":
        """Return the completions from which `asdict` made the row."""
        return cls(**{**row, "completions": [Completion(**each) for each in row["completions"]]})


def respond(
    records: Sequence[PreferenceRecord],
    responder: Responder,
    generate_samples: Generate,
    sampling: Sampling,
    numbers: range,
) -> list[Completions]:
    """Return the completions of each prompt, in order; `numbers`: which of a prompt's samples to make."""
    prompts = [usable_prompt(record, responder, sampling) for record in records]
    requests = []
    for record, prompt in zip(records, prompts, strict=True):
        if isinstance(prompt, str):
            continue
        key = record.prompt_key()
        images = responder.images(prompt)
        room = sampling.room(len(prompt.prompt_ids), responder.longest)
        requests += [Request(prompt.prompt_ids, key, number, images, room) for number in numbers]
    try:
        samples = iter(generate_samples(requests, sampling))
    except NotFiniteError as fault:
        where = f"{responder.source.name}, among the prompts from {records[0].origin} on"
        raise not_finite(where, ", or set model.dtype=fp32; finished parts are kept") from fault
    except WrongGenerationError as fault:
        raise wrong_generation(responder.source.name, fault) from None
    rows = []
    for record, prompt in zip(records, prompts, strict=True):
        if isinstance(prompt, str):
            rows.append(Completions([], dropped=prompt))
        else:
            decoder = _Decoder(record, prompt.prompt_ids, responder)
            completions = []
            for number in numbers:
                sample = next(samples)
                if sample is not None:
                    completions.append(decoder.completion(sample, number))
            dropped = None if completions else "refused_by_the_server"
            rows.append(Completions(completions, dropped, prompt.prompt_ids.tolist()))
    return rows


def not_finite(where: str, other_remedy: str = "") -> ConfigError:
    """Return the error for a model whose logits are no numbers."""
    return ConfigError(
        "the model computes logits that are not finite",
        where=where,
        got="NaN or infinity",
        remedy=f"check the model's weights{other_remedy}",
    )


def wrong_generation(name: str, fault: WrongGenerationError) -> ConfigError:
    """Return the error for a model, as configured, that cannot be asked for responses."""
    return ConfigError(
        "transformers does not generate rightly by this model",
        where=name,
        got=str(fault),
        remedy="choose a model of another architecture, or make its responses with another program",
    )


def usable_prompt(
    record: PreferenceRecord, responder: Responder, sampling: Sampling | None
) -> EncodedExample | str:
    """Return a prompt, encoded, if the model has room for a response, else why it cannot be used.

    `sampling` is None if no response is generated: then none needs room.
    The ids are the same as in training; if the template opens a thought, its start is among them.
    """
    # A prompt is rendered before a placeholder. The first one has a thought: one that the template opens in
    # the prompt stays open, and the model continues it. The second one has none: a thought that the template
    # ends in the prompt stays ended.
    facts = tokenizer_facts(responder.tokenizer, responder.data, with_tools=bool(record.tools))
    thinking: Response = (Message("assistant", _PLACEHOLDER, {_FIELD: _PLACEHOLDER}),)
    if isinstance(record.prompt, str) or facts.chat is None:
        thinking = f"{_PLACEHOLDER}{facts.thoughts.closing}{_PLACEHOLDER}"
    for placeholder in (thinking, _PLACEHOLDER):
        encoded = responder.encode(record, placeholder)
        if isinstance(encoded, BadRecord):
            return encoded.reason
        prompt = encoded
        if "ended_thought_reopened" not in encoded.changes:
            break
    tokens = len(prompt.prompt_ids)
    if tokens >= responder.data.max_length:
        return "prompt_fills_max_length"
    if sampling is not None and not sampling.room(tokens, responder.longest):
        return "too_long_for_the_model"
    return prompt


def texts_after(ids: list[int], prompt: TokenIds, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text of `ids` decoded together with a prompt's end, and alone; both keep special tokens."""
    before = prompt[-_DECODED_BEFORE:].tolist()
    start, both, alone = (
        str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for tokens in (before, before + ids, ids)
    )
    continued = both.removeprefix(start) if both.startswith(start) else alone
    return continued, alone


@dataclass(frozen=True, eq=False)
class _Decoder:
    """Finds the text or message of a response that training encodes as the generated tokens."""

    record: PreferenceRecord
    prompt: TokenIds
    responder: Responder

    def completion(self, sample: Sample, number: int) -> Completion:
        """Return a sample as a completion, which says whether training would encode the same tokens."""
        ids = sample.ids
        finished = sample.is_finished
        ends = [] if sample.end is None else [sample.end]
        message, same = self._decoded(ids)
        text = message.content
        prompt = self.record.prompt
        next_turn = prompt.start_of_turn(text) if isinstance(prompt, Dialogue) else None
        if next_turn is not None:
            # The model speaks for the other side too: its response ends before that turn.
            text = text[:next_turn]
            finished = True
            ends = []
            ids = self._encode(text) or []
            same = ids == sample.ids[: len(ids)]
        return Completion(number, text, len(ids), finished, same, dict(message.fields), ids + ends)

    def _decoded(self, ids: list[int]) -> tuple[Message, bool]:
        """Return the response in the first form that training encodes as `ids`, and whether there is one.

        A text may start with a space that is decoded only together with the prompt's tokens, and a template
        may add or strip that space. A template may also write a message's content and thought in another form
        than plain text, such as gpt-oss in channels.
        """
        continued, alone = texts_after(ids, self.prompt, self.responder.tokenizer)
        texts = dict.fromkeys((continued, alone, alone.strip()))
        for form in (*texts, *self._possible_messages(continued)):
            if self._encode(form) == ids:
                return Message("assistant", form) if isinstance(form, str) else form, True
        return Message("assistant", continued), False

    def _possible_messages(self, text: str) -> Iterator[str | Message]:
        """Yield the contents, some with a thought as a field, that the template may render as this text."""
        if isinstance(self.record.prompt, str | Dialogue):
            return
        for fields in ({}, {_FIELD: _THOUGHT}):
            ids = self._encode(Message("assistant", _CONTENT, fields))
            if ids is None:
                continue
            around = _PROBES.split(texts_after(ids, self.prompt, self.responder.tokenizer)[0])
            if len(around) < 2:  # the tokenizer does not decode to the text that it encoded
                continue
            first, *between, last = around
            rest = text.removeprefix(first).removesuffix(last)
            if not between:
                yield rest
            elif between[0] in rest:
                thought, _, content = rest.partition(between[0])
                yield Message("assistant", content, {_FIELD: thought})

    def _encode(self, response: str | Message) -> list[int] | None:
        """Return the response's tokens without its end; None if it cannot be encoded after this prompt."""
        encoded = self.responder.encode(self.record, response if isinstance(response, str) else (response,))
        if isinstance(encoded, BadRecord) or not np.array_equal(encoded.prompt_ids, self.prompt):
            return None
        return list(map(int, encoded.responses[0][:-1]))
