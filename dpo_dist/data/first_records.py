"""Check the format of the first records of a source, before torch is imported and processes join."""

import itertools
from collections import Counter

from dpo_dist.config.data_schema import DataConfig, OnBadRecord, SourceConfig
from dpo_dist.data.counts import DataCounts, Outcome, check_counts
from dpo_dist.data.files.hub import check_cached_offline
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, bad_record_error
from dpo_dist.data.sources import local_files

_FIRST_RECORDS = 64
_OF_ALL_RECORDS = frozenset({"unparsable", "unknown_format", "missing_field", "unpaired"})
"""Reasons that the other records of a source share, if the first ones have them."""


def check_first_formats(source: SourceConfig, config: DataConfig) -> None:
    """Check that one of the first records has a known format; for a Hub dataset, that offline it is cached.

    Raises:
        DataError: none of them can be used, or one cannot and `data.on_bad_record` is `error`.
    """
    if local_files(source) is None:
        check_cached_offline(source)
        return
    records = itertools.islice(read_records(source), _FIRST_RECORDS + 1)
    bad = []
    for record in records:
        if not isinstance(record, BadRecord):
            if config.on_bad_record is OnBadRecord.drop:
                return
            continue
        if config.on_bad_record is OnBadRecord.error:
            raise bad_record_error(record)
        bad.append(record)
    is_whole = len(bad) <= _FIRST_RECORDS
    if bad and (is_whole or {record.reason for record in bad} <= _OF_ALL_RECORDS):
        _raise(bad[:_FIRST_RECORDS], source, config, is_whole)


def _raise(bad: list[BadRecord], source: SourceConfig, config: DataConfig, is_whole: bool) -> None:
    counts = DataCounts.of(
        {Outcome(dropped=reason): number for reason, number in Counter(one.reason for one in bad).items()},
        [f"{one.origin} {one.reason}" for one in bad],
        {one.reason: one.detail for one in reversed(bad) if one.detail},
    )
    check_counts(counts, source.path, config, of_first=not is_whole)
