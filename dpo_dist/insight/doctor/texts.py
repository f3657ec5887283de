"""Texts of a record as plain strings, and the names of faults found in them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from dpo_dist.data.records import Dialogue, Message, PreferenceRecord, Response
from dpo_dist.generation.text_facts import is_refusal

_SHORT_CHARACTERS = 3
_THOUGHTS = ("reasoning_content", "thinking")
# Roles of which several turns in a row are usual.
_REPEATABLE_ROLES = {"tool", "function", "observation"}

_CHARACTERS = {
    "replacement_character": re.compile("\ufffd"),
    "control_character": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "zero_width_character": re.compile("[\u200b\u2060\ufeff\u180e]"),
    "bidi_control": re.compile("[\u202a-\u202e\u2066-\u2069]"),
    "unassigned_character": re.compile("[\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]"),
    # UTF-8 that was read as Windows-1252 or Latin-1, as ftfy detects it.
    "wrong_decoding": re.compile(
        "\u00e2\u20ac[\u2122\u0153\u201c\u201d\u02dc\u00a6\u009d]|\u00c3[\u0080-\u00bf]|\u00ef\u00bb\u00bf"
    ),
}
_ASCII_PATTERNS = {
    "carriage_return": re.compile("\r"),
    "control_character": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "template_mark": re.compile(
        r"<\|(im_start|im_end|endoftext|eot_id|begin_of_text|start_header_id|end_header_id|user|assistant|system"
        r"|end|channel|message|return)\|>|</?(start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</s>|<s>|<(bos|eos|pad|unk)>"
        r"|^[ \t]{0,8}#{2,3} ?(Instruction|Response|Human|Assistant|Input):",
        re.MULTILINE,
    ),
    "role_mark": re.compile(r"\b(Human|Assistant|User):|^[ \t]{0,8}(USER|ASSISTANT|SYSTEM):", re.MULTILINE),
    "html_entity": re.compile(r"&(amp|lt|gt|quot|nbsp|#\d{2,4}|#x[0-9a-fA-F]{2,4});"),
    "escaped_newline": re.compile(r"[^\\]\\n(\\n)?[^a-zA-Z\\]|[^\\]\\n\\n"),
}
# A pattern matches only texts with one of these: faster to look for.
_NEEDED = {
    "template_mark": ("<", "[", "##"),
    "role_mark": ("Human:", "Assistant:", "User:", "USER:", "ASSISTANT:", "SYSTEM:"),
    "html_entity": ("&",),
    "escaped_newline": ("\\n",),
}
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff]")
_LATIN = re.compile("[A-Za-z]")
_MODEL_WORDS = re.compile(
    "gpt| ai|language model|openai|anthropic|claude|deepseek|qwen|mistral|llama|gemini|ernie|chatglm"
    "|\u4f5c\u4e3a\u4e00"
)
_MODEL_NAME = re.compile(
    r"\bas an? (\w+ )?(AI|language model)\b|\bI(\W{0,2}m| am) an? (\w+ )?(AI|language model)\b"
    r"|\b(Chat)?GPT(-?\d\w*)?\b|\b(OpenAI|Anthropic|Claude|DeepSeek|Qwen|Mistral|LLaMA|Gemini|ERNIE|ChatGLM)\b"
    "|\u4f5c\u4e3a\u4e00(\u4e2a|\u540d|\u6b3e)?(AI|\u4eba\u5de5\u667a\u80fd|\u8bed\u8a00\u6a21\u578b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Texts:
    """The texts of a record: its turns before the responses, and its responses.

    Attributes:
        turns: role and content of each turn of the prompt.
        responses: best first; the turns of a longer response are joined by newlines.
    """

    turns: tuple[tuple[str, str], ...]
    responses: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The contents of the prompt's turns, joined by newlines."""
        return "\n".join(content for _role, content in self.turns)

    @property
    def prompt_identity(self) -> str:
        """Text equal for equal prompts: roles and contents without differences of case and white space."""
        return "\n".join(f"{role}: {' '.join(content.casefold().split())}" for role, content in self.turns)


