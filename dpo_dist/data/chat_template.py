"""Inspect chat templates: clocks, thoughts (`<think>`) opened in the prompt, tokens around turns."""

import json
import re
from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens around turns of common model families: a text may come from another tokenizer's template.
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
# Replaces "%%" until all directives are formatted.
_PERCENT = "\ufdd0"


def has_clock(template: str) -> bool:
    """Return whether the output of a template depends on the current date."""
    return _CLOCK in template


@lru_cache(maxsize=4)
def pin_clock(template: str, day: str) -> str:
    """Return the template with its clock fixed at midnight of `day` (ISO 8601).

    A macro with the clock's name shadows the function that transformers passes to templates.
    """
    if not has_clock(template):
        return template
    moment = date.fromisoformat(day)
    written = {"%%": _PERCENT}
    written |= {f"%-{letter}": moment.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dHIjmMS"}
    written |= {f"%{letter}": moment.strftime(f"%{letter}") for letter in _DIRECTIVES}
    written[_PERCENT] = "%"
    filters = "".join(f" | replace({json.dumps(d)}, {json.dumps(text)})" for d, text in written.items())
    # transformers removes the newline after a block, so the output of the template does not change.
    return f"{{%- macro {_CLOCK}(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro %}}\n{template}"


def turn_tokens(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> set[str]:
    """Return the added tokens that a template writes around turns, special or not.

    Without BOS, EOS and the tags of thoughts; empty if the template cannot render a conversation.
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
    """Return a pattern that matches any of `tokens`, preferring the longest."""
    return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or r"(?!)")


def has_foreign_marks(text: str) -> bool:
    """Return whether a text has turns of a common chat template."""
    return any(mark in text for mark in _FOREIGN_MARKS)


def opens_thought(prompt: str) -> bool:
    """Return whether a rendered prompt ends with an opened thought."""
    return prompt.rstrip().endswith(_OPEN)


def ends_thought(response: str) -> bool:
    """Return whether a response has the end of a thought."""
    return _CLOSE in response


def ends_opened_thought(response: str) -> bool:
    """Return whether a response ends the thought opened in its prompt, without opening it again."""
    return ends_thought(response) and not response.lstrip().startswith(_OPEN)


def without_open_thought(prompt: str) -> str:
    """Return the prompt without the thought opened at its end."""
    return prompt.rstrip().removesuffix(_OPEN)


def within_thought(response: str, prompt: str) -> str:
    """Return the response without the opening of a thought that its prompt has already opened."""
    after_tag = prompt[prompt.rindex(_OPEN) + len(_OPEN) :]
    start = response.lstrip()
    if not start.startswith(_OPEN):
        return response
    return start.removeprefix(_OPEN).removeprefix(after_tag)
