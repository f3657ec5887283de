"""Counts of kept, dropped and changed records, and checks that enough of a source is left."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import HELD_OUT, LEFT_IN_TRAIN, NOT_KEPT, BadRecord, Record
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.remedies import AtRecords
from dpo_dist.foundation.text import pluralize

_NAMED_EXAMPLES = 3
_NAMED_FIELDS = 12
_OF_MOST = ("templated_text", "content_not_rendered")
"""Changes that are an error if most records of a source have them."""
_TABLE: dict[str, dict[str, list[str]]] = own_table(Path(__file__).with_suffix(".yaml"))
_ROWS = {name: row for rows in _TABLE.values() for name, row in rows.items()}


def in_words(name: str) -> str:
    """Return the meaning of a count or reason; for an unknown name the name with spaces."""
    return _ROWS[name][0] if name in _ROWS else name.replace("_", " ")


def reason_remedy(reason: str) -> str:
    """Return advice about records that are dropped for this reason."""
    remedies = _ROWS.get(reason, [])[1:]
    return "; or ".join(remedies) or "correct the records; docs/data.md explains the reason"


@dataclass(frozen=True)
class Outcome:
    """Result of one record: the reason why it was `dropped`, or its `pairs` (0: it is in another `Part`).

    `changed`: number of changes of each kind. `read_as`: the prompt's form and rendering; empty for a record
    that was not kept. `unread`: the columns that nothing reads, in words.
    """

    dropped: str | None = None
    pairs: int = 0
    changed: tuple[tuple[str, int], ...] = ()
    read_as: str = ""
    unread: tuple[str, ...] = ()


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
        changed: changes and omitted ties of kept records, by kind.
        read_as: kept records by `Outcome.read_as`.
        unread: records by each column that nothing reads.
        examples: the first dropped records.
    """

    MAX_EXAMPLES: ClassVar[int] = 20

    read: int = 0
    kept: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    read_as: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_TABLE["changed"], 0)))
    unread: Counter[str] = field(default_factory=Counter)
    examples: list[DroppedRecord] = field(default_factory=list)

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
            for name in outcome.unread:
                counts.unread[name] += records
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
            for name in ("dropped", "read_as", "changed", "unread"):
                getattr(total, name).update(part[name])
            room = cls.MAX_EXAMPLES - len(total.examples)
            total.examples += [DroppedRecord(*example) for example in part["examples"][:room]]
        return total

    def _show(self, record: BadRecord) -> None:
        if len(self.examples) < self.MAX_EXAMPLES and record.reason != NOT_KEPT:
            self.examples.append(DroppedRecord(record.origin.source, record.origin.line, record.why))

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
        numbers |= {"dropped": dict(self.dropped), "read_as": dict(self.read_as), "unread": dict(self.unread)}
        return numbers | dict(sorted(self.changed.items()))

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> "DataCounts":
        """Return the counts that `numbers` has returned, also as JSON has them, or a part of them."""
        counts = cls()
        for name, value in numbers.items():
            if name in ("read", "kept", "pairs"):
                setattr(counts, name, value)
            elif name in ("dropped", "read_as", "unread"):
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
    def forms_in_words(self) -> str:
        """How kept records were read, with numbers if they were read in several ways."""
        if len(self.read_as) == 1:
            return next(iter(self.read_as))
        return "; ".join(f"{number:,} {form}" for form, number in sorted(self.read_as.items()))

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
        fitting: Callable[[], int] | None = None,
    ) -> None:
        """Check that enough of a source's records were kept; `of_first`: only its first records were read.

        An error names the source by its `path`, after its `key` if there is one. `fitting` returns the
        `data.max_length` that keeps enough records of all sources, 0 if none does.

        Raises:
            DataError: no record was kept, more were dropped than `data.max_bad_share` allows, or the chat
                template leaves out a part of most records, or was already applied to most texts.
        """
        if self.changed[LEFT_IN_TRAIN] or (self.changed[HELD_OUT] and not self.read):
            # The evaluation part of a split is too small for shares: the training part is checked. In a
            # training part whose records are all held out there is nothing to check.
            return
        where = f"{key}: {path}" if key else path
        if not self.read:
            got = "an empty file, or only a header"
            remedy = "check the path, or remove the source"
            raise DataError("the source has no records", where=where, got=got, remedy=remedy)
        left_out = self.dropped[NOT_KEPT]
        dropped = self.dropped.total() - left_out
        if self.kept and dropped <= config.max_bad_share * (self.read - left_out):
            self._check_rendered(where, config, of_first=of_first)
            return
        reason = max(self.dropped, key=lambda name: (name != NOT_KEPT, self.dropped[name]))
        reasons = ", ".join(f"{name} {number}" for name, number in sorted(self.dropped.items()))
        remedy = _remedy(reason, config, fitting)
        if self.kept:
            share = math.ceil(100 * dropped / (self.read - left_out)) / 100
            remedy += f"; or set data.max_bad_share={share:g} if dropping these records is intended"
        first = "the first " if of_first else ""
        different: dict[str, DroppedRecord] = {}  # the first record of each reason and detail
        for example in self.examples:
            different.setdefault(example.why, example)
        expected = f"at most a share of {config.max_bad_share:g} dropped (data.max_bad_share)"
        raise DataError(
            f"{dropped or self.read} of {first}{self.read} records cannot be used",
            where=AtRecords(*map(str, [*different.values()][:_NAMED_EXAMPLES])) or where,
            got=f"{self.read} records; dropped: {reasons}",
            expected=expected,
            remedy=remedy,
        )

    def _check_rendered(self, where: str, config: DataConfig, *, of_first: bool) -> None:
        """Check that the chat template fits most kept records. Raises DataError."""
        for name in _OF_MOST:
            changed = self.changed[name]
            # A share among the first records is no estimate; all of them is a clear sign.
            is_most = changed == self.kept if of_first else changed > self.kept / 2
            if is_most and changed > config.max_bad_share * self.read:
                raise DataError(
                    f"{in_words(name)} in {changed} of {self.kept} records",
                    where=where,
                    remedy=f"{reason_remedy(name)}; or, if that is intended, set data.max_bad_share=1",
                )

    def check_split(self, config: DataConfig) -> None:
        """Check that this part of a split has usable records. Raises DataError."""
        if self.kept:
            return
        left = self.changed[LEFT_IN_TRAIN]
        remedy = "raise data.eval_share" if left else "lower data.eval_share"
        if config.drop_eval_prompts:  # evaluation data are sources of their own, not a share
            remedy = "set data.drop_eval_prompts=false, or name other sources in data.eval"
        raise DataError(
            "the split has no evaluation data" if left else "no training data are left",
            where="data.eval_share" if left else "data.train",
            got=f"{self.read} records, none usable, and {left or self.changed[HELD_OUT]} in the other part",
            remedy=remedy,
        )


