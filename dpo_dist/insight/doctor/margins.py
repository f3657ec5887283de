"""Findings from stored reference log-probs: pairs that are likely mislabelled."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.insight.doctor.findings import Distribution, DoctorReport, Finding
from dpo_dist.insight.doctor.prepare import PreparedSource
from dpo_dist.insight.doctor.rules import Judge
from dpo_dist.insight.doctor.sources import distribution
from dpo_dist.reference.lookup import describe_numerics, find_stored, stored_sums
from dpo_dist.reference.store import LogpStore

# A margin is far from 0 if it is at least half a nat per token, and not by chance: log-probs of tokens vary
# by 1 to 2 nats, so means of n and m tokens differ by about 1.5 sqrt(1/n + 1/m) without a reason.
_FAR_NATS, _FAR_DEVIATIONS, _TOKEN_DEVIATION = 0.5, 3.0, 1.5
_SHOWN = 20
_BINS = 40


@dataclass(frozen=True, eq=False)
class ReferencePairs:
    """Stored reference log-probs [pairs] of whole responses in nats, and their tokens, at least 1."""

    chosen_logps: npt.NDArray[np.float64]
    rejected_logps: npt.NDArray[np.float64]
    chosen_tokens: npt.NDArray[np.int64]
    rejected_tokens: npt.NDArray[np.int64]

    @property
    def margins(self) -> npt.NDArray[np.float64]:
        """Length-normalised margin of each pair, nats per token."""
        return self.chosen_logps / self.chosen_tokens - self.rejected_logps / self.rejected_tokens


def margin_findings(
    pairs: ReferencePairs, origins: Sequence[str], source: str, judge: Judge
) -> tuple[Mapping[str, float], list[Finding]]:
    """Return statistics of the reference's margins of a source, and findings; pairs have these origins.

    A pair is likely mislabelled if the reference's length-normalised margin is far below 0.

    Returns:
        Named statistics, empty without pairs; findings, whose examples are the most extreme first.
    """
    margins = pairs.margins
    if not len(margins):
        return {}, []
    noise = _TOKEN_DEVIATION * np.sqrt(1 / pairs.chosen_tokens + 1 / pairs.rejected_tokens)
    far = np.maximum(_FAR_NATS, _FAR_DEVIATIONS * noise)
    low, median, high = np.percentile(margins, (5, 50, 95))
    found = np.flatnonzero(margins <= -far)
    facts = {
        "pairs": len(margins),
        "prefers_chosen": float((margins > 0).mean()),
        "margin_5": float(low),
        "margin_median": float(median),
        "margin_95": float(high),
        "reference_disagrees": len(found) / len(margins),
        "reference_solved": float((margins >= far).mean()),
    }
    extreme = found[np.argsort((margins / noise)[found], kind="stable")][:_SHOWN]
    examples = [origins[index] for index in extreme]
    return facts, judge.count(
        "reference_disagrees", len(found), len(margins), source, examples, records="pairs"
    )


@dataclass(frozen=True)
class StoreUse:
    """The use that the doctor made of the reference store.

    Attributes:
        folder: `reference.store`.
        pairs: pairs of the data.
        stored: those with both responses in the store.
        numerics: of the stored log-probs.
        margins: of each source's stored pairs, nats per token, by its label.
    """

    folder: Path
    pairs: int
    stored: int = 0
    numerics: tuple[str, ...] = ()
    margins: tuple[tuple[str, Distribution], ...] = ()

    @property
    def sentence(self) -> str:
        """One line for people."""
        if not self.stored:
            return (
                f"reference: no log-probs of these pairs in {self.folder}; after dpo_dist.precompute with "
                "this configuration, the doctor finds pairs that are likely mislabelled"
            )
        return f"reference: {self.stored:,} of {self.pairs:,} pairs in the store ({'; '.join(self.numerics)})"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of doctor.json."""
        return {
            "folder": str(self.folder),
            "pairs": self.pairs,
            "stored": self.stored,
            "numerics": list(self.numerics),
            "margins": {label: asdict(margins) for label, margins in self.margins},
        }


def compare_with_store(
    config: RunConfig, report: DoctorReport, prepared: Sequence[PreparedSource], judge: Judge
) -> tuple[DoctorReport, list[Finding], StoreUse]:
    """Look up the pairs of all sources in the reference store.

    Returns:
        The report with margins of each source; findings; and the use of the store.

    Raises:
        ConfigError: the reference model's files cannot be read.
        ReferenceModelError: the store cannot be read.
    """
    datasets = _by_source(config, report, prepared)
    use = StoreUse(Path(config.reference.store), sum(len(dataset) for each in datasets for dataset in each))
    store = find_stored(config)
    if store is None:
        return report, [], use
    sources, findings = [], []
    margins: list[tuple[str, Distribution]] = []
    for source, of_source in zip(report.sources, datasets, strict=True):
        pairs, origins = _stored_pairs(store, of_source)
        facts, found = margin_findings(pairs, origins, source.label, judge)
        sources.append(replace(source, margins=facts))
        findings += found
        if origins:
            margins.append((source.label, _distribution(pairs.margins)))
    return (
        replace(report, sources=tuple(sources)),
        findings,
        replace(
            use,
            stored=sum(of_source.count for _, of_source in margins),
            numerics=tuple(dict.fromkeys(map(describe_numerics, store.fingerprints))),
            margins=tuple(margins),
        ),
    )


def _by_source(
    config: RunConfig, report: DoctorReport, prepared: Sequence[PreparedSource]
) -> list[list[PreferenceDataset]]:
    """Return the datasets of each source of the report; two if evaluation data are split off the source."""
    datasets: list[list[PreferenceDataset]] = [[] for _ in report.sources]
    for number, each in enumerate(prepared):
        is_split = each.is_eval and not config.data.eval
        if each.dataset is not None:
            datasets[number - len(config.data.train) if is_split else number].append(each.dataset)
    return datasets


def _stored_pairs(
    store: LogpStore, datasets: Sequence[PreferenceDataset]
) -> tuple[ReferencePairs, list[str]]:
    """Return the stored pairs of a source, and the origin of each."""
    columns: list[list[npt.NDArray[Any]]] = [[np.empty(0)], [np.empty(0)], [], []]
    columns[2:] = [[np.empty(0, np.int64)], [np.empty(0, np.int64)]]
    origins: list[str] = []
    for dataset in datasets:
        sums = stored_sums(store, dataset)
        indices = np.flatnonzero(sums.is_stored & (sums.chosen_tokens > 0) & (sums.rejected_tokens > 0))
        found = (sums.chosen, sums.rejected, sums.chosen_tokens, sums.rejected_tokens)
        for column, values in zip(columns, found, strict=True):
            column.append(values[indices])
        origins += [str(dataset.origin(int(index))) for index in indices]
    return ReferencePairs(*map(np.concatenate, columns)), origins


def _distribution(margins: npt.NDArray[np.float64]) -> Distribution:
    """Return the distribution of margins, with edges of equal distance between the outer percentiles."""
    low, high = np.percentile(margins, (0.5, 99.5))
    if low == high:
        low, high = low - 0.5, low + 0.5
    return distribution(margins, np.linspace(low, high, _BINS + 1))
