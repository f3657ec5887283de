"""Counts of kept, dropped and changed records, and checks that enough of a source is left."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from dpo_dist.data.config import DataConfig, SourceConfig, TextTemplate
from dpo_dist.data.read.fields import ASKED
from dpo_dist.data.read.verdicts import are_judged, are_twins, is_verdict, reader_of
from dpo_dist.data.records import HELD_OUT, LEFT_IN_TRAIN, BadRecord, Record, shown_key
from dpo_dist.data.text.lengths import SourceLengths, fitting_limits
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.fields import as_written
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.remedies import AtRecords
from dpo_dist.foundation.text import pluralize

_NAMED_EXAMPLES = 3
_NAMED_FIELDS = 12
_UNREAD_VERDICT = "unread_verdict"
DROPPED_PROMPT_PREFIX = "prompts_dropped_"
"""Prefix of the counts of prompts that are left out; the reason follows."""
_PLAIN = "chat_template_not_applied"
_OMITTED = "content_not_rendered"
_TABLE: dict[str, dict[str, list[str]]] = own_table(Path(__file__).with_suffix(".yaml"))
_ROWS = {name: row for rows in _TABLE.values() for name, row in rows.items()}


def in_words(name: str) -> str:
    """Return the meaning of a count or reason; for an unknown name the name with spaces."""
    if name.startswith(DROPPED_PROMPT_PREFIX):
        return f"prompts that are left out: {in_words(name.removeprefix(DROPPED_PROMPT_PREFIX))}"
    if name.startswith("unread_") and name not in _ROWS:
        return f"the field {name.removeprefix('unread_')} is not read"
    return _ROWS[name][0] if name in _ROWS else name.replace("_", " ")


def reason_remedy(reason: str | None) -> str:
    """Return advice about records that are dropped for this reason; None: there are no records."""
    if reason is None:
        return "check the path, or remove the source"
    remedies = _ROWS.get(reason, [])[1:]
    return "; or ".join(remedies) or "correct the records; docs/data.md explains the reason"


@dataclass(frozen=True)
class Outcome:
    """Result of one record: the reason why it was `dropped`, or its `pairs` (0: it is in another `Part`).

    `changed`: number of changes of each kind; for a dropped record the fields that no format reads.
    `read_as`: the prompt's form and rendering; empty for a record that was not kept.
    """

    dropped: str | None = None
    pairs: int = 0
    changed: tuple[tuple[str, int], ...] = ()
    read_as: str = ""


class DroppedRecord(NamedTuple):
    """A dropped record as it is shown, without its texts: its place, and the reason with details."""

    file: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.why}"


@dataclass
class DataCounts:
    """Counts of the records of one or several sources: `read` = `kept` + sum of `dropped`.

    Attributes:
        read: records read, of this part of a split into training and evaluation data.
        kept: records with at least one example.
        pairs: examples made from the kept records: one each, or several from a ranking.
        dropped: dropped records by reason.
        changed: changes and omitted ties of kept records, by kind; unread fields of dropped records.
        read_as: kept records by `Outcome.read_as`.
        examples: the first dropped records.
        fields: `BadRecord.fields` of the first dropped record that has them, by its reason.
        columns: the same for `BadRecord.source_columns`.
    """

    MAX_EXAMPLES: ClassVar[int] = 20

    read: int = 0
    kept: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    read_as: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_TABLE["changed"], 0)))
    examples: list[DroppedRecord] = field(default_factory=list)
    fields: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def from_outcomes(cls, outcomes: Mapping[Outcome, int], bad: Iterable[BadRecord]) -> "DataCounts":
        """Return the counts for these numbers of records by outcome, with some bad records as examples."""
        counts = cls()
        for record in bad:
            counts._show(record)
        for outcome, records in outcomes.items():
            if not records:
                continue
            if outcome.dropped is not None:
                counts.dropped[outcome.dropped] += records
            elif outcome.pairs:
                counts.kept += records
                counts.pairs += records * outcome.pairs
                counts.read_as[outcome.read_as] += records
            for name, times in outcome.changed:
                counts.changed[name] += records * times
        counts.read = counts.kept + counts.dropped.total()
        return counts

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> "DataCounts":
        """Return the sum of counts, of which the attributes are given, also as JSON has them."""
        total = cls()
        for part in parts:
            total.read += part["read"]
            total.kept += part["kept"]
            total.pairs += part["pairs"]
            for name in ("dropped", "read_as", "changed"):
                getattr(total, name).update(part[name])
            room = cls.MAX_EXAMPLES - len(total.examples)
            total.examples += [DroppedRecord(*example) for example in part["examples"][:room]]
            total.fields = part["fields"] | total.fields
            total.columns = part["columns"] | total.columns
        return total

    def _show(self, record: BadRecord) -> None:
        if len(self.examples) < self.MAX_EXAMPLES:
            self.examples.append(DroppedRecord(record.origin.source, record.origin.line, record.why))
        if record.fields:
            self.fields.setdefault(record.reason, [*record.fields])
        if record.source_columns:
            self.columns.setdefault(record.reason, dict(record.source_columns))

    def add(self, record: Record) -> None:
        """Count a record without encoding it."""
        self.read += 1
        if isinstance(record, BadRecord):
            self.dropped[record.reason] += 1
            self._show(record)
        else:
            self.kept += 1

    def numbers(self) -> dict[str, Any]:
        """Return the counts without examples, for JSON."""
        numbers: dict[str, Any] = {"read": self.read, "kept": self.kept, "pairs": self.pairs}
        numbers |= {"dropped": dict(self.dropped), "read_as": dict(self.read_as)}
        return numbers | dict(sorted(self.changed.items()))

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> "DataCounts":
        """Return the counts that `numbers` has returned, also as JSON has them, or a part of them."""
        counts = cls()
        for name, value in numbers.items():
            if name in ("read", "kept", "pairs"):
                setattr(counts, name, value)
            elif name in ("dropped", "read_as"):
                getattr(counts, name).update(value)
            elif isinstance(value, int):
                counts.changed[name] = value
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Return counts and examples for JSON."""
        return self.numbers() | {"examples": list(map(str, self.examples))}

    # What the counts say, for the screen.

    @property
    def kept_in_words(self) -> str:
        """How many records were kept, and how many examples were made of them if these are not as many."""
        kept = f"{self.kept:,} of {pluralize(self.read, 'record')} kept"
        made = f", {pluralize(self.pairs, 'example')} made of them"
        return kept if self.pairs == self.kept else kept + made

    @property
    def is_mostly_plain(self) -> bool:
        """Whether more than half of the kept records are plain text beside a chat template."""
        return self.changed[_PLAIN] > self.kept / 2

    def plain_in_words(self, records: str = "records") -> str:
        """Return how many kept records are plain text beside a chat template, "" if none."""
        plain = self.changed[_PLAIN]
        return f"{plain:,} of {self.kept:,} {records} are {in_words(_PLAIN)}" if plain else ""

    def plain_warning(self, records: str = "records") -> str:
        """Return how many kept records are plain text beside a chat template, and what to do about them."""
        return f"{self.plain_in_words(records)}; {reason_remedy(_PLAIN)}"

    def two_forms(self) -> list[str]:
        """Return a warning if the chat template renders only a part of a source's records, else none."""
        is_part = 0 < self.changed[_PLAIN] < self.kept
        return [self.plain_warning("records of this source")] if is_part else []

    @property
    def forms_in_words(self) -> str:
        """How kept records were read, with numbers if they were read in several ways."""
        if len(self.read_as) == 1:
            return next(iter(self.read_as))
        return "; ".join(f"{number:,} {form}" for form, number in sorted(self.read_as.items()))

    @property
    def dropped_in_words(self) -> str:
        """The numbers of dropped records by reason, in one line; empty if there are none."""
        return counts_in_one_line(self.dropped)

    @property
    def changed_in_words(self) -> str:
        """The numbers of changes, in one line; empty if there are none."""
        return counts_in_one_line(self.changed)

    def dropped_lines(self) -> list[str]:
        """Return lines about dropped records, by reason."""
        reasons = sorted(self.dropped.items())
        return [f"  {number:,} dropped ({reason}): {in_words(reason)}" for reason, number in reasons]

    # Checks that enough is left.

    def check(
        self,
        path: str,
        config: DataConfig,
        *,
        key: str = "",
        of_first: bool = False,
        lengths: Callable[[], Sequence[SourceLengths]] | None = None,
    ) -> None:
        """Check that enough of a source's records were kept; `of_first`: only its first records were read.

        An error names the source by its `path`, after its `key` if there is one. `lengths` returns the record
        lengths of all sources, to suggest limits.

        Raises:
            DataError: no record was kept, more were dropped than `data.max_bad_share` allows, the chat
                template leaves out a part of most records, or was already applied to most texts and
                `data.template` is not set.
        """
        if self.changed[LEFT_IN_TRAIN] or (self.changed[HELD_OUT] and not self.read):
            # The evaluation part of a split is too small for shares: the training part is checked. In a
            # training part whose records are all held out there is nothing to check.
            return
        where = f"{key}: {path}" if key else path
        templated = self.changed["templated_text"]
        # A share among the first records is no estimate; all of them is a clear sign.
        is_templated = templated == self.kept > 0 if of_first else templated > self.kept / 2
        if is_templated and config.template is TextTemplate.auto:
            raise DataError(
                f"a chat template has already been applied to {templated} of {self.kept} texts",
                where=where,
                got="prompts with turns of a chat template or BOS, or responses with an end-of-turn token",
                expected="prompts and responses as plain text or messages",
                remedy="set data.template=applied to encode these tokens as special tokens, or "
                "data.template=literal to encode them as ordinary text",
            )
        if not self.read:
            got = "an empty file, or only a header"
            raise DataError("the source has no records", where=where, got=got, remedy=reason_remedy(None))
        dropped = self.dropped.total()
        # A verdict that is not read in one record may be misread in the others.
        is_unread = self.dropped[_UNREAD_VERDICT] > 0
        if self.kept and dropped <= config.max_bad_share * self.read and not is_unread:
            self._check_rendered(where, config, of_first=of_first)
            return
        reason = _UNREAD_VERDICT if is_unread else max(self.dropped, key=lambda name: self.dropped[name])
        reasons = ", ".join(f"{name} {number}" for name, number in sorted(self.dropped.items()))
        remedy = _remedy(reason, self, path, config, lengths)
        if self.kept and not is_unread:
            remedy += "; or raise data.max_bad_share if dropping these records is intended"
        first, rest = ("the first ", " (the others were not looked at)") if of_first else ("", "")
        different: dict[str, DroppedRecord] = {}  # the first record of each reason and detail
        for example in self.examples:
            different.setdefault(example.why, example)
        expected = f"at most a share of {config.max_bad_share:g} dropped (data.max_bad_share)"
        if is_unread:
            expected = "a verdict that is read in each record"
        raise DataError(
            f"{dropped} of {first}{self.read} records cannot be used",
            where=AtRecords(*map(str, [*different.values()][:_NAMED_EXAMPLES])) or where,
            got=f"{self.read} records{rest}; dropped: {reasons}",
            expected=expected,
            remedy=remedy,
        )

    def _check_rendered(self, where: str, config: DataConfig, *, of_first: bool) -> None:
        """Check that the chat template writes the whole of most kept records. Raises DataError."""
        omitted = self.changed[_OMITTED]
        # As for a template that was applied already: it does not fit a source, not some of its records.
        is_most = omitted == self.kept if of_first else omitted > self.kept / 2
        if is_most and omitted > config.max_bad_share * self.read:
            raise DataError(
                f"{in_words(_OMITTED)} in {omitted} of {self.kept} records",
                where=where,
                got="turns, calls or thoughts that would not be trained, or not be before what is trained",
                expected="a chat template that writes the records whole",
                remedy=reason_remedy(_OMITTED)
                + "; or, if training without these parts is intended, set data.max_bad_share=1",
            )

    def check_split(self, config: DataConfig) -> None:
        """Check that this part of a split has usable records. Raises DataError."""
        if self.kept:
            return
        left = self.changed[LEFT_IN_TRAIN]
        if left:
            message = "the split has no evaluation data"
            where = "data.eval_share"
            remedy = "raise data.eval_share"
        else:
            message = "no training data are left"
            where = "data.train"
            remedy = "lower data.eval_share"
        if config.drop_eval_prompts:  # evaluation data are sources of their own, not a share
            remedy = "set data.drop_eval_prompts=false, or name other sources in data.eval"
        got = f"{self.read} records, none usable, and {left or self.changed[HELD_OUT]} in the other part"
        raise DataError(message, where=where, got=got, remedy=remedy)


