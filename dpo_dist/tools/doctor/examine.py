"""Examine preference data: stream all sources, compare their records, and return the diagnosis."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dpo_dist.data import DataConfig, DataSource, ImageProcessor, Record, SourceConfig, source_labels
from dpo_dist.encoded.build import EncodingProgress, no_progress
from dpo_dist.encoded.workers import in_order
from dpo_dist.foundation.remedies import AtRecords
from dpo_dist.foundation.types import ProgressOf, Tokenizer
from dpo_dist.kit import (
    UNSET,
    LossConfig,
    RunConfig,
    in_chunks,
)
from dpo_dist.tools.doctor.extension import DoctorConfig, FailOn
from dpo_dist.tools.doctor.measures.duplicates import Comparison, EvaluationPrompts
from dpo_dist.tools.doctor.measures.margins import compare_with_store
from dpo_dist.tools.doctor.measures.observe import Observer
from dpo_dist.tools.doctor.measures.sources import ExaminedSource
from dpo_dist.tools.doctor.measures.texts import Benchmark
from dpo_dist.tools.doctor.rules import DOCTOR_RULES
from dpo_dist.tools.doctor.shown_pairs import show_pairs
from dpo_dist.tools.findings import Finding, Level, balancing_weight, most_serious_first
from dpo_dist.tools.pages.blocks import Answers

_Result = TypeVar("_Result")
# Their findings already say that training would refuse the data.
_REFUSING_RULES = {"no_records", "too_many_dropped"}


@dataclass(frozen=True)
class Diagnosis:
    """The result of an examination; doctor.json has most of these fields."""

    sources: Sequence[dict[str, Any]]  # of `data.train`, then of `data.eval`
    across: Mapping[str, Any]
    findings: Sequence[Finding]  # the most serious first
    model: Path | None = None  # folder of the tokenizer; None: data were examined as text
    store: dict[str, Any] | None = None
    shown: Sequence[Answers] = ()  # for the page

    def fails(self, lowest: FailOn) -> bool:
        """Return whether there is a finding of at least this level."""
        failing = {FailOn.error: (Level.error,), FailOn.warning: (Level.error, Level.warning)}
        return any(finding.level in failing.get(lowest, ()) for finding in self.findings)


def diagnose(config: RunConfig, progress: ProgressOf, benchmark: Benchmark | None = None) -> Diagnosis:
    """Encode and examine the data of a run; nothing is trained, and no weights are loaded."""
    data = DataConfig(**vars(config.data))  # a reward model's has no texts behind its responses
    prepared = None
    if config.model.path != UNSET:
        from dpo_dist.kit import prepare_data  # noqa: PLC0415  (slow)

        prepared = prepare_data(data, config.model, config.loss, progress)
    encoder = None if prepared is None else prepared.encoder
    tokenizer = None if encoder is None else encoder.tokenizer
    processor = None if encoder is None else encoder.processor

    def show(source: str) -> AbstractContextManager[Callable[..., None]]:
        return progress(f"examining {source}", "record")

    diagnosis = examine(data, tokenizer, benchmark, show, processor)
    findings = [*diagnosis.findings, *_label_balance(data.train, config.loss, diagnosis.sources)]
    if prepared is not None:
        store, store_findings = compare_with_store(
            config.model, config.reference, config.loss, diagnosis.sources, prepared.datasets
        )
        findings = [*store_findings, *findings]
        if _REFUSING_RULES.isdisjoint(finding.rule for finding in findings):
            for error in prepared.refusals:
                text = f"training would stop: {error.message}"
                if error.got:
                    text += f" ({error.got})"
                where = error.where.records if isinstance(error.where, AtRecords) else (error.where,)
                findings.append(
                    Finding("training_refuses", Level.error, text, examples=where, remedy=error.remedy)
                )
        diagnosis = replace(diagnosis, model=prepared.encoder.folder, store=store)
    diagnosis = replace(diagnosis, findings=most_serious_first(findings))
    if config.section_of(DoctorConfig).texts:
        shown = show_pairs(data, tokenizer, diagnosis.findings, processor)
        diagnosis = replace(diagnosis, shown=shown)
    return diagnosis


def examine(
    config: DataConfig,
    tokenizer: "Tokenizer | None",
    benchmark: Benchmark | None = None,
    progress: EncodingProgress = no_progress,
    processor: ImageProcessor | None = None,
) -> Diagnosis:
    """Read `config.train` and `config.eval` as streams, evaluation prompts first, and check them.

    Without a tokenizer tokens are not counted. The result does not depend on the number of processes.
    """
    observer = Observer(config, tokenizer, benchmark, processor)
    prompts = EvaluationPrompts()
    reports: list[dict[str, Any]] = []
    findings: list[Finding] = []
    # Training records are compared with the prompts of evaluation data while they are read.
    for entry, label, is_eval in _with_labels(config):
        if is_eval or config.eval_share:
            find = partial(observer.evaluation_prompts, is_eval=is_eval)
            _for_each_chunk(entry, find, [prompts.add], progress(f"evaluation prompts of {label}"))
    comparison = Comparison(config, prompts)
    for entry, label, is_eval in _with_labels(config):
        source = ExaminedSource(label, entry.path, config, is_eval=is_eval)
        comparison.add_source(label, is_eval=is_eval)
        _for_each_chunk(entry, observer.observe, [source.add, comparison.add], progress(label))
        findings += source.findings()
        reports.append(source.report())
    across, findings_across = comparison.result()
    return Diagnosis(reports, across, most_serious_first([*findings, *findings_across]))


def _for_each_chunk(
    entry: SourceConfig,
    work: Callable[[Sequence[Record]], list[_Result]],
    uses: Sequence[Callable[[list[_Result]], None]],
    progress: AbstractContextManager[Callable[..., None]],
) -> None:
    """Give the results of `work` for each chunk of a source's records to all `uses`, in order."""
    source = DataSource(entry).pinned()
    count = 0
    total = source.expected_number()
    with progress as show, closing(in_order(in_chunks(source.records()), work)) as chunks:
        for results in chunks:
            for use in uses:
                use(results)
            count += len(results)
            show(count, total if count <= total else None)


def _label_balance(
    train: Sequence[SourceConfig], loss: LossConfig, sources: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Yield the finding that good and bad labels weigh differently, with the weights that balance them.

    A source counts by its weight.
    """
    good = bad = 0.0
    for source, report in zip(train, sources, strict=False):  # sources of evaluation data come after these
        good += source.weight * report["labels"]["good"]
        bad += source.weight * report["labels"]["bad"]
    ratio = loss.desirable_weight * good / max(loss.undesirable_weight * bad, 1e-9)
    if good + bad == 0 or 1 <= ratio <= 4 / 3:
        return
    remedy = "add responses of the other label"
    if good and bad:
        remedy = f"set {balancing_weight(good, bad, loss.desirable_weight, loss.undesirable_weight)}"
    most = "good" if good > bad else "bad"
    rule = DOCTOR_RULES["label_balance"]
    for finding in rule.count(round(max(good, bad)), round(good + bad), None, detail=most):
        yield replace(finding, remedy=remedy)


def _with_labels(config: DataConfig) -> Iterator[tuple[SourceConfig, str, bool]]:
    """Yield each source with its label in metrics, and whether it is for evaluation."""
    train_labels = source_labels(config.train)
    for source, name in zip(config.train, train_labels, strict=True):
        yield source, name, False
    for source, name in zip(config.eval, source_labels(config.eval), strict=True):
        yield source, f"{name} (eval)" if name in train_labels else name, True