def texts_of(record: PreferenceRecord) -> Texts:
    """Return the texts of a record."""
    prompt = record.prompt
    match prompt:
        case str():
            turns: tuple[tuple[str, str], ...] = (("user", prompt),)
        case Dialogue():
            turns = tuple((message.role, message.content) for message in prompt.messages())
        case _:
            turns = tuple((message.role, _turn_text(message)) for message in prompt)
    return Texts(turns, tuple(map(_response_text, record.responses)))


@lru_cache(maxsize=8)
def names_model(response: str) -> bool:
    """Return whether a response names a model or says that an AI wrote it."""
    return _MODEL_WORDS.search(response.lower()) is not None and _MODEL_NAME.search(response) is not None


def text_faults(record: PreferenceRecord, texts: Texts) -> Iterator[str]:
    """Yield the names of the rules of `rules.RULES` and of the shares that concern the texts of a record."""
    found: set[str] = set()
    for _role, content in texts.turns:
        found |= _text_names(content)
    for response in texts.responses:
        found |= _text_names(response)
    yield from found
    yield from _turn_faults(record, texts)
    if len(texts.responses) > 1:
        yield from _pair_faults(texts)
    if any(
        response.strip() and response.strip() == texts.turns[-1][1].strip() for response in texts.responses
    ):
        yield "response_repeats_prompt"


def _text_names(text: str) -> set[str]:
    found = {
        name
        for name, pattern in _ASCII_PATTERNS.items()
        if any(part in text for part in _NEEDED.get(name, ("",))) and pattern.search(text)
    }
    if "escaped_newline" in found and "\n" in text:
        found.remove("escaped_newline")
    if not text.isascii():
        found |= {name for name, pattern in _CHARACTERS.items() if pattern.search(text)}
        if _RIGHT_TO_LEFT.search(text) and _LATIN.search(text):
            found.add("mixed_direction")
    return found


def _turn_faults(record: PreferenceRecord, texts: Texts) -> Iterator[str]:
    roles = [role for role, _content in texts.turns]
    if len(roles) > 1:
        yield "several_turns"
    if roles[0] == "system":
        yield "system_prompt"
    if "system" in roles[1:]:
        yield "system_not_first"
    following = [*roles, "assistant"] if isinstance(record.prompt, Dialogue) else roles
    if any(first == second and first not in _REPEATABLE_ROLES for first, second in pairwise(following)):
        yield "same_role_twice"
    if roles[-1] == "assistant" and not isinstance(record.prompt, Dialogue):
        yield "prompt_ends_with_assistant"
    if any(not content.strip() for role, content in texts.turns if role in ("user", "assistant")):
        yield "empty_turn"


def _pair_faults(texts: Texts) -> Iterator[str]:
    chosen, rejected = texts.responses[0], texts.responses[-1]
    yield from (f"{name}_chosen" for name in _side_names(chosen))
    yield from (f"{name}_rejected" for name in _side_names(rejected))
    if chosen[:1].isspace() != rejected[:1].isspace():
        yield "one_sided_leading_space"
    if chosen[-1:].isspace() != rejected[-1:].isspace():
        yield "one_sided_trailing_space"
    if len(chosen) > len(rejected):
        yield "chosen_longer"
    first, second = sorted((chosen.strip(), rejected.strip()), key=len)
    if first and second.startswith(first):
        yield "one_response_starts_the_other"
    if chosen.split() == rejected.split():
        yield "differs_only_in_spaces"
    elif chosen.casefold().split() == rejected.casefold().split():
        yield "differs_only_in_case"


def _side_names(response: str) -> Iterator[str]:
    if is_refusal(response):
        yield "refusal"
    if names_model(response):
        yield "model_name"
    if len(response.strip()) < _SHORT_CHARACTERS:
        yield "short"
    if response[-1:].isspace():
        yield "trailing_space"


def _response_text(response: Response) -> str:
    return response if isinstance(response, str) else "\n".join(map(_turn_text, response))


def _turn_text(message: Message) -> str:
    parts = [str(message.fields[name]) for name in _THOUGHTS if message.fields.get(name)]
    parts += [message.content] if message.content else []
    if message.fields.get("tool_calls"):
        parts.append(
            json.dumps(message.fields["tool_calls"], ensure_ascii=False, default=str, sort_keys=True)
        )
    return "\n".join(parts)