def counts_in_one_line(counts: Mapping[str, int]) -> str:
    """Return counts with their meaning: "1 empty_response (a response is empty), ..."; empty if none."""
    words = list[str]()
    for name, number in sorted(counts.items()):
        if number and name in _ROWS:
            words.append(f"{number:,} {name} ({in_words(name)})")
        elif number:
            words.append(f"{number:,} {name}")
    return ", ".join(words)


def named_in_one_line(names: Iterable[str]) -> str:
    """Return names of fields: "a, b and 3 more"; empty if there are none."""
    distinct = list(dict.fromkeys(filter(None, map(shown_key, names))))  # "": the index that pandas writes
    more = f" and {len(distinct) - _NAMED_FIELDS} more" if len(distinct) > _NAMED_FIELDS else ""
    return ", ".join(distinct[:_NAMED_FIELDS]) + more


def count_lines(counts: Mapping[str, int]) -> list[str]:
    """Return a line for each count: its number, name and meaning."""
    return [f"  {number:,} {name}: {in_words(name)}" for name, number in sorted(counts.items()) if number]


def describe_counts(name: str, counts: Mapping[str, Any]) -> list[str]:
    """Return lines for the screen: kept, dropped and changed records, and how each source was read."""
    total = DataCounts.from_numbers(counts)
    lines = [f"{name} data: {total.kept_in_words}", *total.dropped_lines()]
    lines += count_lines(total.changed)
    for numbers in counts["sources"]:
        source = DataCounts.from_numbers(numbers)
        records = f"{numbers['path']}: {pluralize(source.kept, 'record')}"
        if len(counts["sources"]) > 1:
            dropped = "".join(f", {number:,} {reason}" for reason, number in sorted(source.dropped.items()))
            records = f"source {numbers['label']} ({numbers['path']}): {source.kept_in_words}{dropped}"
        lines.append(f"  {records}: {source.forms_in_words}")
        lines += [f"  warning: {warning}" for warning in source.two_forms()]
    return lines


