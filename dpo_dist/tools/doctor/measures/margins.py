"""Find pairs that are likely mislabelled, by the reference's stored log-probs; no model is loaded."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.kit import (
    LossConfig,
    ModelConfig,
    PreferenceDataset,
    ReferenceConfig,
    ReferenceMode,
    find_stored,
    stored_pairs,
)
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, MAX_EXAMPLES
from dpo_dist.tools.findings import Finding
from dpo_dist.tools.pages.charts import distribution

# A margin is far from 0 if it is at least half a nat per token, and not by chance: log-probs of tokens vary
# by 1 to 2 nats, so means of n and m tokens differ by about 1.5 sqrt(1/n + 1/m) by chance alone.
_FAR_NATS = 0.5
_FAR_DEVIATIONS = 3.0
_TOKEN_DEVIATION = 1.5
_BINS = 40


def compare_with_store(
    model: ModelConfig,
    reference: ReferenceConfig,
    loss: LossConfig,
    sources: Sequence[dict[str, Any]],
    datasets: Sequence[Sequence[PreferenceDataset]],
) -> tuple[dict[str, Any], list[Finding]]:
    """Look up the pairs of all sources in the reference store; set `margins` in each source's report.

    Returns the section `store` of doctor.json, and the findings.
    """
    pairs = 0
    for dataset in itertools.chain(*datasets):
        pairs += int((dataset.response_counts(np.arange(len(dataset))) > 1).sum())
    # The overrides that `precompute` needs to store this reference's log-probs.
    words = list[str]()
    if not loss.needs_reference:
        words.append("loss=sigmoid")
    if reference.mode is not ReferenceMode.cached:
        words.append("reference=cached")
    if reference.mode is ReferenceMode.adapter and model.quantization is not None:
        words.append(f"reference.quantization={model.quantization}")
    use: dict[str, Any] = {
        "folder": str(Path(reference.store)),
        "pairs": pairs,
        "stored": 0,
        "numerics": [],
        "margins": {},
        "filled_with": " ".join(words),
    }
    stores = find_stored(model, reference)
    findings: list[Finding] = []
    if not stores:
        return use, findings
    names = ("quantization", "dtype", "attention", "gpu", "device")
    profiles = [store.fingerprint.profile for store in stores]
    descriptions = (", ".join(profile[name] for name in names if name in profile) for profile in profiles)
    use["numerics"] = list(dict.fromkeys(descriptions))
    for source, source_datasets in zip(sources, datasets, strict=True):
        table, places = stored_pairs(stores, source_datasets)
        if len(places):
            origin = partial(_origin, source_datasets, places)
            margins, source["margins"], disagreements = margin_findings(table, origin, source["label"])
            findings += disagreements
            low, high = np.percentile(margins, (0.5, 99.5))
            if np.ptp(margins) == 0:
                low, high = low - 0.5, high + 0.5
            use["margins"][source["label"]] = distribution(margins, np.linspace(low, high, _BINS + 1))
            use["stored"] += len(places)
    return use, findings


def _origin(datasets: Sequence[PreferenceDataset], places: npt.NDArray[np.int64], pair: int) -> str:
    dataset, example = places[pair].tolist()
    return str(datasets[dataset].origin(example))


def margin_findings(
    table: npt.NDArray[np.float64], origin: Callable[[int], str], source: str
) -> tuple[npt.NDArray[np.float64], dict[str, float], list[Finding]]:
    """Judge the pairs of a source by the reference's length-normalised margins.

    `table` comes from `stored_pairs` and has at least one pair; `origin` returns that of a pair. Returns the
    margins in nats per token, their statistics, and the finding about pairs whose margin is far below 0, the
    most extreme first.
    """
    chosen, rejected, chosen_tokens, rejected_tokens = table
    margins = chosen / chosen_tokens - rejected / rejected_tokens
    noise = _TOKEN_DEVIATION * np.sqrt(1 / chosen_tokens + 1 / rejected_tokens)
    far = np.maximum(_FAR_NATS, _FAR_DEVIATIONS * noise)
    low, median, high = np.percentile(margins, (5, 50, 95))
    disagreeing = np.flatnonzero(margins <= -far)
    facts = {
        "pairs": len(margins),
        "prefers_chosen": float((margins > 0).mean()),
        "margin_5": float(low),
        "margin_median": float(median),
        "margin_95": float(high),
        "reference_disagrees": len(disagreeing) / len(margins),
    }
    extreme = disagreeing[np.argsort((margins / noise)[disagreeing], kind="stable")]
    rule = DOCTOR_RULES["reference_disagrees"]
    examples = list(map(origin, extreme[:MAX_EXAMPLES].tolist()))
    return margins, facts, list(rule.count(len(disagreeing), len(margins), source, examples, records="pairs"))
