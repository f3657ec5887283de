"""Counts of records in words, for the screen."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.plurals import counted

_WORDS = {
    "prompt_truncated": "with a cut prompt",
    "response_truncated": "with a cut response",
    "boundary_resplit": "with responses tokenised by themselves",
    "templated_text": "like output of a chat template",
    "templated_content": "with template tokens as text",
    "opened_thought_joined": "with a thought joined to the template's",
    "opened_thought_removed": "without the template's empty thought",
    "ended_thought_reopened": "with a thought after the template's",
    "prompt_not_prefix": "with a prompt that the template renders differently alone",
    "unknown_template_argument": "with an argument that the template does not use",
    "content_not_rendered": "with content that the template omits or changes",
    "partly_trained": "with tokens that the loss does not count",
    "duplicates": "repeated",
    "also_in_train": "also in the training data",
    "prompts_also_in_train": "with a prompt of the training data",
    "held_out_for_eval": "held out for evaluation",
    "left_in_train": "used for training",
    "ties_left_out": "ties omitted",
}
"""Words after the number of examples, by the name of their count; unread fields have their own names."""
_OWN_LINE = "chat_template_not_applied"
_NO_CHANGES = frozenset(
    {"label", "path", "read", "kept", "pairs", "dropped", "examples", "details", "sources", _OWN_LINE}
)


def describe_counts(name: str, counts: Mapping[str, Any]) -> list[str]:
    """Return lines for the screen: kept, dropped and changed records, of all sources and of each."""
    lines = [f"{name} data: {_described(counts)}"]
    sources = counts["sources"] if len(counts["sources"]) > 1 else []
    lines += [
        f"{name} data: {source['label']} ({source['path']}): {_described(source)}" for source in sources
    ]
    if plain := counts.get(_OWN_LINE):
        lines.append(
            f"{name} data: {plain:,} of {counted(counts['kept'], 'record')} "
            f"{'is' if counts['kept'] == 1 else 'are'} plain text, without the chat template "
            "(data.text_as_messages=true makes their prompts user turns)"
        )
    return lines


def _described(counts: Mapping[str, Any]) -> str:
    """Return the counts as one line."""
    parts = [f"{counts['kept']:,} of {counted(counts['read'], 'record')} kept"]
    if counts.get("pairs", counts["kept"]) != counts["kept"]:
        parts.append(f"{counted(counts['pairs'], 'example')} made of them")
    parts += [f"{number:,} dropped ({reason})" for reason, number in sorted(counts["dropped"].items())]
    changes = sorted(name for name in counts if name not in _NO_CHANGES and counts[name])
    parts += [f"{counts[name]:,} {_WORDS.get(name, name.replace('_', ' '))}" for name in changes]
    return ", ".join(parts)