def _remedy(
    reason: str,
    counts: DataCounts,
    path: str,
    config: DataConfig,
    lengths: Callable[[], Sequence[SourceLengths]] | None,
) -> str:
    """Return what to do about the most frequent reason, with the words for this source."""
    if reason == "unknown_format":
        return (
            _with_columns(path, config, counts)
            + "; correct the source's format, if one is set (docs/data.md)"
        )
    if reason == _UNREAD_VERDICT and reason in counts.columns:
        return f"ignore all verdicts but one: {_source_with(counts.columns[reason], path, config)}"
    if reason == _UNREAD_VERDICT:
        return _with_reader(path, config, counts.fields.get(reason, ["COLUMN"] * 3))
    if reason in ("unread_content", "ambiguous_format") and reason in counts.columns:
        ignored = _source_with(counts.columns[reason], path, config)
        words = (
            "only if they say nothing about which response is better, and the prompt is whole without them"
        )
        return f"{reason_remedy(reason)}; or ignore these fields, {words}: {ignored}"
    unread = [name.removeprefix("unread_") for name in counts.changed if name.startswith("unread_")]
    images = _column("images", unread)
    if reason == "image_count" and images is not None:
        return _source_with({"images": images}, path, config)
    remedy = reason_remedy(reason)
    if reason not in _TOO_LONG:
        return remedy
    fitting = None if lengths is None else fitting_limits(lengths(), config)
    return fitting or remedy + f" (data.max_length is {config.max_length})"


