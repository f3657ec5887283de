"""Check the format of the first records of a source, before torch is imported and processes join."""

from collections import Counter
from collections.abc import Collection

from dpo_dist.config.data_schema import DataConfig, OnBadRecord, SourceConfig
from dpo_dist.data.counts import DataCounts, Outcome, check_counts
from dpo_dist.data.fields.dataset_info import resolved
from dpo_dist.data.files.hub import check_cached_offline
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import BadRecord, bad_record_error
from dpo_dist.data.sources import local_files

_FIRST_RECORDS = 64
_MANY_RECORDS = 16_384
_OF_ALL_RECORDS = frozenset({"unknown_format", "unpaired"})
"""Reasons that the other records of a source share, if the first ones have them."""
_OF_MANY_RECORDS = _OF_ALL_RECORDS | {"unparsable", "missing_field"}
"""Reasons that they share if many have them: sorted data can begin with records without a response."""


def check_first_formats(source: SourceConfig, config: DataConfig) -> None:
    """Check that one of the first records has a known format; for a Hub dataset, that offline it is cached.

    Raises:
        DataError: none of them can be used, or one cannot and `data.on_bad_record` is `error`.
    """
    source = resolved(source)
    if local_files(source) is None:
        check_cached_offline(source)
        return
    bad: list[BadRecord] = []
    reasons: set[str] = set()
    is_whole = True
    for index, record in enumerate(read_records(source)):
        if index >= _most(reasons):
            is_whole = False
            break
        if not isinstance(record, BadRecord):
            if config.on_bad_record is OnBadRecord.drop:
                return
            continue
        if config.on_bad_record is OnBadRecord.error:
            raise bad_record_error(record)
        bad.append(record)
        reasons.add(record.reason)
    if bad and (is_whole or reasons <= _OF_MANY_RECORDS):
        _raise(bad, source, config, is_whole)


def _most(reasons: Collection[str]) -> int:
    """Return the number of records to read if the bad ones so far have these reasons."""
    is_of_many = _OF_MANY_RECORDS.issuperset(reasons) and not _OF_ALL_RECORDS.issuperset(reasons)
    return _MANY_RECORDS if is_of_many else _FIRST_RECORDS


def _raise(bad: list[BadRecord], source: SourceConfig, config: DataConfig, is_whole: bool) -> None:
    counts = DataCounts.of(
        {Outcome(dropped=reason): number for reason, number in Counter(one.reason for one in bad).items()},
        [f"{one.origin} {one.reason}" for one in bad],
        {one.reason: one.detail for one in reversed(bad) if one.detail},
    )
    check_counts(counts, source.path, config, of_first=not is_whole)
