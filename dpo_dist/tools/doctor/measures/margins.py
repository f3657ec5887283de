"""Find pairs that are likely mislabelled, by the reference's stored log-probs; no model is loaded."""

import itertools
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.content_keys import Keys
from dpo_dist.config.schema import ReferenceConfig
from dpo_dist.kit import LossConfig, ModelConfig, PreferenceDataset, ReferenceMode, description_folder
from dpo_dist.model.files.folder import start_folder
from dpo_dist.reference.store import LogpStore, StoredLogps, read_fingerprints
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, MAX_EXAMPLES
from dpo_dist.tools.findings import Finding
from dpo_dist.tools.pages.charts import distribution

# A margin is far from 0 if it is at least half a nat per token, and not by chance: log-probs of tokens vary
# by 1 to 2 nats, so means of n and m tokens differ by about 1.5 sqrt(1/n + 1/m) by chance alone.
_FAR_NATS = 0.5
_FAR_DEVIATIONS = 3.0
_TOKEN_DEVIATION = 1.5
_BINS = 40
Datasets = Sequence[PreferenceDataset]
Places = npt.NDArray[np.int64]
"""Of each pair: the number of its dataset, and its index in it; int64 [pairs, 2]."""
_EXAMPLES_AT_ONCE = 1 << 12


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


def find_stored(policy: ModelConfig, reference: ReferenceConfig) -> list[LogpStore]:
    """Return the stores of the reference model that have log-probs; the first that has a key counts.

    Log-probs of every numerics profile count: they differ by rounding only, which does not change the
    statistics. The weight files are digested, unless the store has cached their digests. A missing store is
    not created.
    """
    root = Path(reference.store)
    fingerprints = read_fingerprints(root)
    if not fingerprints:
        return []
    # Imports DeepSpeed, which takes seconds.
    from dpo_dist.kit import digest_model  # noqa: PLC0415

    if reference.path is not None:
        folder = description_folder(reference.path, None, "reference.path", needs_weights=False)
        adapter = None
    else:
        folder = description_folder(policy.path, policy.revision, "model.path", needs_weights=False)
        adapter = start_folder(policy)
    model = digest_model(folder, root, remote_code=policy.trust_remote_code, adapter=adapter)
    bits = reference.quantization or ""
    matching = []
    for fingerprint in fingerprints:
        is_same_model = fingerprint.reference == model.digest
        if is_same_model and fingerprint.profile.get("quantization", "").split(" ")[0] == bits:
            matching.append(fingerprint)
    matching.sort(key=lambda each: (each.profile.get("dtype") != policy.dtype.value, each.name))
    stores = [LogpStore(root, fingerprint) for fingerprint in matching]
    return [store for store in stores if len(store)]


def stored_pairs(stores: Sequence[LogpStore], datasets: Datasets) -> tuple[npt.NDArray[np.float64], Places]:
    """Return [4, pairs] for the pairs whose two responses are stored, and each pair's place.

    The rows are the log-probs of the first and the last response, summed over the tokens that the loss
    counts, then the numbers of these tokens.
    """
    numbers, places = array("d"), array("q")
    for at, dataset in enumerate(datasets):
        for start in range(0, len(dataset), _EXAMPLES_AT_ONCE):
            examples = range(start, min(start + _EXAMPLES_AT_ONCE, len(dataset)))
            responses = [dataset.response_range(index) for index in examples]
            logps = iter(_find(stores, np.asarray(dataset.keys[responses[0].start : responses[-1].stop])))
            for index, within in zip(examples, responses, strict=True):
                values = list(itertools.islice(logps, len(within)))
                masks = dataset.masks(index) or (slice(None),) * len(values)
                chosen = _loss_logps(values[0], masks[0])
                rejected = _loss_logps(values[-1], masks[-1])
                if len(values) > 1 and len(chosen) and len(rejected):
                    sums = (float(part.sum(dtype=np.float64)) for part in (chosen, rejected))
                    numbers.extend((*sums, len(chosen), len(rejected)))
                    places.extend((at, index))
    return np.array(numbers).reshape(-1, 4).T, np.array(places).reshape(-1, 2)


def _origin(datasets: Datasets, places: Places, pair: int) -> str:
    dataset, example = places[pair].tolist()
    return str(datasets[dataset].origin(example))


def _find(stores: Sequence[LogpStore], keys: Keys) -> list[StoredLogps | None]:
    logps: list[StoredLogps | None] = [None] * len(keys)
    for store in stores:
        missing = [number for number, values in enumerate(logps) if values is None]
        for number, values in zip(missing, store.find(keys[missing]), strict=True):
            logps[number] = values
    return logps


def _loss_logps(values: StoredLogps | None, mask: slice | npt.NDArray[np.bool_]) -> StoredLogps:
    return np.empty(0, dtype=np.float32) if values is None else values[mask]


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
