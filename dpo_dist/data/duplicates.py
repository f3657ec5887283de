"""Count examples with equal token ids or prompts, within a dataset and in two."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.encoded_source import MEMO_FOLDER
from dpo_dist.digests import recall, remember


def remembered_count(count: Callable[..., int], cache: Path, *datasets: PreferenceDataset) -> int:
    """Return `count(*datasets)`, cached on disk by the content of the datasets as it reads all their keys.

    Args:
        count: `count_duplicates`, `count_shared` or `count_shared_prompts`.
        cache: `data.cache`.
    """
    identity = " ".join([count.__name__, *(dataset.fingerprint for dataset in datasets)])
    known = recall(cache / MEMO_FOLDER, identity)
    if known is None:
        known = str(count(*datasets))
        remember(cache / MEMO_FOLDER, identity, known)
    return int(known)


def count_duplicates(dataset: PreferenceDataset) -> int:
    """Return the number of examples with the same token ids as an earlier one."""
    return len(dataset) - len(np.unique(_example_digests(dataset)))


def count_shared(dataset: PreferenceDataset, other: PreferenceDataset) -> int:
    """Return the number of examples of `dataset` with the same token ids as one of `other`."""
    return int(np.isin(_example_digests(dataset), _example_digests(other)).sum())


def count_shared_prompts(dataset: PreferenceDataset, other: PreferenceDataset) -> int:
    """Return the number of examples of `dataset` whose prompt is that of an example of `other`."""
    return int(np.isin(np.asarray(dataset.prompts[:]), np.asarray(other.prompts[:])).sum())


def _example_digests(dataset: PreferenceDataset) -> npt.NDArray[np.uint64]:
    """Combine the keys of each example's responses in their order; uint64 [examples]."""
    counts = dataset.response_counts(np.arange(len(dataset), dtype=np.int64))
    starts = np.cumsum(counts) - counts
    ranks = np.arange(counts.sum()) - np.repeat(starts, counts)
    keys = np.asarray(dataset.keys[:])
    # An odd factor loses no bit, and the same responses in another order get another digest.
    mixed = (keys[:, 0] ^ (keys[:, 1] << np.uint64(1))) * (2 * ranks + 1).astype(np.uint64)
    digests: npt.NDArray[np.uint64] = np.add.reduceat(mixed, starts)
    return digests
