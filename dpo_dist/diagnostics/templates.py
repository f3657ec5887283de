"""Checks of a chat template itself: arguments that nothing sets, tools that it does not render."""

from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Given by transformers, or a function that it adds.
_GIVEN = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "raise_exception",
    "strftime_now",
    "tojson",
}


def unset_arguments(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Return the arguments that the chat template reads and transformers does not give, sorted.

    Special tokens such as `bos_token` are given. Empty without a template, or if it cannot be parsed.
    """
    names = _undeclared(_template(tokenizer)) - _GIVEN - set(tokenizer.special_tokens_map)
    return tuple(sorted(names))


def renders_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the chat template reads `tools`."""
    return "tools" in _undeclared(_template(tokenizer))


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


@lru_cache(maxsize=4)
def _undeclared(template: str) -> frozenset[str]:
    # The extensions that transformers loads.
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree: nodes.Template = environment.parse(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
        return frozenset(meta.find_undeclared_variables(tree))
    except TemplateError:
        return frozenset()
