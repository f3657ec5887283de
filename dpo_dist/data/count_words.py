"""Counts of records in words, for people who do not know the names of the counts (docs/data.md)."""

from collections.abc import Mapping
from typing import Any

from dpo_dist.data.sampler import BatchSampler
from dpo_dist.number_text import counted

_WORDS = {
    # Records that are dropped.
    "unparsable": "the line cannot be parsed",
    "unknown_format": "the fields are of no known format",
    "ambiguous_format": "the record has two formats, or two different pairs",
    "unpaired": "a single response with a good or bad label",
    "missing_field": "a prompt or response is missing",
    "no_ranking": "fewer than two responses",
    "all_tied": "no response is better than another",
    "history_differs": "the turns before the two responses differ",
    "not_one_answer": "a side does not end with a turn of the assistant",
    "roles_out_of_turn": "the roles of the turns are unknown or out of order",
    "untrained_response": "no turn of a response has a weight in the loss",
    "unread_content": "a field that the responses may depend on is not read",
    "invalid_tools": "the definitions of tools are no JSON objects",
    "invalid_tool_call": "a tool call is no JSON object",
    "invalid_scores": "a score is missing, or is no number",
    "invalid_unicode": "a text is no valid Unicode",
    "reserved_character": "a text has a character that the encoder reserves",
    "special_token_in_text": "a text spells a special token, and the tokenizer cannot encode it as text",
    "template_rejected": "the chat template rejects the conversation",
    "tools_not_rendered": "the chat template does not write the tools",
    "calls_not_rendered": "the chat template does not write a tool call",
    "thought_not_rendered": "the chat template does not write the thought of the last turn",
    "turn_not_rendered": "the chat template does not write a turn of a response",
    "turns_not_found": "the turns of a response are not found in the output of the chat template",
    "no_trained_token": "the loss would count no token of a response",
    "empty_prompt": "the prompt is empty",
    "empty_response": "a response is empty",
    "identical_responses": "two responses are the same",
    "identical_after_encoding": "two responses have the same tokens",
    "identical_after_truncation": "two responses have the same tokens after they were cut",
    "too_long": "longer than data.max_length",
    "prompt_fills_max_length": "the prompt fills data.max_length: no room for a response",
    "response_fills_max_length": "a response fills data.max_length: no room for the prompt",
    # Records that are changed, or particular.
    "prompt_truncated": "the start of the prompt is cut",
    "response_truncated": "the end of a response is cut, and with it the token that ends it",
    "chosen_truncated": "the end of the chosen response is cut",
    "rejected_truncated": "the end of the rejected response is cut",
    "boundary_resplit": "a response is tokenised apart from its prompt, to keep the prompt's last tokens",
    "templated_text": "a text seems to be the output of a chat template",
    "templated_content": "a message has tokens of a chat template, which are encoded as text",
    "opened_thought_joined": "the opening of a thought is in the prompt, and removed from the response",
    "opened_thought_removed": "the prompt's opening of a thought is removed, as a response has none",
    "ended_thought_reopened": "a response has a thought although the template ends it in the prompt",
    "prompt_not_prefix": "the chat template writes the prompt alone differently",
    "unknown_template_argument": "an argument that the chat template does not use",
    "content_not_rendered": "the chat template omits or changes the text of a turn",
    "partly_trained": "the loss does not count all tokens of the responses",
    "ties_left_out": "pairs of equal scores, which are not used",
    "chat_template_not_applied": "plain text, although the tokenizer has a chat template",
    "duplicates": "pairs with the same tokens as an earlier pair",
    "also_in_train": "pairs with the same tokens as a training pair",
    "held_out_for_eval": "reserved for evaluation, not trained",
    "left_in_train": "in the training part of the split",
    "prompts_also_in_train": "pairs whose prompt is also in the training data",
}
_UNREAD = "unread_"
_OWN_LINE = "chat_template_not_applied"
_NO_CHANGES = frozenset(
    {
        "label",
        "path",
        "read",
        "kept",
        "pairs",
        "dropped",
        "read_as",
        "examples",
        "details",
        "sources",
        _OWN_LINE,
    }
)


def in_words(name: str) -> str:
    """Return the meaning of a count or of a reason; an unknown name with spaces."""
    if name in _WORDS:
        return _WORDS[name]
    if name.startswith(_UNREAD):
        return f"the field {name.removeprefix(_UNREAD)} is not read"
    return name.replace("_", " ")


def in_one_line(counts: Mapping[str, int]) -> str:
    """Return counts with their meaning: "1 empty_response (a response is empty), ..."; empty without any."""
    named = sorted((name, number) for name, number in counts.items() if number)
    return ", ".join(
        f"{number:,} {name}" + (f" ({in_words(name)})" if name in _WORDS else "") for name, number in named
    )


def describe_counts(name: str, counts: Mapping[str, Any]) -> list[str]:
    """Return lines for the screen: kept, dropped and changed records; of each source also how it was read."""
    lines = [f"{name} data: {_kept(counts)}"]
    lines += describe_dropped(counts["dropped"])
    changes = sorted(name for name in counts if name not in _NO_CHANGES and counts[name])
    lines += [f"  {counts[change]:,} {change}: {in_words(change)}" for change in changes]
    for source in counts["sources"]:
        dropped = "".join(f", {number:,} {reason}" for reason, number in sorted(source["dropped"].items()))
        name = f"{source['path']}: {counted(source['kept'], 'record')}"
        if len(counts["sources"]) > 1:
            name = f"of {source['label']} ({source['path']}): {_kept(source)}{dropped}"
        lines.append(f"  {name}: {read_in_words(source['read_as'])}")
    if plain := counts.get(_OWN_LINE):
        records = counted(counts["kept"], "record")
        lines.append(
            f"  {plain:,} of {records} {'is' if plain == 1 else 'are'} plain text, without the chat template "
            "(data.text_as_messages=true makes their prompts user turns)"
        )
    return lines


def read_in_words(read_as: Mapping[str, int]) -> str:
    """Return how kept records were read, with their numbers if it was in several ways."""
    if len(read_as) == 1:
        return next(iter(read_as))
    return "; ".join(f"{number:,} {form}" for form, number in sorted(read_as.items()))


def describe_dropped(dropped: Mapping[str, int]) -> list[str]:
    """Return lines about dropped records, by reason."""
    return [
        f"  {number:,} dropped ({reason}): {in_words(reason)}" for reason, number in sorted(dropped.items())
    ]


def _kept(counts: Mapping[str, Any]) -> str:
    kept = f"{counts['kept']:,} of {counted(counts['read'], 'record')} kept"
    pairs = counts.get("pairs", counts["kept"])
    return kept if pairs == counts["kept"] else f"{kept}, {counted(pairs, 'example')} made of them"


def describe_short_run(sampler: BatchSampler) -> list[str]:
    """Return a line for the log if the dataset is small for the batch size, else none."""
    pairs, batch = sampler.pairs_per_epoch, sampler.global_batch_pairs
    times = -(-min(batch, sampler.total_pairs) // pairs)
    if times > 1:
        return [
            f"warning: an epoch has {counted(pairs, 'pair')} and trainer.global_batch_pairs is {batch:,}: "
            f"each pair occurs up to {times:,} times in one step"
        ]
    if sampler.steps == 1:
        return [
            f"warning: the whole run is 1 step: {counted(sampler.total_pairs, 'pair')} with "
            f"trainer.global_batch_pairs={batch}; lower it or raise trainer.epochs"
        ]
    return []
