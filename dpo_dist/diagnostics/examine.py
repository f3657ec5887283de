"""Examine preference data: stream all sources and return the doctor's report."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.data_schema import DataConfig, SourceConfig
from dpo_dist.data.encode_workers import CHUNK_RECORDS, Records, in_order
from dpo_dist.data.formats import read_records
from dpo_dist.diagnostics.across import AllRecords
from dpo_dist.diagnostics.benchmarks import read_benchmarks
from dpo_dist.diagnostics.findings import DoctorReport, Finding, SourceReport
from dpo_dist.diagnostics.judge import Judge, most_serious_first
from dpo_dist.diagnostics.observe import Observer
from dpo_dist.diagnostics.source_findings import source_findings
from dpo_dist.diagnostics.tally import SourceTally
from dpo_dist.diagnostics.templates import template_findings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]
"""Called with the number of newly examined records."""


def examine(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    thresholds: Mapping[str, float] | None = None,
    benchmarks: Sequence[Path] = (),
    seed: int = 0,
    progress: Progress = lambda _records: None,
) -> DoctorReport:
    """Read `config.train` and `config.eval` once, as a stream, and check them.

    Args:
        config: sources, limits of lengths, number of processes.
        tokenizer: of the policy; None: nothing is counted in tokens, and no check needs token ids.
        thresholds: other thresholds of rules, by name of the rule.
        benchmarks: files of benchmark prompts, .jsonl, .csv or .txt.
        seed: of the samples.
        progress: for a progress bar.

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
    with closing(AllRecords()) as records:
        for source, label, is_eval in _sources(config):
            tally = SourceTally(label, source.path, is_eval, seed)
            records.start_source(label, is_eval)
            with closing(in_order(_chunks(source), observer.observe, config.processes)) as chunks:
                for observed in chunks:
                    tally.add(observed)
                    records.add(observed)
                    progress(observed.read)
            report = tally.report()
            reports.append(report)
            findings += source_findings(tally, report, judge, config.max_bad_share)
            if tokenizer is not None:
                findings += template_findings(tally, tokenizer, judge)
        across, compared = records.findings(judge, benchmark)
    return DoctorReport(tuple(reports), across, most_serious_first([*findings, *compared]))


def _sources(config: DataConfig) -> Iterator[tuple[SourceConfig, str, bool]]:
    """Yield each source with a label of its own: its path, and a number if several have the same path."""
    seen: Counter[str] = Counter()
    for is_eval, sources in ((False, config.train), (True, config.eval)):
        for source in sources:
            seen[source.path] += 1
            number = seen[source.path]
            yield source, source.path if number == 1 else f"{source.path} ({number})", is_eval


def _chunks(source: SourceConfig) -> Iterator[Records]:
    records = read_records(source)
    while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
        yield chunk
