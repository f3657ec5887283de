"""The doctor's rules: level, threshold, text and remedy; docs/doctor.md describes the method of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_dist.foundation.text import percent
from dpo_dist.insight.doctor.findings import DataRule, Finding, Level

_ERROR, _WARNING, _NOTE = Level.error, Level.warning, Level.note

RULES: dict[str, DataRule] = {
    "no_records": DataRule(_ERROR, "no record can be used", "correct the source", 0),
    "too_many_dropped": DataRule(
        _ERROR,
        "more records than data.max_bad_share allows cannot be used: training would refuse the source",
        "correct the records, or raise data.max_bad_share if dropping them is intended",
        0,
    ),
    "dropped": DataRule(
        _WARNING, "are dropped", "correct or remove them; docs/data.md explains the reason", 0.01
    ),
    "response_truncated": DataRule(
        _WARNING,
        "have a response that data.max_length cuts",
        "raise data.max_length, or set data.truncation=keep_end or drop",
        0.05,
    ),
    "prompt_truncated": DataRule(
        _WARNING, "have a prompt whose start is cut", "raise data.max_length or data.max_prompt_length", 0.05
    ),
    "short_response": DataRule(
        _WARNING,
        "have a response of one token or under 3 characters",
        "check that such responses are meant",
        0.1,
    ),
    "duplicates": DataRule(_WARNING, "equal an earlier record", "remove the copies", 0.01),
    "near_duplicates": DataRule(
        _WARNING,
        "nearly equal an earlier record",
        "remove near copies, or lower the weight of the source",
        0.05,
    ),
    "contradictions": DataRule(
        _ERROR,
        "contradict another record: same prompt and responses, opposite preference",
        "keep the preference that is right, or neither",
        0.005,
    ),
    "repeated_prompts": DataRule(
        _NOTE,
        "have the prompt of an earlier record and other responses",
        "none, if several preferences for a prompt are intended",
        0,
    ),
    "train_eval_leak": DataRule(
        _ERROR,
        "of the evaluation data have a prompt that is also in the training data",
        "remove these prompts from one of the two, or split by prompt",
        0,
    ),
    "near_train_eval_leak": DataRule(
        _WARNING,
        "of the evaluation data have nearly a prompt of the training data",
        "remove near copies before splitting",
        0.01,
    ),
    "benchmark_overlap": DataRule(
        _WARNING, "overlap with a benchmark prompt", "remove them, or do not report this benchmark", 0
    ),
    "one_response_starts_the_other": DataRule(
        _WARNING, "have a response that is the start of the other", "check for cut responses", 0.02
    ),
    "nearly_equal_sides": DataRule(
        _WARNING,
        "have nearly equal sides: both probabilities can fall (likelihood displacement)",
        "remove them, or use a loss that guards the chosen response",
        0.05,
    ),
    "response_repeats_prompt": DataRule(
        _WARNING, "have a response that repeats the prompt", "correct or remove these responses", 0.01
    ),
    "label_leak": DataRule(
        _ERROR,
        "the form of the responses reveals the chosen one",
        "make both sides alike in this feature: the policy would learn it in place of the preference",
        0.65,
    ),
    "style_bias": DataRule(
        _WARNING,
        "the style of the responses reveals the chosen one",
        "check that this style is preferred on purpose",
        0.65,
    ),
    "length_bias": DataRule(
        _WARNING,
        "the length of the responses reveals the chosen one",
        "balance the lengths, or use a length-normalised loss",
        0.65,
    ),
    "one_sided_form": DataRule(
        _WARNING,
        "a form occurs almost only on one side",
        "make both sides alike in this feature",
        0.9,
    ),
    "language_differs": DataRule(
        _WARNING,
        "have responses in two languages",
        "check that the chosen one has the language of the prompt",
        0.1,
    ),
    "score_ties": DataRule(
        _WARNING, "have equal scores on both sides", "remove ties: they state no preference", 0.05
    ),
    "score_inversions": DataRule(
        _ERROR, "have a chosen response with the lower score", "swap the responses, or correct the scores", 0
    ),
    "broken_text": DataRule(
        _WARNING, "have broken or invisible characters", "decode the source again, or remove them", 0.02
    ),
    "markup_in_text": DataRule(
        _WARNING,
        "have marks of a chat template in a text, which are encoded as text",
        "remove the marks, or set data.template=applied if a chat template was applied before",
        0.02,
    ),
    "turns": DataRule(
        _WARNING,
        "have turns out of order",
        "join, move or remove these turns, and end prompts with the user's turn",
        0.01,
    ),
    "prompt_not_prefix": DataRule(
        _WARNING,
        "have a prompt that the template renders otherwise when a response follows",
        "use a template that renders a prompt alike with and without a response",
        0.05,
    ),
    "unknown_template_argument": DataRule(
        _WARNING, "have an argument that the chat template does not read", "correct its name, or remove it", 0
    ),
    "doubled_tokens": DataRule(
        _ERROR,
        "start with BOS twice or end with the end token twice",
        "remove the token from the texts or the template",
        0,
    ),
    "boundary_resplit": DataRule(
        _WARNING,
        "have a response whose first token would merge with the prompt",
        "end prompts with a newline or start responses with a space, alike in all records",
        0.05,
    ),
    "thoughts": DataRule(
        _WARNING,
        "have thoughts other than the prompt asks for",
        "set the template's argument that turns thinking on or off (enable_thinking) as the responses are",
        0.01,
    ),
    "content_not_rendered": DataRule(
        _WARNING, "have a turn whose text the chat template omits or changes", "set data.chat_template", 0.01
    ),
    "chat_template_not_applied": DataRule(
        _WARNING,
        "are plain text although the tokenizer has a chat template",
        "set data.text_as_messages=true to train on turns",
        0.5,
    ),
    "tools_not_rendered": DataRule(
        _ERROR, "define tools, which the chat template does not render", "use a template with `tools`", 0
    ),
    "reference_disagrees": DataRule(
        _WARNING,
        "are likely mislabelled: the reference prefers the rejected response by far",
        "read these records, and swap or remove them",
        0.02,
    ),
}
"""All rules by name."""

KINDS = {
    "short_response": ("one_token_response", "short_chosen", "short_rejected"),
    "broken_text": (
        "replacement_character",
        "wrong_decoding",
        "control_character",
        "bidi_control",
        "zero_width_character",
        "unassigned_character",
        "carriage_return",
        "html_entity",
        "escaped_newline",
    ),
    "markup_in_text": ("special_token", "template_mark", "role_mark", "templated_text", "templated_content"),
    "turns": ("same_role_twice", "system_not_first", "empty_turn", "prompt_ends_with_assistant"),
    "doubled_tokens": ("doubled_bos", "doubled_end"),
    "thoughts": ("opened_thought_removed", "ended_thought_reopened"),
}
"""The kinds of a rule that is a family: its finding says how many records have each."""
RULE_OF = {kind: rule for rule, kinds in KINDS.items() for kind in kinds}

_LEVELS = tuple(reversed(Level))
_MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Judge:
    """Applies rules.

    Attributes:
        rules: by name.
    """

    rules: Mapping[str, DataRule]

    def threshold(self, name: str) -> float:
        """Return the threshold of a rule."""
        return self.rules[name].threshold

    def count(
        self,
        name: str,
        count: int,
        of: int,
        source: str | None,
        examples: Sequence[str] = (),
        *,
        detail: str = "",
        records: str = "records",
    ) -> list[Finding]:
        """Return the finding of a rule that `count` of `of` records break, if any does.

        At or below the threshold it is a note; `detail` follows the text after a colon.
        """
        rule = self.rules[name]
        if not count:
            return []
        level = rule.level if count > rule.threshold * of else Level.note
        text = (
            f"{count} of {of} {records} ({percent(count / of)}) {rule.text}{f': {detail}' if detail else ''}"
        )
        shown = tuple(examples[:_MAX_EXAMPLES])
        return [Finding(name, level, text, source, count, count / of, shown, rule.remedy)]

    def value(self, name: str, value: float, count: int, source: str | None, detail: str) -> list[Finding]:
        """Return the finding of a rule if `value` is above its threshold; `count` records were examined."""
        rule = self.rules[name]
        if value <= rule.threshold:
            return []
        text = f"{rule.text}: {detail}" if detail else rule.text
        return [Finding(name, rule.level, text, source, count, value, (), rule.remedy)]


def most_serious_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings by level, then by share."""
    return tuple(sorted(findings, key=lambda one: (_LEVELS.index(one.level), -(one.share or 0))))
