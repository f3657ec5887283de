"""Checks of a chat template itself: arguments that nothing sets, tools that it does not render."""

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_dist.diagnostics.findings import Finding
from dpo_dist.diagnostics.judge import Judge
from dpo_dist.diagnostics.tally import SourceTally

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


def template_findings(
    tally: SourceTally, tokenizer: "PreTrainedTokenizerBase", judge: Judge
) -> Iterator[Finding]:
    """Yield the findings about the chat template and the records of a source."""
    tools = tally.names.counts["tools"]
    if tools and not renders_tools(tokenizer):
        examples = tally.names.examples["tools"]
        yield from judge.count("tools_not_rendered", tools, tally.readable, tally.label, examples)


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
        tree: nodes.Template = environment.parse(
            template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
        return frozenset(meta.find_undeclared_variables(tree))
    except TemplateError:
        return frozenset()
