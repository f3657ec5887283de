"""Examine preference data: stream all sources and return the doctor's report."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.schema import NO_MODEL, RunConfig
from dpo_dist.config.verb_options import FailOn
from dpo_dist.data.build import Progress, changed_data, no_progress, share_read, source_state
from dpo_dist.data.columns import resolved
from dpo_dist.data.encode import CHUNK_RECORDS, in_order
from dpo_dist.data.formats import read_records
from dpo_dist.data.read import Meter
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.sources import pinned, source_labels
from dpo_dist.data.template import chosen_template
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.insight.doctor.benchmarks import Benchmark
from dpo_dist.insight.doctor.duplicates import AllRecords
from dpo_dist.insight.doctor.findings import DoctorReport, Finding, Level, SourceReport
from dpo_dist.insight.doctor.margins import StoreUse, compare_with_store
from dpo_dist.insight.doctor.observe import Observer
from dpo_dist.insight.doctor.prepare import Prepared, prepare
from dpo_dist.insight.doctor.rules import RULES, Judge, most_serious_first
from dpo_dist.insight.doctor.shown_pairs import ShownPair, show_pairs
from dpo_dist.insight.doctor.sources import SourceTally, source_findings
from dpo_dist.model.adapter_files import start_folder, tokenizer_folder
from dpo_dist.model.folder import description_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Record = PreferenceRecord | BadRecord
SHOWN_PAIRS = 4  # of each source, besides examples of findings


def examine(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    benchmark: Benchmark | None = None,
    progress: Progress = no_progress,
) -> DoctorReport:
    """Read `config.train` and `config.eval` once, as a stream, and check them.

    Without a tokenizer nothing is counted in tokens. The report does not depend on the number of processes.

    Raises:
        DataError: a source cannot be read.
        ConfigError: encoding is impossible with this tokenizer.
        PeerLostError: a process that encodes has died.
    """
    judge = Judge(RULES)
    observer = Observer(config, tokenizer, benchmark)
    reports: list[SourceReport] = []
    findings: list[Finding] = []
    is_split = config.eval_share > 0
    records = AllRecords(judge, is_split, config.drop_eval_prompts)
    for source, label, is_eval in _sources(config):
        tally = SourceTally(label, source.path, is_eval, is_split)
        meter, done = Meter(), 0
        read = read_records(pinned(source, Path(config.cache)), meter)
        with (
            progress(label) as count,
            closing(in_order(_chunks(read), observer.observe, config.processes)) as chunks,
        ):
            for observed in chunks:
                tally.add(observed)
                records.add(observed, label, is_eval)
                done += observed.read
                count(observed.read, share_read(meter, source.limit, done))
        report = tally.report()
        reports.append(report)
        findings += source_findings(tally, report, judge, config.max_bad_share)
        if tokenizer is not None:
            findings += _tools_not_rendered(tally, tokenizer, config, judge)
    across, compared = records.findings()
    return DoctorReport(tuple(reports), across, most_serious_first([*findings, *compared]))


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, CHUNK_RECORDS)):
        yield chunk


def _tools_not_rendered(
    tally: SourceTally, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, judge: Judge
) -> list[Finding]:
    count = tally.names.counts["tools"]
    template = chosen_template(tokenizer, config.chat_template, with_tools=count > 0)
    if not count or template is None or re.search(r"\btools\b", template):
        return []
    examples = tally.names.examples["tools"]
    return judge.count("tools_not_rendered", count, tally.readable, tally.label, examples)


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


CounterOf = Callable[[str, str], AbstractContextManager[Callable[..., None]]]
"""From a title and a unit to a context with a progress function: `Console.counter` of the report."""

_SEVERITY = (Level.note, Level.warning, Level.error)
# These rules already say that training would refuse the data.
_REFUSING_RULES = {"no_records", "too_many_dropped"}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The result of the doctor; without a model (the tokenizer's folder) data were examined as text."""

    report: DoctorReport
    shown: tuple[ShownPair, ...]
    model: Path | None
    store: StoreUse | None = None

    def fails(self, lowest: FailOn) -> bool:
        """Return whether there is a finding of at least this level."""
        if lowest is FailOn.never:
            return False
        rank = _SEVERITY.index(Level(lowest.value))
        return any(_SEVERITY.index(finding.level) >= rank for finding in self.report.findings)


def diagnose(config: RunConfig, counter: CounterOf, benchmark: Benchmark | None = None) -> Diagnosis:
    """Encode and examine the data of a run; nothing is trained, and no weights are loaded.

    Raises:
        ConfigError: the policy's tokenizer cannot be used.
        DataError: a source cannot be read, or changes meanwhile.
    """
    sources = [resolved(source) for source in (*config.data.train, *config.data.eval)]
    states = list(map(source_state, sources))
    tokenizer, files, prepared = None, None, None
    if config.model.path != NO_MODEL:
        folder = description_folder(config.model.path, config.model.revision, needs_weights=False)
        files = tokenizer_folder(folder, start_folder(config.model))
        tokenizer, prepared = _prepare(config, folder, files, counter)
    report = examine(
        config.data,
        tokenizer,
        benchmark=benchmark,
        progress=lambda source: counter(f"examining {source}", "record"),
    )
    store = None
    if prepared is not None:
        judge = Judge(RULES)
        report, found, store = compare_with_store(config, report, prepared.sources, judge)
        found = [*_refusal_findings(prepared.refusals, report), *found, *report.findings]
        report = replace(report, findings=most_serious_first(found))
    shown: list[ShownPair] = []
    if config.doctor.texts:
        shown = show_pairs(config.data, tokenizer, report.findings, SHOWN_PAIRS)
    for source, state in zip(sources, states, strict=True):
        if source_state(source) != state:
            raise changed_data(source)
    return Diagnosis(report, tuple(shown), files, store)


def _prepare(
    config: RunConfig, folder: Path, files: Path, counter: CounterOf
) -> tuple["PreTrainedTokenizerBase", Prepared]:
    """Return the tokenizer of the policy, whose files are in `files`, and the data encoded with it."""
    from dpo_dist.model.load import load_config, load_tokenizer  # noqa: PLC0415  (slow, and not always needed)

    tokenizer = load_tokenizer(files, config.model)
    vocab_size = load_config(folder, config.model).get_text_config().vocab_size
    return tokenizer, prepare(
        config, tokenizer, files, vocab_size, lambda source: counter(f"encoding {source}", "record")
    )


def _refusal_findings(refusals: Sequence[DpoDistError], report: DoctorReport) -> list[Finding]:
    """Return a finding for each error of training that no other finding mentions."""
    if _REFUSING_RULES & {finding.rule for finding in report.findings}:
        return []
    return [
        Finding(
            "training_refuses",
            Level.error,
            f"training would stop: {refusal.message}" + (f" ({refusal.got})" if refusal.got else ""),
            examples=tuple(refusal.where.split("; ")),
            remedy=refusal.remedy,
        )
        for refusal in refusals
    ]
