"""Read preference data: any source that a configuration can name, from Python."""

from collections.abc import Iterator

from dpo_dist.data.config import SourceConfig
from dpo_dist.data.read.sources import DataSource
from dpo_dist.data.records import Record


def read_records(source: SourceConfig | str) -> Iterator[Record]:
    """Read the records of a source (a string: its path), as `DataSource.records`."""
    return DataSource(source).records()