_TOO_LONG = (
    *("too_long", "prompt_fills_max_length", "response_fills_max_length"),
    *("identical_after_truncation", "image_does_not_fit"),
)
"""Reasons for which another limit helps."""
_NAMES = {
    "prompt": "prompt question query instruction input problem user post request context",
    "chosen": "chosen good better best accepted preferred positive winner correct answer response",
    "rejected": "rejected bad worse worst dispreferred negative loser incorrect wrong non not",
    "completion": "completion answer response output reply text",
    "label": "label thumb vote feedback is_good liked",
    "images": "images image img imgs picture pictures pic pics photo photos screenshot",
}
"""Words in names of columns, by the field that they probably hold."""
_SCORES = {"score", "scores", "rating", "rate", "reward", "helpfulness", "quality", "rank"}
_ABOUT = {"id", "ids", "caption", "captions", "description", "width", "height", "size", "source", "count"}
"""A name with such a word is about a field, but not the field itself."""


def _with_columns(path: str, config: DataConfig, counts: DataCounts) -> str:
    """Return advice to set the source's `columns`: those known to be right, else guessed from the fields.

    Other names of columns do not help a record with a score and no second response: it gets other advice.
    """
    columns = counts.columns.get("unknown_format", {})
    if columns and "label" not in columns:
        return _source_with(columns, path, config)
    fields = counts.fields.get("unknown_format", [])
    if are_judged(fields):
        return _source_with({"prompt": _column("prompt", fields)}, path, config)
    label = columns.get("label") or _column("label", fields)
    best, other = ("completion", "label") if label else ("chosen", "rejected")
    rejected = label or _column(other, fields)
    if rejected is None and any(_SCORES & _words(name) for name in fields):
        return reason_remedy("no_ranking")
    # "non_preferred" has a word for the chosen side, too.
    chosen = _column(best, [name for name in fields if name != rejected])
    if other == "rejected" and rejected is None and chosen and is_verdict(chosen):
        chosen = None  # a winner without a loser is a verdict
    guessed = {"prompt": _column("prompt", fields), best: chosen, other: rejected}
    if all(field == name for field, name in guessed.items()):
        return (
            f"the fields {', '.join(guessed)} have the right names, but their values are neither texts nor "
            "messages (role and content): let a reader of the source return them"
        )
    images = _column("images", fields)
    if images:
        guessed["images"] = images
    return _source_with(guessed, path, config)


