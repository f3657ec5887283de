"""Read the usable records of a source; find the side of a labelled response."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.counts import DataCounts, check_counts, describe_dropped
from dpo_dist.data.records import BadRecord, PreferenceRecord, readable
from dpo_dist.foundation.text import pluralize

Read: TypeAlias = Callable[[SourceConfig], Iterator[PreferenceRecord | BadRecord]]
"""`read_records` or `read_prompts`."""


def good_records(
    records: Iterator[PreferenceRecord | BadRecord],
    source: SourceConfig,
    data: DataConfig,
    say: Callable[[str], None],
    enough: Callable[[], bool] = lambda: False,
    *,
    of_first: bool = False,
) -> Iterator[PreferenceRecord]:
    """Yield the usable records of a source until `enough` returns true; then print the counts.

    `of_first`: `records` are only the first ones of the source.
    """
    counts = DataCounts()
    while not enough() and (record := next(records, None)) is not None:
        record = readable(record)
        counts.add(record)
        if isinstance(record, PreferenceRecord):
            yield record
    check_counts(counts, source.path, data, of_first=of_first)
    say(f"{source.path}: {counts.kept:,} of {pluralize(counts.read, 'record')} kept")
    for line in describe_dropped(counts.dropped):
        say(line)


def labelled_side(record: PreferenceRecord) -> str | None:
    """Return a labelled response's side: chosen if it is good, else rejected; None for other records."""
    if len(record.responses) != 1 or record.scores is None:
        return None
    return "chosen" if record.scores[0] > 0 else "rejected"
