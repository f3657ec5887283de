"""The doctor's rules: level, threshold, text and remedy; docs/doctor.md describes the method of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import percent
from dpo_dist.insight.doctor.findings import Finding, Level, Measure, Rule

_ERROR, _WARNING, _NOTE = Level.error, Level.warning, Level.note
_VALUE = Measure.value

READING = {
    "no_records": Rule(_ERROR, 0, "no record can be used", "correct the source", _VALUE),
    "too_many_dropped": Rule(
        _ERROR,
        0,
        "more records than data.max_bad_share allows cannot be used: training would refuse the source",
        "correct the records, or raise data.max_bad_share if dropping them is intended",
        _VALUE,
    ),
    "dropped": Rule(
        _WARNING, 0.01, "are dropped", "correct or remove them; docs/data.md explains the reason"
    ),
}
LENGTHS = {
    "response_truncated": Rule(
        _WARNING,
        0.05,
        "have a response that data.max_length cuts",
        "raise data.max_length, or set data.truncation=keep_end or drop",
    ),
    "prompt_truncated": Rule(
        _WARNING, 0.05, "have a prompt whose start is cut", "raise data.max_length or data.max_prompt_length"
    ),
    "one_token_response": Rule(
        _WARNING, 0.1, "have a response of one token", "check that such responses are meant"
    ),
    "short_chosen": Rule(
        _WARNING, 0.05, "have a chosen response under 3 characters", "check that such responses are meant"
    ),
    "short_rejected": Rule(
        _WARNING, 0.05, "have a rejected response under 3 characters", "check that such responses are meant"
    ),
}
COPIES = {
    "duplicates": Rule(_WARNING, 0.01, "equal an earlier record", "remove the copies"),
    "near_duplicates": Rule(
        _WARNING,
        0.05,
        "nearly equal an earlier record",
        "remove near copies, or lower the weight of the source",
    ),
    "contradictions": Rule(
        _ERROR,
        0.005,
        "contradict another record: same prompt and responses, opposite preference",
        "keep the preference that is right, or neither",
    ),
    "repeated_prompts": Rule(
        _NOTE,
        0,
        "have the prompt of an earlier record and other responses",
        "none, if several preferences for a prompt are intended",
    ),
    "train_eval_leak": Rule(
        _ERROR,
        0,
        "of the evaluation data have a prompt that is also in the training data",
        "remove these prompts from one of the two, or split by prompt",
    ),
    "near_train_eval_leak": Rule(
        _WARNING,
        0.01,
        "of the evaluation data have nearly a prompt of the training data",
        "remove near copies before splitting",
    ),
    "benchmark_overlap": Rule(
        _WARNING,
        0,
        "overlap with a benchmark prompt",
        "remove them, or do not report this benchmark",
    ),
    "one_response_starts_the_other": Rule(
        _WARNING, 0.02, "have a response that is the start of the other", "check for cut responses"
    ),
    "differs_only_in_spaces": Rule(
        _WARNING, 0.005, "have responses that differ in white space only", "remove these records"
    ),
    "differs_only_in_case": Rule(
        _WARNING, 0.005, "have responses that differ in capital letters only", "remove these records"
    ),
    "response_repeats_prompt": Rule(
        _WARNING, 0.01, "have a response that repeats the prompt", "correct or remove these responses"
    ),
}
LEAKS = {
    "label_leak": Rule(
        _ERROR,
        0.65,
        "the form of the responses reveals the chosen one",
        "make both sides alike in this feature: the policy would learn it in place of the preference",
        _VALUE,
    ),
    "style_bias": Rule(
        _WARNING,
        0.65,
        "the style of the responses reveals the chosen one",
        "check that this style is preferred on purpose",
        _VALUE,
    ),
    "length_bias": Rule(
        _WARNING,
        0.65,
        "the length of the responses reveals the chosen one",
        "balance the lengths, or use a length-normalised loss",
        _VALUE,
    ),
    "one_sided_form": Rule(
        _WARNING,
        0.9,
        "a form occurs almost only on one side",
        "make both sides alike in this feature",
        _VALUE,
    ),
    "one_sided_leading_space": Rule(
        _WARNING,
        0.05,
        "have white space before one of the two responses only",
        "strip the responses, or start both alike",
    ),
    "one_sided_trailing_space": Rule(
        _WARNING,
        0.2,
        "have white space after one of the two responses only",
        "strip the responses, or end both alike",
    ),
    "language_differs": Rule(
        _WARNING,
        0.1,
        "have responses in two languages",
        "check that the chosen one has the language of the prompt",
    ),
}
SCORES = {
    "score_ties": Rule(
        _WARNING, 0.05, "have equal scores on both sides", "remove ties: they state no preference"
    ),
    "score_inversions": Rule(
        _ERROR, 0, "have a chosen response with the lower score", "swap the responses, or correct the scores"
    ),
    "score_gap_small": Rule(
        _WARNING, 0.25, "have scores that differ by less than a tenth of their range", "require a larger gap"
    ),
    "ratings_contradict": Rule(
        _ERROR, 0, "have other ratings of the two sides that contradict the order", "check which is right"
    ),
    "length_follows_score": Rule(
        _WARNING,
        0.5,
        "the longer response has the higher score",
        "check whether the scores measure length",
        _VALUE,
    ),
}
CHARACTERS = {
    "replacement_character": Rule(
        _WARNING, 0.01, "have U+FFFD: broken decoding", "decode the source again, or remove these records"
    ),
    "wrong_decoding": Rule(
        _WARNING, 0.01, "have UTF-8 that was decoded as another encoding", "decode the source as UTF-8"
    ),
    "control_character": Rule(_WARNING, 0.01, "have control characters", "remove these characters"),
    "bidi_control": Rule(
        _WARNING, 0.01, "have characters that change the direction of text", "remove these characters"
    ),
    "zero_width_character": Rule(_WARNING, 0.05, "have zero-width characters", "remove these characters"),
    "unassigned_character": Rule(
        _WARNING, 0.01, "have private or unassigned characters", "decode the source again"
    ),
    "carriage_return": Rule(_NOTE, 0, "have carriage returns", "replace them by newlines"),
    "html_entity": Rule(_WARNING, 0.05, "have HTML entities", "unescape the texts"),
    "escaped_newline": Rule(
        _WARNING, 0.01, "have a backslash and `n` in place of newlines", "decode the texts once more"
    ),
}
STRUCTURE = {
    "special_token": Rule(
        _WARNING,
        0.005,
        "spell a special token of this tokenizer, which is encoded as text",
        "remove it, or set data.template=applied if a chat template was applied before",
    ),
    "template_mark": Rule(
        _WARNING,
        0.01,
        "spell marks of a chat template, which are encoded as text",
        "remove the marks: they come from another program",
    ),
    "role_mark": Rule(
        _WARNING,
        0.05,
        "have `Human:` or `Assistant:` inside a turn",
        "split these turns, or remove the records",
    ),
    "same_role_twice": Rule(
        _WARNING, 0.01, "have two turns of the same role in a row", "join these turns, or remove the records"
    ),
    "system_not_first": Rule(
        _WARNING, 0, "have a system turn that is not the first", "move it to the start, or remove it"
    ),
    "empty_turn": Rule(_WARNING, 0.01, "have an empty turn in the prompt", "remove these turns"),
    "prompt_ends_with_assistant": Rule(
        _WARNING,
        0.01,
        "have a prompt that ends with an assistant turn",
        "the response is another turn and does not continue it: end prompts with the user's turn",
    ),
}
ENCODING = {
    "prompt_not_prefix": Rule(
        _WARNING,
        0.05,
        "have a prompt that the template renders otherwise when a response follows",
        "use a template that renders a prompt alike with and without a response",
    ),
    "unknown_template_argument": Rule(
        _WARNING, 0, "have an argument that the chat template does not read", "correct its name, or remove it"
    ),
    "templated_content": Rule(
        _WARNING, 0.05, "have turns that seem to be the output of a chat template", "remove the marks"
    ),
    "doubled_bos": Rule(_ERROR, 0, "start with BOS twice", "remove BOS from the texts or the template"),
    "doubled_end": Rule(_ERROR, 0, "end with the end token twice", "remove it from the texts"),
    "boundary_resplit": Rule(
        _WARNING,
        0.05,
        "have a response whose first token would merge with the prompt",
        "end prompts with a newline or start responses with a space, alike in all records",
    ),
    "opened_thought_removed": Rule(
        _WARNING,
        0.05,
        "have responses without the thought that the template opens",
        "set the template's argument that turns thinking off",
    ),
    "ended_thought_reopened": Rule(
        _WARNING,
        0,
        "have a response with a thought although the prompt ends the thought",
        "set enable_thinking=true for these records, or remove the thoughts",
    ),
    "content_not_rendered": Rule(
        _WARNING, 0.01, "have a turn whose text the chat template omits or changes", "set data.chat_template"
    ),
    "opened_thought_joined": Rule(
        _NOTE, 0, "have responses that open the thought which the template opens", "none is needed"
    ),
    "templated_text": Rule(
        _WARNING, 0.05, "seem to be the output of a chat template", "set data.template=applied or literal"
    ),
    "chat_template_not_applied": Rule(
        _WARNING,
        0.5,
        "are plain text although the tokenizer has a chat template",
        "set data.text_as_messages=true to train on turns",
    ),
    "tools_not_rendered": Rule(
        _ERROR, 0, "define tools, which the chat template does not render", "use a template with `tools`"
    ),
    "template_argument_unset": Rule(
        _NOTE,
        0,
        "the chat template reads arguments that nothing sets",
        "set them if its defaults are not meant",
        _VALUE,
    ),
}
MARGINS = {
    "reference_disagrees": Rule(
        _WARNING,
        0.02,
        "are likely mislabelled: the reference prefers the rejected response by far",
        "read these records, and swap or remove them",
    ),
    "reference_solved": Rule(
        _WARNING,
        0.5,
        "are solved: the reference prefers the chosen response by far",
        "choose harder pairs: these change little",
    ),
    "nearly_equal_sides": Rule(
        _WARNING,
        0.1,
        "have nearly equal sides: both probabilities can fall (likelihood displacement)",
        "remove them, or use a loss that guards the chosen response",
    ),
}

RULES: dict[str, Rule] = (
    READING | LENGTHS | COPIES | LEAKS | SCORES | CHARACTERS | STRUCTURE | ENCODING | MARGINS
)
"""All rules by name."""


_LEVELS = tuple(reversed(Level))
_MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Judge:
    """Applies rules.

    Attributes:
        rules: by name, with the thresholds of the configuration.
    """

    rules: Mapping[str, Rule]

    @classmethod
    def with_thresholds(cls, thresholds: Mapping[str, float]) -> "Judge":
        """Return a judge with other thresholds for some rules. Raises ConfigError for an unknown rule."""
        check_thresholds(thresholds)
        changed = {name: replace(RULES[name], threshold=float(value)) for name, value in thresholds.items()}
        return cls(RULES | changed)

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
        if not count or (rule.measure is Measure.value and count <= rule.threshold * of):
            return []
        level = rule.level if count > rule.threshold * of else Level.note
        text = (
            f"{count} of {of} {records} ({percent(count / of)}) {rule.text}{f': {detail}' if detail else ''}"
        )
        shown = tuple(examples[:_MAX_EXAMPLES])
        return [Finding(name, level, text, source, count, count / of, shown, rule.remedy)]

    def value(
        self,
        name: str,
        value: float,
        count: int,
        source: str | None,
        detail: str,
        examples: Sequence[str] = (),
    ) -> list[Finding]:
        """Return the finding of a rule if `value` is above its threshold; `count` records were examined."""
        rule = self.rules[name]
        if value <= rule.threshold:
            return []
        text = f"{rule.text}: {detail}" if detail else rule.text
        shown = tuple(examples[:_MAX_EXAMPLES])
        return [Finding(name, rule.level, text, source, count, value, shown, rule.remedy)]


def check_thresholds(thresholds: Mapping[str, float]) -> None:
    """Check that each threshold is of a rule. Raises ConfigError."""
    unknown = [name for name in thresholds if name not in RULES]
    if unknown:
        near = get_close_matches(unknown[0], RULES, n=3)
        raise ConfigError(
            "the doctor has no such rule",
            where="doctor.thresholds",
            got=unknown[0],
            expected="a rule of docs/doctor.md",
            remedy=f"did you mean {' or '.join(near)}?" if near else "see docs/doctor.md",
        )


def most_serious_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings by level, then by share."""
    return tuple(sorted(findings, key=lambda one: (_LEVELS.index(one.level), -(one.share or 0))))
