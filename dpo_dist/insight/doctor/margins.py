"""Stored reference log-probs of the data: pairs that are likely mislabelled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.insight.doctor.findings import Finding, Rules
from dpo_dist.insight.doctor.sources import distribution
from dpo_dist.reference.lookup import describe_numerics, find_stored, stored_sums
from dpo_dist.reference.store import LogpStore

# A margin is far from 0 if it is at least half a nat per token, and not by chance: log-probs of tokens vary
# by 1 to 2 nats, so means of n and m tokens differ by about 1.5 sqrt(1/n + 1/m) without a reason.
_FAR_NATS, _FAR_DEVIATIONS, _TOKEN_DEVIATION = 0.5, 3.0, 1.5
_BINS = 40


def compare_with_store(
    config: RunConfig,
    sources: Sequence[dict[str, Any]],
    datasets: Sequence[Sequence[PreferenceDataset]],
    rules: Rules,
) -> tuple[dict[str, Any], list[Finding]]:
    """Look up the pairs of all sources in the reference store; set the `margins` of each source's report.

    Returns the section `store` of doctor.json, and the findings.
    """
    pairs = sum(len(dataset) for of_source in datasets for dataset in of_source)
    use: dict[str, Any] = {"folder": str(Path(config.reference.store)), "pairs": pairs, "stored": 0}
    use |= {"numerics": [], "margins": {}}
    store = find_stored(config)
    findings: list[Finding] = []
    if store is None:
        return use, findings
    use["numerics"] = list(dict.fromkeys(map(describe_numerics, store.fingerprints)))
    for source, of_source in zip(sources, datasets, strict=True):
        table, origins = _stored_pairs(store, of_source)
        if origins:
            margins, source["margins"], found = margin_findings(table, origins, source["label"], rules)
            findings += found
            low, high = np.percentile(margins, (0.5, 99.5)) + (np.ptp(margins) == 0) * np.array([-0.5, 0.5])
            use["margins"][source["label"]] = distribution(margins, np.linspace(low, high, _BINS + 1))
            use["stored"] += len(origins)
    return use, findings


def store_sentence(use: dict[str, Any]) -> str:
    """Return the use of the store in one line."""
    if not use["stored"]:
        return (
            f"reference: no log-probs of these pairs in {use['folder']}; after dpo_dist.precompute with "
            "this configuration, the doctor finds pairs that are likely mislabelled"
        )
    numerics = "; ".join(use["numerics"])
    return f"reference: {use['stored']:,} of {use['pairs']:,} pairs in the store ({numerics})"


def _stored_pairs(
    store: LogpStore, datasets: Sequence[PreferenceDataset]
) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Return [4, pairs]: log-probs of chosen and rejected responses, and their tokens; and each origin."""
    tables, origins = [np.empty((4, 0))], []
    for dataset in datasets:
        sums = stored_sums(store, dataset)
        indices = np.flatnonzero(sums.is_stored & (sums.chosen_tokens > 0) & (sums.rejected_tokens > 0))
        columns = (sums.chosen, sums.rejected, sums.chosen_tokens, sums.rejected_tokens)
        tables.append(np.stack([column[indices] for column in columns]))
        origins += [str(dataset.origin(int(index))) for index in indices]
    return np.concatenate(tables, axis=1), origins


def margin_findings(
    table: npt.NDArray[np.float64], origins: Sequence[str], source: str, rules: Rules
) -> tuple[npt.NDArray[np.float64], dict[str, float], list[Finding]]:
    """Judge the pairs of a source by the reference's length-normalised margins.

    `table` is [4, pairs], at least one: log-probs of chosen and rejected responses, and their tokens. Returns
    the margins in nats per token, their statistics, and the finding of pairs whose margin is far below 0, the
    most extreme first.
    """
    chosen, rejected, chosen_tokens, rejected_tokens = table
    margins = chosen / chosen_tokens - rejected / rejected_tokens
    noise = _TOKEN_DEVIATION * np.sqrt(1 / chosen_tokens + 1 / rejected_tokens)
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
    extreme = found[np.argsort((margins / noise)[found], kind="stable")]
    rule, examples = rules["reference_disagrees"], [origins[index] for index in extreme]
    return margins, facts, list(rule.count(len(found), len(margins), source, examples, records="pairs"))