def _with_reader(path: str, config: DataConfig, fields: Sequence[str]) -> str:
    """Return advice to read two answers and a verdict by a function, whose two values the user writes."""
    verdict, first, second, *others = fields
    code = reader_of(verdict, first, second)
    prompt = {} if set(ASKED).intersection(others) else {"prompt": _column("prompt", others)}
    source = _source_with(prompt, path, config, reader="verdicts:read", without=("chosen", "rejected"))
    return (
        f"save this as verdicts.py, with an entry for each value of {verdict} that says that {first} "
        f"(VALUE_1) or {second} (VALUE_2) is better:\n{code}\nand {source}"
    )


def _source_with(
    columns: Mapping[str, str | None],
    path: str,
    config: DataConfig,
    *,
    reader: str | None = None,
    without: Sequence[str] = (),
) -> str:
    """Return advice to write a source with these columns, too; the user has to name one that is None.

    With a `reader`, and `without` some of the columns that the source has.
    """
    usual = asdict(SourceConfig(path="-"))
    fields: dict[str, Any] = {"path": path}
    form = "write the source as {}"
    for key, sources in (("data.eval", config.eval), ("data.train", config.train)):
        if [each.path for each in sources] == [path]:
            fields = {name: value for name, value in asdict(sources[0]).items() if value != usual[name]}
            form = f"write '{key}=[{{}}]'"
    old_columns = fields.pop("columns", None) or {}
    all_columns = {name: place for name, place in old_columns.items() if name not in without}
    for column, name in columns.items():
        all_columns[column] = None if name == "null" else name or "COLUMN"
    if reader:
        fields["reader"] = reader
    if all_columns:
        fields["columns"] = all_columns
    return form.format(as_written(fields))


def _column(field: str, columns: Iterable[str]) -> str | None:
    """Return the first column whose name is, or contains, a word for the field and none of something else.

    Of columns whose names differ in one word, such as answer_1 and answer_2, none is the better one.
    """
    names = [name for name in columns if not (_SCORES | _ABOUT) & _words(name)]
    names = [name for name in names if not any(are_twins(name, other) for other in names)]
    return next((name for word in _NAMES[field].split() for name in names if word in _words(name)), None)


def _words(name: str) -> set[str]:
    return {name.lower(), *re.split(r"[^a-z]+", name.lower())}
