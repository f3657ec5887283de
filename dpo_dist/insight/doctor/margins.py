"""Findings from stored reference log-probs: likely mislabelled pairs, solved pairs, nearly equal sides."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.insight.doctor.findings import PERCENTILES, Distribution, DoctorReport, Finding
from dpo_dist.insight.doctor.prepare import PreparedSource
from dpo_dist.insight.doctor.rules import Judge
from dpo_dist.reference.lookup import describe_numerics, find_stored, stored_sums
from dpo_dist.reference.store import LogpStore

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# A margin is far from 0 if it is at least half a nat per token, and not by chance: log-probs of tokens vary
# by 1 to 2 nats, so means of n and m tokens differ by about 1.5 sqrt(1/n + 1/m) without a reason.
FAR_NATS = 0.5
FAR_DEVIATIONS = 3.0
_TOKEN_DEVIATION = 1.5
NEARLY_EQUAL = 0.1
_SHOWN = 20
_PERCENTILES = (5, 50, 95)


@dataclass(frozen=True, eq=False)
class ReferencePairs:
    """Stored reference log-probs of the pairs of one source.

    Attributes:
        chosen_logps: float64 [pairs], log-prob of the whole chosen response, in nats.
        rejected_logps: the same for the rejected response.
        chosen_tokens: int64 [pairs], tokens of the chosen response, at least 1.
        rejected_tokens: the same for the rejected response.
        distances: float64 [pairs], `bag_distance` of the two responses; None: not known.
    """

    chosen_logps: Floats
    rejected_logps: Floats
    chosen_tokens: Counts
    rejected_tokens: Counts
    distances: Floats | None = None

    @property
    def margins(self) -> Floats:
        """Length-normalised margin of each pair, nats per token."""
        return self.chosen_logps / self.chosen_tokens - self.rejected_logps / self.rejected_tokens


def bag_distance(
    chosen_ids: npt.NDArray[np.integer[Any]], rejected_ids: npt.NDArray[np.integer[Any]]
) -> float:
    """Return the share of tokens that only one of two responses has, 0 (the same tokens) to 1.

    The order of the tokens is ignored: the value is at most the normalised edit distance.
    """
    ids, numbers = np.unique(np.concatenate([chosen_ids, rejected_ids]), return_inverse=True)
    chosen = np.bincount(numbers[: len(chosen_ids)], minlength=len(ids))
    rejected = np.bincount(numbers[len(chosen_ids) :], minlength=len(ids))
    return float(np.abs(chosen - rejected).sum() / max(len(numbers), 1))


def margin_findings(
    pairs: ReferencePairs, origin: Callable[[int], str], source: str, judge: Judge
) -> tuple[Mapping[str, float], list[Finding]]:
    """Return statistics of the reference's margins of a source, and findings.

    A pair is likely mislabelled (solved) if the reference's length-normalised margin is far below (above) 0.
    Responses with nearly the same tokens risk likelihood displacement: both probabilities fall in training
    (arXiv:2410.08847; its CHES score needs hidden states, which the store does not have).

    Args:
        pairs: of the source.
        origin: from the index of a pair to its ``file:line``.
        source: label of the source.
        judge: applies rules.

    Returns:
        Named statistics, empty without pairs; findings, whose examples are the most extreme first.
    """
    margins = pairs.margins
    if not len(margins):
        return {}, []
    noise = _TOKEN_DEVIATION * np.sqrt(1 / pairs.chosen_tokens + 1 / pairs.rejected_tokens)
    is_far = (np.abs(margins) >= FAR_NATS) & (np.abs(margins) >= FAR_DEVIATIONS * noise)
    low, median, high = np.percentile(margins, _PERCENTILES)
    facts = {
        "pairs": len(margins),
        "prefers_chosen": float((margins > 0).mean()),
        "margin_5": float(low),
        "margin_median": float(median),
        "margin_95": float(high),
    }
    rules = {"reference_disagrees": (is_far & (margins < 0), margins / noise)}
    rules["reference_solved"] = (is_far & (margins > 0), -margins / noise)
    if pairs.distances is not None:
        rules["nearly_equal_sides"] = (pairs.distances < NEARLY_EQUAL, pairs.distances)
    findings = []
    for rule, (is_found, order) in rules.items():
        found = np.flatnonzero(is_found)
        extreme = found[np.argsort(order[found], kind="stable")][:_SHOWN]
        examples = [origin(int(index)) for index in extreme]
        findings += judge.count(rule, len(found), len(margins), source, examples, records="pairs")
        facts[rule] = len(found) / len(margins)
    return facts, findings


Columns = tuple[npt.NDArray[Any], ...]
_BINS = 40


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
                "this configuration, the doctor finds pairs that are likely mislabelled or solved"
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
    config: RunConfig, report: DoctorReport, prepared: Sequence[PreparedSource]
) -> tuple[DoctorReport, list[Finding], StoreUse]:
    """Look up the pairs of all sources in the reference store.

    Args:
        config: of the run.
        report: of the same sources.
        prepared: from `prepare`.

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
    judge = Judge.with_thresholds(config.doctor.thresholds or {})
    sources, findings = list(report.sources), []
    margins: list[tuple[str, Distribution]] = []
    stored = 0
    for number, source in enumerate(report.sources):
        pairs = _stored_pairs(store, datasets[number])
        facts, found = margin_findings(pairs.logps, pairs.origin, source.label, judge)
        sources[number] = replace(source, margins=facts)
        findings += found
        stored += len(pairs.indices)
        if len(pairs.indices):
            margins.append((source.label, _distribution(pairs.logps.margins)))
    numerics = tuple(dict.fromkeys(map(describe_numerics, store.fingerprints)))
    use = replace(use, stored=stored, numerics=numerics, margins=tuple(margins))
    return replace(report, sources=tuple(sources)), findings, use


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


