"""The reference's stored log-probs of pairs, which a tool looks up without a model."""

import itertools
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.content_keys import Keys
from dpo_dist.config.schema import ModelConfig, ReferenceConfig
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.model.files.folder import description_folder, start_folder
from dpo_dist.reference.store import LogpStore, StoredLogps, read_fingerprints

_EXAMPLES_AT_ONCE = 1 << 12


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
    from dpo_dist.reference.digest import digest_model  # noqa: PLC0415

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
        is_same_model = fingerprint.reference == model.digest and fingerprint.width == 1
        if is_same_model and fingerprint.profile.get("quantization", "").split(" ")[0] == bits:
            matching.append(fingerprint)
    matching.sort(key=lambda each: (each.profile.get("dtype") != policy.dtype.value, each.name))
    stores = [LogpStore(root, fingerprint) for fingerprint in matching]
    return [store for store in stores if len(store)]


def stored_pairs(
    stores: Sequence[LogpStore], datasets: Sequence[PreferenceDataset]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return [4, pairs] for the pairs whose two responses are stored, and each pair's place, [pairs, 2].

    A place is the number of the pair's dataset, and its index in it. The rows are the log-probs of the first
    and the last response, summed over the tokens that the loss counts, then the numbers of these tokens.
    """
    numbers = array("d")
    places = array("q")
    for at, dataset in enumerate(datasets):
        for start in range(0, len(dataset), _EXAMPLES_AT_ONCE):
            examples = range(start, min(start + _EXAMPLES_AT_ONCE, len(dataset)))
            responses = list(map(dataset.response_range, examples))
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


def _find(stores: Sequence[LogpStore], keys: Keys) -> list[StoredLogps | None]:
    logps: list[StoredLogps | None] = [None] * len(keys)
    for store in stores:
        missing = [number for number, values in enumerate(logps) if values is None]
        for number, values in zip(missing, store.find(keys[missing]), strict=True):
            logps[number] = values
    return logps


def _loss_logps(values: StoredLogps | None, mask: slice | npt.NDArray[np.bool_]) -> StoredLogps:
    return np.empty(0, dtype=np.float32) if values is None else values[mask]
