"""Texts of a record as plain strings, their words and MinHash signatures, and the names of their faults."""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from dpo_dist.data.records import Dialogue, Message, PreferenceRecord, Response
from dpo_dist.generation.text_facts import is_refusal

SIGNATURE_NUMBERS = 64
EMPTY_SKETCH = MinHash(SIGNATURE_NUMBERS, seed=1, hashfunc=zlib.crc32)
Signature = npt.NDArray[np.uint32]

# A letter of a script without spaces (kana, Chinese, Hangul excluded) is a word of its own.
_WORD_ONLY = re.compile(r"[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|\d+|[\u3040-\u30ff\u3400-\u9fff]")
_WORD = re.compile(rf"{_WORD_ONLY.pattern}|[^\w\s]|_")
_SHORT_CHARACTERS = 3
_NEARLY_EQUAL = 0.1
_THOUGHTS = ("reasoning_content", "thinking")
# Roles of which several turns in a row are usual.
_REPEATABLE_ROLES = {"tool", "function", "observation"}

_KINDS = {
    "carriage_return": re.compile("\r"),
    "control_character": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "template_mark": re.compile(
        r"<\|(im_start|im_end|endoftext|eot_id|begin_of_text|start_header_id|end_header_id|user|assistant|system"
        r"|end|channel|message|return)\|>|</?(start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</s>|<s>|<(bos|eos|pad|unk)>"
        r"|^[ \t]{0,8}#{2,3} ?(Instruction|Response|Human|Assistant|Input):",
        re.MULTILINE,
    ),
    "role_mark": re.compile(r"\b(Human|Assistant|User):|^[ \t]{0,8}(USER|ASSISTANT|SYSTEM):", re.MULTILINE),
    "html_entity": re.compile(r"&(amp|lt|gt|quot|nbsp|#\d{2,4}|#x[0-9a-fA-F]{2,4});"),
    "escaped_newline": re.compile(r"\A[^\n]*[^\\\n]\\n(\\n|[^a-zA-Z\\\n])[^\n]*\Z"),
    "replacement_character": re.compile("\ufffd"),
    "zero_width_character": re.compile("[\u200b\u2060\ufeff\u180e]"),
    "bidi_control": re.compile("[\u202a-\u202e\u2066-\u2069]"),
    "unassigned_character": re.compile("[\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]"),
    # UTF-8 that was read as Windows-1252 or Latin-1, as ftfy detects it.
    "wrong_decoding": re.compile(
        "\u00e2\u20ac[\u2122\u0153\u201c\u201d\u02dc\u00a6\u009d]|\u00c3[\u0080-\u00bf]|\u00ef\u00bb\u00bf"
    ),
}
_MODEL_NAME = re.compile(
    r"\bas an? (\w+ )?(AI|language model)\b|\bI(\W{0,2}m| am) an? (\w+ )?(AI|language model)\b"
    r"|\b(Chat)?GPT(-?\d\w*)?\b|\b(OpenAI|Anthropic|Claude|DeepSeek|Qwen|Mistral|LLaMA|Gemini|ERNIE|ChatGLM)\b"
    "|\u4f5c\u4e3a\u4e00(\u4e2a|\u540d|\u6b3e)?(AI|\u4eba\u5de5\u667a\u80fd|\u8bed\u8a00\u6a21\u578b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Texts:
    """Role and content of each turn of a prompt, and the responses, their turns joined by newlines."""

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
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    turns = tuple((message.role, _turn_text(message)) for message in messages)
    return Texts(turns, tuple(map(_response_text, record.responses)))


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


def words_and_marks(text: str) -> list[str]:
    """Return the words, numbers and punctuation marks of a text, in their case."""
    return _WORD.findall(text)


def plain_words(text: str) -> list[str]:
    """Return the words and numbers of a text without case."""
    return _WORD_ONLY.findall(text.casefold())


def signature(text: str) -> Signature:
    """Return the MinHash signature, uint32 [64], of a text's pairs of consecutive words (Broder 1997).

    Case and punctuation are ignored; all numbers count as the same word. The share of equal numbers of two
    signatures estimates the Jaccard similarity of both sets of pairs, with a standard error of at most 0.06.
    """
    words = ["0" if word.isdecimal() else word for word in plain_words(text)] or words_and_marks(text)
    pairs = {f"{one} {other}".encode("utf-8", "replace") for one, other in pairwise(words)}
    sketch = EMPTY_SKETCH.copy()
    sketch.update_batch(sorted(pairs or {word.encode("utf-8", "replace") for word in words}))
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


@lru_cache(maxsize=8)
def names_model(response: str) -> bool:
    """Return whether a response names a model or says that an AI wrote it."""
    return _MODEL_NAME.search(response) is not None


def text_names(record: PreferenceRecord, texts: Texts) -> Iterator[str]:
    """Yield names of rules, of their kinds, and of shares that concern the texts of a record."""
    for text in (*(content for _role, content in texts.turns), *texts.responses):
        yield from (name for name, pattern in _KINDS.items() if pattern.search(text))
    yield from _names_of_turns(record, texts)
    if len(texts.responses) > 1:
        yield from _names_of_pair(record, texts)
    if any(
        response.strip() and response.strip() == texts.turns[-1][1].strip() for response in texts.responses
    ):
        yield "response_repeats_prompt"


def _names_of_turns(record: PreferenceRecord, texts: Texts) -> Iterator[str]:
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


def _names_of_pair(record: PreferenceRecord, texts: Texts) -> Iterator[str]:
    chosen, rejected = texts.responses[0], texts.responses[-1]
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if is_refusal(response):
            yield f"refusal_{side}"
        if names_model(response):
            yield f"model_name_{side}"
        if len(response.strip()) < _SHORT_CHARACTERS:
            yield f"short_{side}"
    if len(chosen) > len(rejected):
        yield "chosen_longer"
    first, second = sorted((chosen.strip(), rejected.strip()), key=len)
    if first and second.startswith(first):
        yield "one_response_starts_the_other"
    # Longer responses may share turns of the user.
    is_one_turn = all(isinstance(each, str) or len(each) == 1 for each in record.responses)
    if is_one_turn and _distance(chosen, rejected) < _NEARLY_EQUAL:
        yield "nearly_equal_sides"


def _distance(first: str, second: str) -> float:
    """Return the share of words that only one of two texts has, 0 (the same words) to 1.

    The order of the words is ignored: the value is at most the normalised edit distance.
    """
    words, others = Counter(first.casefold().split()), Counter(second.casefold().split())
    both = words.total() + others.total()
    if abs(words.total() - others.total()) >= _NEARLY_EQUAL * both:
        return 1.0
    return ((words - others).total() + (others - words).total()) / both
