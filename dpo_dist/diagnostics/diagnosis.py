"""The doctor's work on the data of a run: encode, examine, compare with the store, choose records to show."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.config.doctor_schema import FailOn
from dpo_dist.config.schema import NO_MODEL, RunConfig
from dpo_dist.data.build_dataset import changed_data, source_state
from dpo_dist.data.fields.dataset_info import resolved
from dpo_dist.diagnostics.examine import examine
from dpo_dist.diagnostics.findings import DoctorReport, Finding, Level
from dpo_dist.diagnostics.judge import most_serious_first
from dpo_dist.diagnostics.prepared import Prepared, prepare
from dpo_dist.diagnostics.shown_pairs import ShownPair, show_pairs
from dpo_dist.diagnostics.stored_margins import StoreUse, compare_with_store
from dpo_dist.errors import DpoDistError
from dpo_dist.model.adapter_files import start_folder, tokenizer_folder
from dpo_dist.model.folder import description_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Counter = Callable[[str, str], AbstractContextManager[Callable[..., None]]]
"""From a title and a unit to a context with a progress function: `Console.counter` of the report."""

_SEVERITY = (Level.note, Level.warning, Level.error)
# These rules already say that training would refuse the data.
_REFUSING_RULES = {"no_records", "too_many_dropped"}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The result of the doctor.

    Attributes:
        report: facts and findings, the most serious first.
        shown: records for the page.
        model: folder of the tokenizer; None: data were examined as text.
        store: the use of the reference store; None without a model.
    """

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


def diagnose(config: RunConfig, counter: Counter) -> Diagnosis:
    """Encode and examine the data of a run; nothing is trained, and no weights are loaded.

    Args:
        config: of the run; `model.path` may be `NO_MODEL`.
        counter: shows progress.

    Raises:
        ConfigError: the policy's tokenizer cannot be used, or a threshold names no rule.
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
        thresholds=config.doctor.thresholds,
        benchmarks=[Path(file).expanduser() for file in config.doctor.benchmarks],
        progress=lambda source: counter(f"examining {source}", "record"),
    )
    store = None
    if prepared is not None:
        report, found, store = compare_with_store(config, report, prepared.sources)
        report = _with(report, [*_refusal_findings(prepared.refusals, report), *found])
    shown: list[ShownPair] = []
    if config.doctor.texts:
        shown = show_pairs(config.data, tokenizer, report.findings, config.doctor.shown_pairs)
    for source, state in zip(sources, states, strict=True):
        if source_state(source) != state:
            raise changed_data(source)
    return Diagnosis(report, tuple(shown), files, store)


def _prepare(
    config: RunConfig, folder: Path, files: Path, counter: Counter
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
            None,
            0,
            None,
            tuple(refusal.where.split("; ")),
            refusal.remedy,
        )
        for refusal in refusals
    ]


def _with(report: DoctorReport, more: Sequence[Finding]) -> DoctorReport:
    """Return the report with further findings, the most serious first."""
    return replace(report, findings=most_serious_first([*more, *report.findings]))
