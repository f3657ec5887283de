"""What became of the records of a source: counts, and whether enough of it is left."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.config.schema import DataConfig, TextTemplate
from dpo_dist.errors import DataError

SHOWN_EXAMPLES = 20
FLAGS = (
    "prompt_truncated",
    "response_truncated",
    "boundary_resplit",
    "templated_text",
    "opened_thought_joined",
    "opened_thought_removed",
)
_NAMED_PLACES = 5
_CUT_PROMPTS = "set data.max_prompt_length or data.truncation=keep_end, which cut the start of prompts"
_REMEDIES = {
    "prompt_fills_max_length": f"raise data.max_length, or {_CUT_PROMPTS}",
    "response_fills_max_length": "raise data.max_length, or set data.truncation=keep_start (cuts responses)",
    "too_long": "raise data.max_length, or set data.truncation=keep_start or keep_end",
    "identical_after_truncation": f"raise data.max_length, or {_CUT_PROMPTS}",
    "unknown_format": "convert the records to one of the formats in docs/data.md",
    "unread_content": "remove these fields if the answers do not depend on them; see docs/data.md",
    "unparsable": "check how the file was written; a file with one JSON object per line ends in .jsonl",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a record: the reason why it was dropped, or the pairs that it gave.

    `changed` is what else is counted of it: how often each kind of change was made, or the fields that were
    not read.
    """

    dropped: str | None = None
    pairs: int = 0
    changed: tuple[tuple[str, int], ...] = ()


@dataclass
class DataCounts:
    """What became of the records read: `read` = `kept` + sum of `dropped`.

    `pairs` is what the kept ones gave: one each, or several from a ranking. `changed` is what was done to
    records that were kept, how many ties were left out of them, and the fields for which others were dropped.
    `examples` are dropped records as ``file:line reason``, `details` what more is known of the first record
    that was dropped for a reason; neither quotes a text.
    """

    read: int = 0
    kept: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys((*FLAGS, "ties_left_out"), 0))
    )
    examples: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, outcomes: Mapping[Outcome, int], examples: Iterable[str], details: Mapping[str, str]
    ) -> "DataCounts":
        """Count records, given how many of them had each outcome."""
        counts = cls(examples=list(examples)[:SHOWN_EXAMPLES], details=dict(details))
        for outcome, records in outcomes.items():
            counts.read += records
            if outcome.dropped is None:
                counts.kept += records
                counts.pairs += records * outcome.pairs
            elif records:
                counts.dropped[outcome.dropped] += records
            for name, times in outcome.changed:
                counts.changed[name] += records * times
        return counts

    def add(self, later: "DataCounts") -> None:
        """Count the records that follow these."""
        self.read += later.read
        self.kept += later.kept
        self.pairs += later.pairs
        self.dropped.update(later.dropped)
        self.changed.update(later.changed)
        self.examples += later.examples[: SHOWN_EXAMPLES - len(self.examples)]
        self.details = later.details | self.details

    def numbers(self) -> dict[str, Any]:
        """The counts alone, for JSON."""
        return {
            "read": self.read,
            "kept": self.kept,
            "pairs": self.pairs,
            "dropped": dict(self.dropped),
            **{name: self.changed[name] for name in sorted(self.changed)},
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.numbers() | {"examples": self.examples, "details": self.details}


def check_counts(counts: DataCounts, path: str, config: DataConfig) -> None:
    """Refuse a source of which too little is left.

    Raises:
        DataError: no record was kept, more were dropped than `data.max_bad_share` allows, or most texts went
            through a chat template and `data.template` does not say what is done with them.
    """
    check_templated(counts, path, config)
    dropped = sum(counts.dropped.values())
    if counts.kept and dropped <= config.max_bad_share * counts.read:
        return
    if not counts.read:
        raise DataError(
            "the source has no records",
            where=path,
            got="an empty file, or a header alone",
            remedy="check the path, or remove the source",
        )
    main_reason = max(counts.dropped, key=lambda reason: counts.dropped[reason])
    reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(counts.dropped.items()))
    detail = counts.details.get(main_reason)
    remedy = _REMEDIES.get(main_reason, "correct the records; docs/data.md explains the reason")
    if "data.max_length" in remedy:
        remedy += f" (data.max_length is {config.max_length})"
    if counts.kept:
        remedy += "; or raise data.max_bad_share if this loss is intended"
    raise DataError(
        f"{dropped} of {counts.read} records cannot be used" if counts.kept else "no usable record was read",
        where="; ".join(counts.examples[:_NAMED_PLACES]) or path,
        got=f"{counts.read} records; dropped: {reasons}" + (f"; {main_reason}: {detail}" if detail else ""),
        expected=f"at most a share of {config.max_bad_share:g} dropped (data.max_bad_share)",
        remedy=remedy,
    )


def check_templated(counts: DataCounts, path: str, config: DataConfig) -> None:
    """Refuse texts that went through a chat template, unless `data.template` says how to read them.

    Raises:
        DataError: most of its texts did.
    """
    templated = counts.changed["templated_text"]
    if config.template is TextTemplate.auto and templated > counts.kept / 2:
        raise DataError(
            f"a chat template has already been applied to {templated} of {counts.kept} texts",
            where=path,
            got="turns of a chat template or BOS spelt in the prompt, or the end of a turn in an answer",
            expected="prompts and answers as plain texts or messages",
            remedy="set data.template=applied to read them as they stand, or data.template=literal if the "
            "model is meant to see these tokens spelt out",
        )
