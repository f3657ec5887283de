"""Records of a source with their counts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from dpo_dist.config.data_schema import DataConfig, SourceConfig
from dpo_dist.data.counts import SHOWN_EXAMPLES, DataCounts, Outcome, check_counts
from dpo_dist.data.records import BadRecord, PreferenceRecord


def good_records(
    records: Iterable[PreferenceRecord | BadRecord],
    source: SourceConfig,
    data: DataConfig,
    say: Callable[[str], None],
) -> Iterator[PreferenceRecord]:
    """Yield the usable records of a source; at its end print the counts of kept and dropped ones.

    Raises:
        DataError: more records were dropped than `data.max_bad_share` allows.
    """
    outcomes: Counter[Outcome] = Counter()
    bad: list[BadRecord] = []
    for record in records:
        if isinstance(record, PreferenceRecord):
            outcomes[Outcome(pairs=1)] += 1
            yield record
        else:
            outcomes[Outcome(dropped=record.reason)] += 1
            bad += [record] if len(bad) < SHOWN_EXAMPLES else []
    examples = [f"{record.origin} {record.reason}" for record in bad]
    details = {record.reason: record.detail for record in reversed(bad) if record.detail}
    counts = DataCounts.of(outcomes, examples, details)
    check_counts(counts, source.path, data)
    dropped = "".join(f", {number:,} {reason}" for reason, number in sorted(counts.dropped.items()))
    say(f"{source.path}: {counts.kept:,} of {counts.read:,} records kept{dropped}")
