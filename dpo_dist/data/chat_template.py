"""Chat templates as texts: clocks in them, thoughts that they open, tokens that they write around turns."""

import json
import re
from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Around turns in common model families: the template that wrote a text may be another tokenizer's.
_FOREIGN_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<start_of_turn>",
    "[INST]",
)
FOREIGN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_OPEN, _CLOSE = "<think>", "</think>"
_CLOCK = "strftime_now"
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ"
# Stands for "%%" until all directives are written.
_PERCENT = "\ufdd0"


def has_clock(template: str) -> bool:
    """Whether what a template writes depends on the day."""
    return _CLOCK in template


@lru_cache(maxsize=4)
def pin_clock(template: str, day: str) -> str:
    """The template with a clock that stands at midnight of `day` (ISO 8601).

    A macro of the clock's name shadows the function that transformers gives to templates.
    """
    if not has_clock(template):
        return template
    moment = date.fromisoformat(day)
    written = {"%%": _PERCENT}
    written |= {f"%-{letter}": moment.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dHIjmMS"}
    written |= {f"%{letter}": moment.strftime(f"%{letter}") for letter in _DIRECTIVES}
    written[_PERCENT] = "%"
    filters = "".join(f" | replace({json.dumps(d)}, {json.dumps(text)})" for d, text in written.items())
    # transformers drops the line end after a block: the template starts as if nothing stood before it.
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro %}}\n{template}"


def turn_tokens(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> set[str]:
    """The added tokens that a template writes around turns, special or not; none of those around thoughts.

    BOS and EOS are not among them; there are none where the template cannot render a conversation.
    """
    if chat_template is None:
        return set()
    turns = [("user", "probe question"), ("assistant", "probe answer"), ("user", "another question")]
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except TemplateError:
        return set()
    found = set(any_of(map(str, tokenizer.added_tokens_decoder.values())).findall(str(rendered)))
    others = {tokenizer.bos_token, tokenizer.eos_token, _OPEN, _CLOSE}
    return {token for token in found - others if not token.isspace() and not token.isalnum()}


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of `tokens`, a longer one rather than one that starts it."""
    return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or r"(?!)")


def has_foreign_marks(text: str) -> bool:
    """Whether a text has the turns of some common chat template."""
    return any(mark in text for mark in _FOREIGN_MARKS)


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends within a thought."""
    return prompt.rstrip().endswith(_OPEN)


def ends_thought(answer: str) -> bool:
    """Whether an answer has a thought that ends."""
    return _CLOSE in answer


def ends_opened_thought(response: str) -> bool:
    """Whether a response ends the thought that its prompt has opened, without opening it again."""
    return ends_thought(response) and not response.lstrip().startswith(_OPEN)


def without_open_thought(prompt: str) -> str:
    """The prompt without the thought that it opens."""
    return prompt.rstrip().removesuffix(_OPEN)


def within_thought(answer: str, prompt: str) -> str:
    """The answer as it goes on from a prompt that has opened its thought already."""
    after_tag = prompt[prompt.rindex(_OPEN) + len(_OPEN) :]
    start = answer.lstrip()
    if not start.startswith(_OPEN):
        return answer
    return start.removeprefix(_OPEN).removeprefix(after_tag)