def named_in_one_line(names: Iterable[str]) -> str:
    """Return names of fields: "a, b and 3 more"; empty if there are none."""
    distinct = list(dict.fromkeys(filter(None, names)))  # "": the index that pandas writes
    more = f" and {len(distinct) - _NAMED_FIELDS} more" if len(distinct) > _NAMED_FIELDS else ""
    return ", ".join(distinct[:_NAMED_FIELDS]) + more


def count_lines(counts: Mapping[str, int]) -> list[str]:
    """Return a line for each count: its number, name and meaning."""
    return [f"  {number:,} {name}: {in_words(name)}" for name, number in sorted(counts.items()) if number]


def describe_counts(name: str, counts: Mapping[str, Any]) -> list[str]:
    """Return lines for the screen: kept, dropped and changed records, and how each source was read."""
    total = DataCounts.from_numbers(counts)
    sources = counts["sources"]
    forms = f": {total.forms_in_words}" if len(sources) == 1 else ""
    lines = [f"{name} data: {total.kept_in_words}{forms}", *total.dropped_lines()]
    changed = Counter(total.changed)
    del changed[LEFT_IN_TRAIN]  # the training data say what was held out
    lines += count_lines(changed)
    for numbers in sources:
        source = DataCounts.from_numbers(numbers)
        if len(sources) > 1:
            records = f"source {numbers['label']} ({numbers['path']}): {source.kept_in_words}"
            lines.append(f"  {records}: {source.forms_in_words}")
        if source.unread:
            lines.append(f"  not read: {named_in_one_line(source.unread)}")
    return lines


def _remedy(reason: str, config: DataConfig, fitting: Callable[[], int] | None) -> str:
    """Return what to do about the most frequent reason; for records that are too long with another limit."""
    longest = fitting() if fitting is not None and reason in _TOO_LONG else 0
    if longest > config.max_length:
        return f"set data.max_length={longest}"
    return reason_remedy(reason)


_TOO_LONG = ("too_long", "prompt_fills_max_length", "response_fills_max_length", "identical_after_truncation")
"""Reasons for which another `data.max_length` helps."""
