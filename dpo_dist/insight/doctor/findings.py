"""Types of the doctor's report: rules, findings, and the facts about each source."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

Level = StrEnum("Level", ["note", "warning", "error"])
"""`note`: good to know; `warning`: look at it; `error`: training is likely to fail or to mislead."""

SIDES = ("prompt", "chosen", "rejected")
PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True)
class Rule:
    """A rule about data or about a run.

    Attributes:
        level: of its finding.
        text: the fault in a few words.
        remedy: advice.
    """

    level: Level
    text: str
    remedy: str


@dataclass(frozen=True)
class DataRule(Rule):
    """A rule about data; below its threshold there is a note if that is a share of records, else nothing."""

    threshold: float


@dataclass(frozen=True)
class Finding:
    """A rule that the data or a run break.

    Attributes:
        rule: name of the rule.
        level: how serious it is.
        text: one sentence with its numbers. It has no text of a record, except that of a label leak, which
            quotes single words by `repr`.
        source: label of the source; None if the finding is about several.
        count: number of records concerned (for a label leak: of records examined).
        share: `count` as a share of the records that the rule is about; of a label leak: held-out accuracy.
        examples: origins (``file:line``) of some of these records; for clusters several, joined by ", ".
        remedy: advice, one sentence.
    """

    rule: str
    level: Level
    text: str
    source: str | None = None
    count: int = 0
    share: float | None = None
    examples: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def with_remedy(self) -> str:
        """The text and the advice as one sentence each."""
        return f"{self.text}. Try: {self.remedy}" if self.remedy else self.text


@dataclass(frozen=True)
class Occurrences:
    """Number of records of a kind, with origins (``file:line``) of the first ones."""

    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Distribution:
    """Distribution of a number over the records of a source.

    Attributes:
        percentiles: by percent (`PERCENTILES`).
        edges: [bins + 1], ascending edges of the histogram.
        counts: [bins], values from one edge (included) to the next (excluded; the last bin includes both).
    """

    count: int
    mean: float
    smallest: float
    largest: float
    percentiles: Mapping[int, float]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SideReport:
    """Lengths of one side of `SIDES` and how `data.max_length` cuts them.

    Attributes:
        characters: of the texts, without a template.
        tokens: as encoded, before anything is cut; None without a tokenizer.
        cut: number of kept records in which `max_length` or `max_prompt_length` cuts this side.
        cut_tokens: tokens that are cut from them.
    """

    characters: Distribution
    tokens: Distribution | None = None
    cut: int = 0
    cut_tokens: int = 0


@dataclass(frozen=True)
class PrefixSharing:
    """Tokens of all responses, each with its prompt; and with each prompt counted once per record."""

    tokens: int
    unique_tokens: int

    @property
    def share(self) -> float:
        """Share of the tokens that sharing saves."""
        return 1 - self.unique_tokens / self.tokens if self.tokens else 0.0

    @property
    def expected_gain(self) -> float:
        """Factor by which the number of computed tokens falls."""
        return self.tokens / self.unique_tokens if self.unique_tokens else 1.0


@dataclass(frozen=True)
class LeakTest:
    """Held-out accuracy of guessing the chosen response from side-features alone.

    Attributes:
        feature: name of the feature or of the group of features.
        accuracy: share of held-out pairs guessed correctly; a tie counts as one half.
        low: lower end of its confidence interval.
        high: upper end.
        pairs: number of pairs in the test.
        differs: share of the pairs whose sides differ in the feature.
        differing_prompts: number of different prompts of these pairs.
        detail: the direction; empty for a group.
    """

    feature: str
    accuracy: float
    low: float
    high: float
    pairs: int
    differs: float
    differing_prompts: int
    detail: str = ""


@dataclass(frozen=True)
class SourceReport:
    """Facts about one source; docs/doctor.md has those that doctor.json repeats.

    Attributes:
        kept: records with at least one example.
        pairs: examples made from them.
        held_out: number of kept records that `data.eval_share` draws for evaluation; None without a split.
        dropped: dropped records by reason.
        changed: changes that encoding made to kept records, by kind.
        sides: by `SIDES`; `rejected` is missing if all records are completions.
        shares: named shares of the readable records, such as `system_prompt`, `refusal_chosen`.
        languages: share of each language (ISO 639-1) among the sampled prompts, largest first.
        scores: named statistics of the scores, empty if the source has none.
        margins: named statistics of the reference's margins, empty without stored log-probs.
        leaks: the tests for label leaks, most accurate first.
        notes: how numbers were approximated.
    """

    label: str
    path: str
    is_eval: bool
    read: int
    kept: int
    pairs: int
    held_out: int | None = None
    dropped: Mapping[str, Occurrences] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    sides: Mapping[str, SideReport] = field(default_factory=dict)
    prefix: PrefixSharing | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    languages: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    margins: Mapping[str, float] = field(default_factory=dict)
    leaks: tuple[LeakTest, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> list[str]:
        """The sizes of both parts of a split source, as text; empty without a split."""
        if self.held_out is None:
            return []
        return [f"{self.kept - self.held_out:,} train", f"{self.held_out:,} eval"]


@dataclass(frozen=True)
class Across:
    """Numbers of records by what they have in common with others, over all sources.

    Attributes:
        near_duplicates: duplicates included.
        clusters: sizes of the largest groups of nearly equal records.
        near_leaked_prompts: leaked ones included.
    """

    duplicates: int = 0
    near_duplicates: int = 0
    clusters: tuple[int, ...] = ()
    contradictions: int = 0
    repeated_prompts: int = 0
    leaked_prompts: int = 0
    near_leaked_prompts: int = 0
    benchmark_hits: int = 0


@dataclass(frozen=True)
class DoctorReport:
    """Everything that the doctor found: by source of `data.train`, then of `data.eval`; the worst first."""

    sources: tuple[SourceReport, ...]
    across: Across
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        report: dict[str, Any] = asdict(self)
        for source, entry in zip(self.sources, report["sources"], strict=True):
            if source.prefix is not None:
                entry["prefix"] |= {
                    "share": source.prefix.share,
                    "expected_gain": source.prefix.expected_gain,
                }
        return report
