"""Findings about the chat template: tools that it does not render, arguments that nothing sets."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dpo_dist.config.data_schema import DataConfig
from dpo_dist.data.tokenization.chat_template import chosen_template
from dpo_dist.data.tokenization.template_arguments import argument_names
from dpo_dist.diagnostics.findings import Finding
from dpo_dist.diagnostics.judge import Judge
from dpo_dist.diagnostics.tally import SourceTally
from dpo_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Given by transformers, or a function that it adds.
_GIVEN = {"documents", "continue_final_message", "raise_exception", "strftime_now", "date_string"}


def template_findings(
    tally: SourceTally, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, judge: Judge
) -> Iterator[Finding]:
    """Yield the findings about the chat template and the records of a source."""
    tools = tally.names.counts["tools"]
    template = chosen_template(tokenizer, config.chat_template, with_tools=tools > 0)
    if template is None:
        return
    if tools and not re.search(r"\btools\b", template):
        examples = tally.names.examples["tools"]
        yield from judge.count("tools_not_rendered", tools, tally.readable, tally.label, examples)
    rendered = tally.readable - tally.names.counts["chat_template_not_applied"]
    unset = unset_arguments(template, tokenizer, config.template_arguments or {})
    if unset and rendered > tally.names.counts["template_arguments"]:
        yield from judge.value(
            "template_argument_unset", 1, rendered, tally.label, ", ".join(map(ascii, unset))
        )


def unset_arguments(
    template: str, tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, object]
) -> tuple[str, ...]:
    """Return the arguments that a chat template reads and that neither transformers nor the run sets, sorted.

    Empty if the template cannot be parsed.
    """
    try:
        names = argument_names(template)
    except ConfigError:
        return ()
    return tuple(sorted(names - _GIVEN - set(tokenizer.special_tokens_map) - set(arguments)))
