"""Counts of kept, dropped and changed records, and checks that enough of a source is left."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.batching.sampler import BatchSampler
from dpo_dist.config.data import DataConfig, TextTemplate
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.text import counted

_COLUMNS = (
    "name the columns of the source: columns: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}; "
    "correct its format, if one is set"
)
UNPAIRED_REMEDY = (
    "pair good and bad responses to the same prompt; a loss for unpaired responses (KTO) is not offered; "
    "if the label is no judgement of the response, ignore it: columns: {label: null}"
)
_CUT_PROMPTS = "set data.max_prompt_length or data.truncation=keep_end to cut the start of prompts"


@dataclass(frozen=True)
class Reason:
    """Why a record is dropped, and what to do about it."""

    words: str
    remedy: str = "correct the records; docs/data.md explains the reason"


_REASONS = {
    "unparsable": Reason(
        "the line cannot be parsed",
        "check how the file was written; the name of one with a JSON object per line ends in .jsonl",
    ),
    "unknown_format": Reason(
        "the fields are of no known format",
        f"{_COLUMNS}; or convert the records to one of the formats in docs/data.md",
    ),
    "ambiguous_format": Reason(
        "the record has two formats, or two different pairs",
        "set format of the source, or ignore a column: columns: {COLUMN: null}",
    ),
    "unpaired": Reason("a single response with a good or bad label", UNPAIRED_REMEDY),
    "missing_field": Reason("a prompt or response is missing", _COLUMNS),
    "no_ranking": Reason("fewer than two responses"),
    "all_tied": Reason("no response is better than another"),
    "history_differs": Reason("the turns before the two responses differ"),
    "not_one_answer": Reason("a side does not end with a turn of the assistant"),
    "roles_out_of_turn": Reason("the roles of the turns are unknown or out of order"),
    "untrained_response": Reason("no turn of a response has a weight in the loss"),
    "unread_content": Reason(
        "a field that the responses may depend on is not read",
        "if the responses do not depend on these fields, ignore them: columns: {COLUMN: null}",
    ),
    "invalid_tools": Reason("the definitions of tools are no JSON objects"),
    "invalid_tool_call": Reason("a tool call is no JSON object"),
    "invalid_scores": Reason("a score is missing, or is no number"),
    "invalid_unicode": Reason("a text is no valid Unicode"),
    "reserved_character": Reason("a text has a character that the encoder reserves"),
    "special_token_in_text": Reason(
        "a text spells a special token, and the tokenizer cannot encode it as text"
    ),
    "template_rejected": Reason(
        "the chat template rejects the conversation",
        "write the turns as the chat template accepts them, or set data.chat_template",
    ),
    "turn_not_rendered": Reason("the chat template does not write a turn of a response"),
    "turns_not_found": Reason("the turns of a response are not found in the output of the chat template"),
    "no_trained_token": Reason(
        "the loss would count no token of a response",
        "check data.trained_roles, data.untrained, and the weights of messages (loss_weight)",
    ),
    "empty_prompt": Reason("the prompt is empty"),
    "empty_response": Reason("a response is empty"),
    "identical_responses": Reason("two responses are the same"),
    "identical_after_encoding": Reason("two responses have the same tokens"),
    "identical_after_truncation": Reason(
        "two responses have the same tokens after they were cut", f"raise data.max_length, or {_CUT_PROMPTS}"
    ),
    "too_long": Reason(
        "longer than data.max_length", "raise data.max_length, or set data.truncation=keep_start or keep_end"
    ),
    "prompt_fills_max_length": Reason(
        "the prompt fills data.max_length: no room for a response",
        f"raise data.max_length, or {_CUT_PROMPTS}",
    ),
    "response_fills_max_length": Reason(
        "a response fills data.max_length: no room for the prompt",
        "raise data.max_length, or set data.truncation=keep_start (cuts responses)",
    ),
}
_CHANGES = {
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
    "content_not_rendered": "the chat template omits or changes a text, a thought, a tool or a call",
    "partly_trained": "the loss does not count all tokens of the responses",
    "ties_left_out": "pairs of equal scores, which are not used",
    "chat_template_not_applied": "plain text, although the tokenizer has a chat template",
    "duplicates": "pairs with the same tokens as an earlier pair",
    "also_in_train": "pairs with the same tokens as a training pair",
    "held_out_for_eval": "reserved for evaluation, not trained",
    "left_in_train": "in the training part of the split",
    "prompts_also_in_train": "pairs whose prompt is also in the training data",
}
_WORDS = {name: reason.words for name, reason in _REASONS.items()} | _CHANGES
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


SHOWN_EXAMPLES = 20
HELD_OUT, LEFT_IN_TRAIN = "held_out_for_eval", "left_in_train"
EMPTY_REMEDY = "check the path, or remove the source"
_MAX_SHOWN_ORIGINS = 5


def remedy_of(reason: str) -> str:
    """Return advice about records that are dropped for this reason."""
    return _REASONS.get(reason, Reason("")).remedy


@dataclass(frozen=True)
class Changes:
    """Changes and particularities of a kept record, each counted by its name; `_CHANGES` says what they mean.

    `by_template` says whether the chat template rendered the record; it is not counted.
    """

    prompt_truncated: bool = False
    response_truncated: bool = False
    boundary_resplit: bool = False
    templated_text: bool = False
    templated_content: bool = False
    opened_thought_joined: bool = False
    opened_thought_removed: bool = False
    ended_thought_reopened: bool = False
    prompt_not_prefix: bool = False
    unknown_template_argument: bool = False
    content_not_rendered: bool = False
    partly_trained: bool = False
    by_template: bool = False

    def counts(self) -> dict[str, int]:
        """Return 0 or 1 by the name of each change."""
        return {name: int(is_so) for name, is_so in vars(self).items() if name != "by_template"}


NO_CHANGES = Changes()


@dataclass(frozen=True)
class Outcome:
    """Result of one record.

    Attributes:
        dropped: the reason why it was dropped; None if it was kept.
        pairs: the number of examples made from it; 0 without a reason if it belongs to the other part of a
            split into training and evaluation data.
        changed: number of changes of each kind; for a dropped record the fields that no format reads.
        read_as: form of the prompt, and how it is rendered; empty for a record that was not kept.
    """

    dropped: str | None = None
    pairs: int = 0
    changed: tuple[tuple[str, int], ...] = ()
    read_as: str = ""


@dataclass
class DataCounts:
    """Counts of the records of one or several sources: `read` = `kept` + sum of `dropped`.

    Attributes:
        read: records read, of this part of a split into training and evaluation data.
        kept: records with at least one example.
        pairs: examples made from them: one each, or several from a ranking.
        dropped: dropped records by reason.
        changed: changes of kept records and their omitted ties by kind; unread fields of dropped records.
        read_as: kept records by `Outcome.read_as`.
        examples: dropped records as ``file:line reason``, without their texts.
        details: for each reason, details of the first record dropped for it, without its texts.
    """

    read: int = 0
    kept: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(
        default_factory=lambda: Counter({**NO_CHANGES.counts(), "ties_left_out": 0})
    )
    read_as: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, outcomes: Mapping[Outcome, int], examples: Iterable[str], details: Mapping[str, str]
    ) -> "DataCounts":
        """Return the counts of records, given the number of records with each outcome."""
        counts = cls(examples=list(examples)[:SHOWN_EXAMPLES], details=dict(details))
        for outcome, records in outcomes.items():
            if not records:
                continue
            if outcome.dropped is not None:
                counts.read += records
                counts.dropped[outcome.dropped] += records
            elif outcome.pairs:
                counts.read += records
                counts.kept += records
                counts.pairs += records * outcome.pairs
                counts.read_as[outcome.read_as] += records
            for name, times in outcome.changed:
                counts.changed[name] += records * times
        return counts

    def add(self, later: "DataCounts") -> None:
        """Add the counts of the following records."""
        self.read += later.read
        self.kept += later.kept
        self.pairs += later.pairs
        self.dropped.update(later.dropped)
        self.changed.update(later.changed)
        self.read_as.update(later.read_as)
        self.examples += later.examples[: SHOWN_EXAMPLES - len(self.examples)]
        self.details = later.details | self.details

    def numbers(self) -> dict[str, Any]:
        """Return the counts without examples and details, for JSON."""
        return {
            "read": self.read,
            "kept": self.kept,
            "pairs": self.pairs,
            "dropped": dict(self.dropped),
            "read_as": dict(self.read_as),
            **{name: self.changed[name] for name in sorted(self.changed)},
        }

    def as_dict(self) -> dict[str, Any]:
        """Return counts, examples and details for JSON."""
        return self.numbers() | {"examples": self.examples, "details": self.details}


def check_counts(counts: DataCounts, path: str, config: DataConfig, *, of_first: bool = False) -> None:
    """Check that enough records of a source, or `of_first` of its first records, were kept.

    Raises:
        DataError: no record was kept, more were dropped than `data.max_bad_share` allows, or as
            `check_templated`.
    """
    if counts.changed[LEFT_IN_TRAIN] or (counts.changed[HELD_OUT] and not counts.read):
        return  # a part too small for a share; the training data are checked
    if not of_first or counts.changed["templated_text"] == counts.kept:
        # The share among the first records is no estimate; all of them is a clear sign.
        check_templated(counts, path, config)
    dropped = sum(counts.dropped.values())
    if counts.kept and dropped <= config.max_bad_share * counts.read:
        return
    if not counts.read:
        raise no_records(path)
    main_reason = max(counts.dropped, key=lambda reason: counts.dropped[reason])
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.dropped.items()))
    detail = counts.details.get(main_reason)
    remedy = remedy_of(main_reason)
    if "data.max_length" in remedy:
        remedy += f" (data.max_length is {config.max_length})"
    if counts.kept:
        remedy += "; or raise data.max_bad_share if dropping these records is intended"
    first, rest = ("the first ", " (the others were not looked at)") if of_first else ("", "")
    raise DataError(
        f"{dropped} of {first}{counts.read} records cannot be used"
        if counts.kept
        else f"none of the first {counts.read} records can be used"
        if of_first
        else "no record can be used",
        where="; ".join(counts.examples[:_MAX_SHOWN_ORIGINS]) or path,
        got=f"{counts.read} records{rest}; dropped: {reasons}"
        + (f"; {main_reason}: {detail}" if detail else ""),
        expected=f"at most a share of {config.max_bad_share:g} dropped (data.max_bad_share)",
        remedy=remedy,
    )


def no_records(path: str) -> DataError:
    """Return the error of a source without a record."""
    return DataError(
        "the source has no records",
        where=path,
        got="an empty file, or only a header",
        remedy=EMPTY_REMEDY,
    )


def check_split(counts: DataCounts) -> None:
    """Check that this part of a split has records that can be used. Raises DataError."""
    held_out, left = counts.changed[HELD_OUT], counts.changed[LEFT_IN_TRAIN]
    if counts.kept:
        return
    if left:
        raise DataError(
            "the split has no evaluation data",
            where="data.eval_share",
            got=f"{left} records of training data, {counts.read} for evaluation, none of them usable",
            remedy="raise data.eval_share, or set data.eval=[held_out.jsonl]",
        )
    raise DataError(
        "no training data are left",
        where="data.train",
        got=f"all {held_out} records are held out for evaluation",
        remedy="set data.drop_eval_prompts=false, lower data.eval_share, or use other evaluation data",
    )


def check_templated(counts: DataCounts, path: str, config: DataConfig) -> None:
    """Check that no chat template was applied to the texts before, unless `data.template` is set.

    Raises:
        DataError: a template was applied to most texts.
    """
    templated = counts.changed["templated_text"]
    if config.template is TextTemplate.auto and templated > counts.kept / 2:
        raise DataError(
            f"a chat template has already been applied to {templated} of {counts.kept} texts",
            where=path,
            got="prompts with turns of a chat template or BOS, or responses with an end-of-turn token",
            expected="prompts and responses as plain text or messages",
            remedy="set data.template=applied to encode these tokens as special tokens, or "
            "data.template=literal to encode them as ordinary text",
        )
