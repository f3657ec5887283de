"""Look up summed log-probs in a reference store without loading the model, on any machine.

Log-probs of every numerics profile of the reference are used: they differ by rounding only, which does not
matter for statistics of the data.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.model.folder import description_folder
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.fingerprint import ReferenceFingerprint, read_fingerprint
from dpo_dist.reference.maintenance.info import fingerprint_folders
from dpo_dist.reference.store import LogpStore

_RESPONSES_AT_ONCE = 1 << 14


@dataclass(frozen=True, eq=False)
class StoredSums:
    """Summed log-probs of the responses of a dataset, as far as they are stored.

    Attributes:
        logps: float64 [responses], sums over the completion tokens; nan if a response is not stored.
        tokens: int64 [responses], number of these tokens.
    """

    logps: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]


def find_stored(config: RunConfig) -> LogpStore | None:
    """Return all stored log-probs of the reference model of `config`; None if there are none.

    The weight files are digested, unless the store remembers their digests. Nothing is created in a store
    that does not exist.

    Raises:
        ConfigError: the reference model does not exist, or its files cannot be read.
        ReferenceModelError: the store cannot be read.
    """
    root = Path(config.reference.store)
    folders = fingerprint_folders(root) if root.is_dir() else []
    stored = [each for folder in folders if (each := read_fingerprint(folder)) is not None]
    if not stored:
        return None
    digest, bits = _reference_digest(config, root), config.reference.quantization or ""
    own = [
        each
        for each in stored
        if each.reference == digest and each.profile.get("quantization", "").split(" ")[0] == bits
    ]
    own.sort(key=lambda each: (each.profile.get("dtype") != config.model.dtype.value, each.name))
    store = LogpStore.read_only(root, own) if own else None
    return store if store is not None and len(store) else None


def stored_sums(store: LogpStore, dataset: PreferenceDataset) -> StoredSums:
    """Return the summed log-probs of all responses of a dataset that are in `store`."""
    responses = len(dataset.keys)
    logps = np.full(responses, np.nan)
    tokens = np.zeros(responses, dtype=np.int64)
    for start in range(0, responses, _RESPONSES_AT_ONCE):
        keys = np.asarray(dataset.keys[start : min(start + _RESPONSES_AT_ONCE, responses)])
        for offset, values in enumerate(store.find(keys)):
            if values is not None:
                logps[start + offset] = values.sum(dtype=np.float64)
                tokens[start + offset] = len(values)
    return StoredSums(logps, tokens)


def describe_numerics(fingerprint: ReferenceFingerprint) -> str:
    """Return a fingerprint's numerics for people: "bf16, flash_attention_2, cuda"."""
    names = ("quantization", "dtype", "attention", "gpu", "device")
    return ", ".join(fingerprint.profile[name] for name in names if name in fingerprint.profile)


def _reference_digest(config: RunConfig, store: Path) -> str:
    """Return the digest of the reference's files: the one under which training stores its log-probs."""
    path, revision, key = config.model.path, config.model.revision, "model.path"
    if config.reference.path is not None:
        path, revision, key = config.reference.path, config.reference.revision, "reference.path"
    folder = description_folder(path, revision, key, needs_weights=False)
    return digest_model(folder, store, remote_code=config.model.trust_remote_code).digest
