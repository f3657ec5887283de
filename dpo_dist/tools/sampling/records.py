"""Read the usable records of sources, and turn them into the prompts that models get."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.counts import DataCounts, check_counts, describe_dropped
from dpo_dist.data.read.sources import pin_source
from dpo_dist.data.records import BadRecord, PreferenceRecord, readable, turns_of
from dpo_dist.foundation.text import pluralize

Read: TypeAlias = Callable[[SourceConfig], Iterator[PreferenceRecord | BadRecord]]
"""`read_records` or `read_prompts`."""
_FIRST_RECORDS = 1024


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


def first_records(
    sources: Sequence[SourceConfig], read: Read, data: DataConfig, say: Callable[[str], None]
) -> list[PreferenceRecord]:
    """Return the usable ones of each source's first records; print the counts with `say`."""
    usable: list[PreferenceRecord] = []
    for source in sources:
        records = read(pin_source(source))
        first = list(islice(records, _FIRST_RECORDS))
        is_more = next(records, None) is not None
        usable += good_records(iter(first), source, data, say, of_first=is_more)
    return usable


def as_user_message(record: PreferenceRecord, data: DataConfig) -> PreferenceRecord:
    """Return the record with the prompt that models get: under `data.text_as_messages` a user's message."""
    return replace(record, prompt=turns_of(record.prompt, "user")) if data.text_as_messages else record
