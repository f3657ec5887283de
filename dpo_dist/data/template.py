"""Chat templates: chosen, inspected, with a fixed date; the tokens that they write."""

import json
import re
from collections.abc import Collection, Iterable
from copy import copy
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from dpo_dist.config.data import DataConfig
from dpo_dist.foundation.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT_TAGS = ("<think>", "</think>")
_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Tags of transformers, which Jinja itself does not know.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt", "strftime_now"}


@lru_cache(maxsize=8)
def pin_clock(template: str, day: str) -> str:
    """Return the template with the date `day` (ISO 8601) for its calls of a clock with a literal format."""
    moment = datetime.fromisoformat(day)
    return _CLOCK_CALL.sub(lambda found: json.dumps(moment.strftime(found[2])), template)


@lru_cache(maxsize=8)
def argument_names(template: str) -> frozenset[str]:
    """Return the names that a template may read besides messages and tools. Raises ConfigError."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701
    try:
        tree = environment.parse(_GENERATION.sub("", template))
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


def check_template_keys(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that the chosen template exists and names the arguments for it. Raises ConfigError."""
    template = chosen_template(tokenizer, config.chat_template) or ""
    with_tools = chosen_template(tokenizer, config.chat_template, with_tools=True) or ""
    check_arguments(config.template_arguments or (), argument_names(template) | argument_names(with_tools))


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
    try:
        return Path(choice).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise _no_such_template(f"{choice}: {fault}", own if isinstance(own, dict) else {}) from fault


def check_template_file(choice: str | None) -> None:
    """Check that a chosen template that can only be a file exists; needs no tokenizer. Raises ConfigError."""
    if choice and (choice.endswith(".jinja") or "/" in choice) and not Path(choice).expanduser().exists():
        raise _no_such_template(choice, [])


def _no_such_template(got: str, names: Collection[str]) -> ConfigError:
    templates = f" or one of the tokenizer's templates ({', '.join(sorted(names))})" if names else ""
    return ConfigError(
        "the chat template does not exist, or cannot be read",
        where="data.chat_template",
        got=got,
        expected=f"a file with a Jinja template in UTF-8{templates}",
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
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": f"probe {number}"} for number, role in enumerate(roles)]
    try:
        rendered = tokenizer.apply_chat_template(
            turns, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # what its expressions raise, too; every record is rendered again
        return set()
    added = any_of(map(str, tokenizer.added_tokens_decoder.values()))
    return set(added.findall(str(rendered))) - {tokenizer.bos_token, tokenizer.eos_token, *THOUGHT_TAGS}


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of `tokens`, preferring the longest."""
    return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or r"(?!)")
