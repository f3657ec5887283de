"""Records of a source with their counts."""

from collections import Counter
from collections.abc import Callable, Iterator

from dpo_dist.config.data_schema import DataConfig, SourceConfig
from dpo_dist.data.count_words import describe_dropped
from dpo_dist.data.counts import SHOWN_EXAMPLES, DataCounts, Outcome, check_counts
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.number_text import counted


def good_records(
    records: Iterator[PreferenceRecord | BadRecord],
    source: SourceConfig,
    data: DataConfig,
    say: Callable[[str], None],
    enough: Callable[[], bool] = lambda: False,
    *,
    of_first: bool = False,
) -> Iterator[PreferenceRecord]:
    """Yield the usable records of a source; then print the counts of kept and dropped ones.

    Args:
        records: of the source.
        source: its path is printed.
        data: with the allowed share of dropped records, of those that were read.
        say: prints a line.
        enough: asked before each record; True ends the reading.
        of_first: whether they are the first records of more.

    Raises:
        DataError: more records were dropped than `data.max_bad_share` allows.
    """
    outcomes: Counter[Outcome] = Counter()
    bad: list[BadRecord] = []
    while not enough() and (record := next(records, None)) is not None:
        if isinstance(record, PreferenceRecord):
            outcomes[Outcome(pairs=1)] += 1
            yield record
        else:
            outcomes[Outcome(dropped=record.reason)] += 1
            bad += [record] if len(bad) < SHOWN_EXAMPLES else []
    examples = [f"{record.origin} {record.reason}" for record in bad]
    details = {record.reason: record.detail for record in reversed(bad) if record.detail}
    counts = DataCounts.of(outcomes, examples, details)
    check_counts(counts, source.path, data, of_first=of_first)
    say(f"{source.path}: {counts.kept:,} of {counted(counts.read, 'record')} kept")
    for line in describe_dropped(counts.dropped):
        say(line)
