"""Look up summed log-probs in a reference store without loading the model, on any machine.

Log-probs of every numerics profile of the reference are used: they differ by rounding only, which does not
matter for statistics of the data.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.model.folder import description_folder, start_folder
from dpo_dist.reference.fingerprint import ReferenceFingerprint, fingerprint_folders, read_fingerprint
from dpo_dist.reference.store import LogpStore, Values

_EXAMPLES_AT_ONCE = 1 << 12


@dataclass(frozen=True, eq=False)
class StoredSums:
    """Log-probs of the first and the last response of each example, over the tokens that the loss counts.

    Sums are float64 [examples], nan where nothing is stored; numbers of tokens int64 [examples].
    """

    chosen: npt.NDArray[np.float64]
    rejected: npt.NDArray[np.float64]
    chosen_tokens: npt.NDArray[np.int64]
    rejected_tokens: npt.NDArray[np.int64]

    @property
    def is_stored(self) -> npt.NDArray[np.bool_]:
        """Whether both responses of an example are stored, bool [examples]."""
        stored: npt.NDArray[np.bool_] = ~(np.isnan(self.chosen) | np.isnan(self.rejected))
        return stored


def find_stored(config: RunConfig) -> LogpStore | None:
    """Return all stored log-probs of the reference model of `config`; None if there are none.

    The weight files are digested, unless the store remembers their digests. Nothing is created in a store
    that does not exist.
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
    store = LogpStore(root, own) if own else None
    return store or None  # its length counts


def stored_sums(store: LogpStore, dataset: PreferenceDataset) -> StoredSums:
    """Return the summed log-probs of a dataset, as far as they are in `store`."""
    counts = dataset.response_counts(np.arange(len(dataset), dtype=np.int64))
    stops = np.cumsum(counts)
    tokens = np.asarray(dataset.trained_tokens[:], dtype=np.int64)
    chosen, rejected = np.full((2, len(dataset)), np.nan)
    for start in range(0, len(dataset), _EXAMPLES_AT_ONCE):
        examples = range(start, min(start + _EXAMPLES_AT_ONCE, len(dataset)))
        responses = [dataset.response_range(index) for index in examples]
        found = iter(store.find(np.asarray(dataset.keys[responses[0].start : responses[-1].stop])))
        for index, within in zip(examples, responses, strict=True):
            values = list(itertools.islice(found, len(within)))
            masks = dataset.masks(index) or (slice(None),) * len(values)
            chosen[index] = _sum(values[0], masks[0])
            rejected[index] = _sum(values[-1], masks[-1]) if len(values) > 1 else np.nan
    return StoredSums(chosen, rejected, tokens[stops - counts], tokens[stops - 1])


def _sum(values: Values | None, counted: slice | npt.NDArray[np.bool_]) -> float:
    return np.nan if values is None else float(values[counted].sum(dtype=np.float64))


def describe_numerics(fingerprint: ReferenceFingerprint) -> str:
    """Return a fingerprint's numerics for people: "bf16, flash_attention_2, cuda"."""
    names = ("quantization", "dtype", "attention", "gpu", "device")
    return ", ".join(fingerprint.profile[name] for name in names if name in fingerprint.profile)


def _reference_digest(config: RunConfig, store: Path) -> str:
    """Return the digest of the reference's files: the one under which training stores its log-probs."""
    # Imports DeepSpeed: only if there is a store.
    from dpo_dist.reference.digest import digest_model  # noqa: PLC0415

    path, revision, key = config.model.path, config.model.revision, "model.path"
    if config.reference.path is not None:
        path, revision, key = config.reference.path, None, "reference.path"
    folder = description_folder(path, revision, key, needs_weights=False)
    adapter = start_folder(config.model) if config.reference.path is None else None
    remote_code = config.model.trust_remote_code
    return digest_model(folder, store, remote_code=remote_code, adapter=adapter).digest
