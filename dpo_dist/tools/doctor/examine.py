"""Examine preference data: stream all sources, compare their records, and return the diagnosis."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dpo_dist.data import DataConfig, DataSource, ImageProcessor, SourceConfig, source_labels
from dpo_dist.foundation.remedies import AtRecords
from dpo_dist.foundation.types import ProgressOf, Tokenizer
from dpo_dist.kit import (
    UNSET,
    LossConfig,
    RunConfig,
    in_chunks,
    in_order,
    no_progress,
)
from dpo_dist.tools.doctor.extension import FailOn
from dpo_dist.tools.doctor.measures.duplicates import Comparison
from dpo_dist.tools.doctor.measures.observe import Observer
from dpo_dist.tools.doctor.measures.sources import ExaminedSource
from dpo_dist.tools.doctor.rules import DOCTOR_RULES
from dpo_dist.tools.doctor.shown_pairs import show_pairs
from dpo_dist.tools.findings import Finding, Level, most_serious_first
from dpo_dist.tools.pages.blocks import Answers

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Diagnosis:
    """The result of an examination; doctor.json has most of these fields."""

    sources: Sequence[dict[str, Any]]  # of `data.train`, then of `data.eval`
    across: Mapping[str, Any]
    findings: Sequence[Finding]  # the most serious first
    model: Path | None = None  # folder of the tokenizer; None: data were examined as text
    shown: Sequence[Answers] = ()  # for the page

    def fails(self, lowest: FailOn) -> bool:
        """Return whether there is a finding of at least this level."""
        failing = {FailOn.error: (Level.error,), FailOn.warning: (Level.error, Level.warning)}
        return any(finding.level in failing.get(lowest, ()) for finding in self.findings)


def diagnose(config: RunConfig, progress: ProgressOf) -> Diagnosis:
    """Encode and examine the data of a run; nothing is trained, and no weights are loaded."""
    data = DataConfig(**vars(config.data))  # a reward model's has no texts behind its responses
    prepared = None
    if config.model.path != UNSET:
        from dpo_dist.kit import prepare_data  # noqa: PLC0415  (slow)

        prepared = prepare_data(data, config.model, config.loss, progress, config.systems)
    encoder = None if prepared is None else prepared.encoder
    tokenizer = None if encoder is None else encoder.tokenizer
    processor = None if encoder is None else encoder.processor

    def show(source: str) -> AbstractContextManager[Callable[..., None]]:
        return progress(f"examining {source}", "record")

    diagnosis = examine(data, tokenizer, show, processor)
    findings = [*diagnosis.findings, *_label_balance(data.train, config.loss, diagnosis.sources)]
    if prepared is not None:
        rule = DOCTOR_RULES["training_refuses"]
        if all(finding.rule != rule.name for finding in findings):
            for error in prepared.refusals:
                got = f" ({error.got})" if error.got else ""
                where = error.where.records if isinstance(error.where, AtRecords) else (error.where,)
                for finding in rule.value(1, 0, None, error.message + got):
                    findings.append(replace(finding, share=None, examples=where, remedy=error.remedy))
        diagnosis = replace(diagnosis, model=prepared.encoder.folder)
    diagnosis = replace(diagnosis, findings=most_serious_first(findings))
    return replace(diagnosis, shown=show_pairs(data, tokenizer, diagnosis.findings, processor))


def examine(
    config: DataConfig,
    tokenizer: "Tokenizer | None",
    progress: Callable[[str], AbstractContextManager[Callable[..., None]]] = no_progress,
    processor: ImageProcessor | None = None,
) -> Diagnosis:
    """Read `config.train` and `config.eval` as streams, and check them.

    Without a tokenizer tokens are not counted. The result does not depend on the number of processes.
    """
    observer = Observer(config, tokenizer, processor)
    reports: list[dict[str, Any]] = []
    findings: list[Finding] = []
    comparison = Comparison(config)
    for entry, label, is_eval in _with_labels(config):
        source = ExaminedSource(label, entry.path, config, is_eval=is_eval)
        comparison.add_source(label, is_eval=is_eval)
        chunks = in_chunks(DataSource(entry).pinned().records())
        with progress(label) as show, closing(in_order(chunks, observer.observe)) as observed:
            for records in observed:
                source.add(records)
                comparison.add(records)
                show(source.read)
        findings += source.findings()
        reports.append(source.report())
    across, findings_across = comparison.result()
    return Diagnosis(reports, across, most_serious_first([*findings, *findings_across]))


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
        remedy = f"set {_balancing_weight(good, bad, loss.desirable_weight, loss.undesirable_weight)}"
    most = "good" if good > bad else "bad"
    rule = DOCTOR_RULES["label_balance"]
    for finding in rule.count(round(max(good, bad)), round(good + bad), None, detail=most):
        yield replace(finding, remedy=remedy)


def _balancing_weight(good: float, bad: float, desirable: float, undesirable: float) -> str:
    """Return the override that balances both labels: wd good / (wu bad) = 7/6, the middle of [1, 4/3].

    Only the rarer label's weight changes. Source of the interval: arXiv 2402.01306, section 4.
    """
    ratio = 6 / 7 * good / bad
    if ratio > 1:
        return f"loss.undesirable_weight={ratio * desirable:.3g}"
    return f"loss.desirable_weight={undesirable / ratio:.3g}"


def _with_labels(config: DataConfig) -> Iterator[tuple[SourceConfig, str, bool]]:
    """Yield each source with its label in metrics, and whether it is for evaluation."""
    train_labels = source_labels(config.train)
    for source, name in zip(config.train, train_labels, strict=True):
        yield source, name, False
    for source, name in zip(config.eval, source_labels(config.eval), strict=True):
        yield source, f"{name} (eval)" if name in train_labels else name, True
