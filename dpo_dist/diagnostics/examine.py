"""Examine preference data: stream all sources and return the doctor's report."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.data_schema import DataConfig, SourceConfig
from dpo_dist.data.build_dataset import Progress, no_progress, share_read
from dpo_dist.data.encode_workers import CHUNK_RECORDS, Records, in_order
from dpo_dist.data.files.byte_stream import Meter
from dpo_dist.data.formats import read_with_fields
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.data.source_labels import source_labels
from dpo_dist.data.sources import pinned
from dpo_dist.diagnostics.across import AllRecords
from dpo_dist.diagnostics.findings import DoctorReport, Finding, SourceReport
from dpo_dist.diagnostics.judge import Judge, most_serious_first
from dpo_dist.diagnostics.measures.benchmarks import read_benchmarks
from dpo_dist.diagnostics.measures.observe import Observer
from dpo_dist.diagnostics.measures.ratings import ratings_contradict
from dpo_dist.diagnostics.source_findings import source_findings
from dpo_dist.diagnostics.tally import SourceTally
from dpo_dist.diagnostics.templates import template_findings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEED = 0
"""Of the samples of records."""


def examine(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    thresholds: Mapping[str, float] | None = None,
    benchmarks: Sequence[Path] = (),
    progress: Progress = no_progress,
) -> DoctorReport:
    """Read `config.train` and `config.eval` once, as a stream, and check them.

    Args:
        config: sources, limits of lengths, number of processes.
        tokenizer: of the policy; None: nothing is counted in tokens, and no check needs token ids.
        thresholds: other thresholds of rules, by name of the rule.
        benchmarks: files of benchmark prompts, .jsonl, .csv or .txt.
        progress: called for each source.

    Returns:
        The report; it does not depend on the number of processes.

    Raises:
        DataError: a source or a benchmark file cannot be read.
        ConfigError: a threshold names no rule, or encoding is impossible with this tokenizer.
        PeerLostError: a process that encodes has died.
    """
    judge = Judge.with_thresholds(thresholds or {})
    benchmark = read_benchmarks(benchmarks)
    observer = Observer(config, tokenizer, benchmark)
    reports: list[SourceReport] = []
    findings: list[Finding] = []
    with closing(AllRecords(config.eval_share > 0, config.drop_eval_prompts)) as records:
        for source, label, is_eval in _sources(config):
            tally = SourceTally(label, source.path, is_eval, _SEED)
            records.start_source(label, is_eval)
            meter, done = Meter(), 0
            read = _chunks(pinned(source, Path(config.cache)), tally, meter)
            with (
                progress(label) as count,
                closing(in_order(read, observer.observe, config.processes)) as chunks,
            ):
                for observed in chunks:
                    tally.add(observed)
                    records.add(observed)
                    done += observed.read
                    count(observed.read, share_read(meter, source.limit, done))
            report = tally.report()
            reports.append(report)
            findings += source_findings(tally, report, judge, config.max_bad_share)
            if tokenizer is not None:
                findings += template_findings(tally, tokenizer, config, judge)
        across, compared = records.findings(judge, benchmark)
    return DoctorReport(tuple(reports), across, most_serious_first([*findings, *compared]))


def _sources(config: DataConfig) -> Iterator[tuple[SourceConfig, str, bool]]:
    """Yield each source with its label in metrics; a label that occurs again is made different."""
    seen: Counter[str] = Counter()
    for is_eval, sources in ((False, config.train), (True, config.eval)):
        labels = source_labels(sources)
        again = {label for label in labels if is_eval and seen[label]}
        for source, label in zip(sources, labels, strict=True):
            distinct = f"{label} (eval)" if label in again else label
            seen[distinct] += 1
            yield source, distinct if seen[distinct] == 1 else f"{distinct} ({seen[distinct]})", is_eval


def _chunks(source: SourceConfig, tally: SourceTally, meter: Meter) -> Iterator[Records]:
    """Yield chunks of the records; count contradictory ratings, which only the input fields show."""
    records = read_with_fields(source, meter)
    while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
        for fields, record in chunk:
            if isinstance(record, PreferenceRecord) and ratings_contradict(fields, record.scores):
                tally.names.add("ratings_contradict", record.origin)
        yield [record for _fields, record in chunk]