@dataclass(frozen=True, eq=False)
class _StoredPairs:
    """The stored pairs of a source.

    Attributes:
        logps: their log-probs.
        datasets: the datasets of the source.
        numbers: int64 [pairs], index of each pair's dataset.
        indices: int64 [pairs], index of each pair in its dataset.
    """

    logps: ReferencePairs
    datasets: Sequence[PreferenceDataset]
    numbers: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]

    def origin(self, pair: int) -> str:
        """Return the ``file:line`` of a pair."""
        return str(self.datasets[self.numbers[pair]].origin(int(self.indices[pair])))


def _stored_pairs(store: LogpStore, datasets: Sequence[PreferenceDataset]) -> _StoredPairs:
    parts = [_stored_of(number, store, dataset) for number, dataset in enumerate(datasets)]
    columns = [np.concatenate(column) for column in zip(_nothing(), *parts, strict=True)]
    *logps, numbers, indices = columns
    return _StoredPairs(ReferencePairs(*logps), datasets, numbers, indices)


def _stored_of(number: int, store: LogpStore, dataset: PreferenceDataset) -> Columns:
    sums = stored_sums(store, dataset)
    indices = np.flatnonzero(sums.is_stored & (sums.chosen_tokens > 0) & (sums.rejected_tokens > 0))
    counted = np.stack([sums.chosen_tokens, sums.rejected_tokens], axis=1)
    distances = np.array([_distance(dataset, int(index), *map(int, counted[index])) for index in indices])
    return (
        sums.chosen[indices],
        sums.rejected[indices],
        sums.chosen_tokens[indices],
        sums.rejected_tokens[indices],
        distances.astype(np.float64),
        np.full(len(indices), number, dtype=np.int64),
        indices,
    )


def _nothing() -> Columns:
    """Return the columns of no pair."""
    floats, counts = np.empty(0), np.empty(0, dtype=np.int64)
    return floats, floats, counts, counts, floats, counts, counts


def _distance(dataset: PreferenceDataset, index: int, first: int, last: int) -> float:
    """Return `bag_distance` of the counted tokens of two responses; a lower bound of it if that is large.

    Args:
        dataset: of the example.
        index: of the example.
        first: number of tokens that the loss counts in the first response.
        last: the same of the last one.
    """
    bound = abs(first - last) / (first + last)
    if bound >= NEARLY_EQUAL:  # so is the distance; token ids need not be read
        return bound
    responses, masks = dataset.sequences(index).responses, dataset.masks(index)
    sides = [responses[at][masks[at]] if masks else responses[at] for at in (0, -1)]
    return bag_distance(*sides)


def _distribution(values: npt.NDArray[np.float64]) -> Distribution:
    """Return the distribution of margins, with edges of equal distance between the outer percentiles."""
    low, high = np.percentile(values, (0.5, 99.5))
    span = (low, high) if low < high else (low - 0.5, low + 0.5)
    counts, edges = np.histogram(np.clip(values, *span), bins=_BINS, range=span)
    return Distribution(
        count=len(values),
        mean=float(values.mean()),
        smallest=float(values.min()),
        largest=float(values.max()),
        percentiles=dict(zip(PERCENTILES, map(float, np.percentile(values, PERCENTILES)), strict=True)),
        edges=tuple(map(float, edges)),
        counts=tuple(map(int, counts)),
    )
