"""Chat templates: chosen, inspected, with a fixed date; thoughts and turns in their output."""

import json
import re
from collections.abc import Collection, Iterable
from copy import copy
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from dpo_dist.foundation.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tags of transformers, which Jinja itself does not know.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt"}


@lru_cache(maxsize=8)
def argument_names(template: str) -> frozenset[str]:
    """Return the names that a template may read besides messages and tools. Raises ConfigError."""
    source = _GENERATION.sub("", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701
    try:
        tree = environment.parse(source)
    except (TemplateError, RecursionError) as fault:
        raise ConfigError(
            "the chat template is not valid Jinja",
            where="data.chat_template (null: the tokenizer's own)",
            got=first_line(fault),
            remedy="correct the template, or name another one: data.chat_template=FILE",
        ) from fault
    return frozenset(find_undeclared_variables(tree)) - _OWN_VARIABLES


def check_arguments(arguments: Iterable[str], known: Collection[str]) -> None:
    """Check that a template names each of the arguments of the run. Raises ConfigError."""
    if unknown := sorted(set(arguments) - set(known)):
        raise ConfigError(
            "the chat template has no such argument",
            where="data.template_arguments",
            got=", ".join(unknown),
            expected=", ".join(sorted(known)) or "no arguments: the template names none",
            remedy="correct or remove these arguments, or choose another template by data.chat_template",
        )


# Tokens around turns of common model families: a text may come from another tokenizer's template.
FOREIGN_MARKS = (
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
THOUGHT_TAGS = _OPEN, _CLOSE = "<think>", "</think>"
_EMPTY_END = re.compile(rf"\s*{_CLOSE}\s*")
_ENDED = re.compile(rf"(?:{_OPEN}\s*)?{_CLOSE}\s*\Z")
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


def chosen_template(
    tokenizer: "PreTrainedTokenizerBase", choice: str | None, *, with_tools: bool = False
) -> str | None:
    """Return the chat template that `data.chat_template` chooses; None if the tokenizer has none.

    `choice` is a file, the name of one of the tokenizer's templates, or None: its only or default one, or the
    one for tools. Raises ConfigError: there is no such file and no such template.
    """
    own = tokenizer.chat_template
    if choice is None:
        return str(tokenizer.get_chat_template(tools=[{}] if with_tools else None)) if own else None
    if isinstance(own, dict) and choice in own:
        return str(own[choice])
    file = Path(choice).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _no_such_template(choice, sorted(own) if isinstance(own, dict) else []) from None
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            "the chat template cannot be read",
            where="data.chat_template",
            got=f"{file}: {fault}",
            remedy="name a readable file in UTF-8",
        ) from fault


def check_template_file(choice: str | None) -> None:
    """Check that a chosen template that can only be a file exists; needs no tokenizer. Raises ConfigError."""
    if choice and (choice.endswith(".jinja") or "/" in choice) and not Path(choice).expanduser().exists():
        raise _no_such_template(choice, [])


def _no_such_template(choice: str, names: list[str]) -> ConfigError:
    templates = f"one of the tokenizer's templates ({', '.join(names)})" if names else ""
    return ConfigError(
        "the chat template does not exist",
        where="data.chat_template",
        got=choice,
        expected=" or ".join(filter(None, ["a file with a Jinja template", templates])),
        remedy="correct the path, or remove data.chat_template to use the tokenizer's own template",
    )


def with_chosen_template(tokenizer: "PreTrainedTokenizerBase", choice: str) -> "PreTrainedTokenizerBase":
    """Return a copy of a tokenizer with the template of `data.chat_template`, to be saved with a model."""
    changed, own = copy(tokenizer), tokenizer.chat_template
    chosen = chosen_template(tokenizer, choice)
    changed.chat_template = {**own, "default": chosen} if isinstance(own, dict) else chosen
    return changed


def turn_tokens(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> set[str]:
    """Return the added tokens that a template writes around turns, special or not.

    Without BOS, EOS and the tags of thoughts; empty if the template cannot render a conversation.
    """
    if chat_template is None:
        return set()
    turns = [("user", "probe question"), ("assistant", "probe answer"), ("user", "another question")]
    try:
        rendered = str(
            tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except Exception:  # what its expressions raise, too; every record is rendered again
        return set()
    found = set(any_of(map(str, tokenizer.added_tokens_decoder.values())).findall(rendered))
    others = {tokenizer.bos_token, tokenizer.eos_token, _OPEN, _CLOSE}
    return set(filter(_has_delimiters, found - others))


def written_tokens(added: Iterable[str], chat_template: str | None) -> set[str]:
    """Return the added tokens that a template names, such as tags of tool calls, and the tags of thoughts."""
    template = chat_template or ""
    return {
        token for token in added if token in THOUGHT_TAGS or (token in template and _has_delimiters(token))
    }


def _has_delimiters(token: str) -> bool:
    return not token.isspace() and not token.isalnum()


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of `tokens`, preferring the longest."""
    return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or r"(?!)")


def has_foreign_marks(text: str) -> bool:
    """Return whether a text has turns of a common chat template."""
    return any(mark in text for mark in FOREIGN_MARKS)


def opens_thought(prompt: str) -> bool:
    """Return whether a rendered prompt ends with an opened thought."""
    return prompt.rstrip().endswith(_OPEN)


def has_ended_thought(prompt: str) -> bool:
    """Return whether a rendered prompt ends with the end of a thought."""
    return prompt.rstrip().endswith(_CLOSE)


def ends_thought(response: str) -> bool:
    """Return whether a response has the end of a thought."""
    return _CLOSE in response


def without_ended_thought(prompt: str) -> str:
    """Return the prompt without the empty thought at its end."""
    return _ENDED.sub("", prompt)


def end_of_empty_thought(response: str) -> str:
    """Return the end of an opened empty thought at the start of a response, with the spaces around it."""
    found = _EMPTY_END.match(response)
    return found.group() if found else ""


def split_thought(response: str) -> tuple[str, str]:
    """Return the response up to the end of its thought, and the rest."""
    end = response.rindex(_CLOSE) + len(_CLOSE)
    return response[:end], response[end:]


def before_open_thought(text: str) -> str:
    """Return a text up to a thought that is opened and not closed in it, else the text."""
    before, opened, thought = text.rpartition(_OPEN)
    return before if opened and _CLOSE not in thought else text


def within_thought(response: str, prompt: str) -> str:
    """Return the response without the opening of a thought that its prompt has already opened."""
    after_tag = prompt[prompt.rindex(_OPEN) + len(_OPEN) :]
    start = response.lstrip()
    if not start.startswith(_OPEN):
        return response
    return start.removeprefix(_OPEN).removeprefix(after_tag)
