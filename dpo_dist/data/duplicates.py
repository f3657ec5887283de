"""Records that occur more than once, in one dataset or in training and evaluation data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.encoded_source import MEMO_FOLDER
from dpo_dist.digests import recall, remember


def remembered_count(count: Callable[..., int], cache: Path, *datasets: PreferenceDataset) -> int:
    """Return `count` of `datasets`, which reads all their keys, remembered by their content in `cache`.

    Args:
        count: `count_duplicates` or `count_shared`.
        cache: `data.cache`.
    """
    identity = " ".join([count.__name__, *(dataset.fingerprint for dataset in datasets)])
    told = recall(cache / MEMO_FOLDER, identity)
    if told is None:
        told = str(count(*datasets))
        remember(cache / MEMO_FOLDER, identity, told)
    return int(told)


def count_duplicates(dataset: PreferenceDataset) -> int:
    """How many pairs have the same token ids as an earlier one."""
    return len(dataset) - len(np.unique(_pair_digests(dataset)))


def count_shared(dataset: PreferenceDataset, other: PreferenceDataset) -> int:
    """How many pairs of `dataset` have the same token ids as one of `other`."""
    return int(np.isin(_pair_digests(dataset), _pair_digests(other)).sum())


def _pair_digests(dataset: PreferenceDataset) -> npt.NDArray[np.uint64]:
    """Of each pair the keys of its responses, combined in their order; uint64 [pairs]."""
    counts = dataset.response_counts(np.arange(len(dataset), dtype=np.int64))
    starts = np.cumsum(counts) - counts
    ranks = np.arange(counts.sum()) - np.repeat(starts, counts)
    keys = np.asarray(dataset.keys[:])
    # Odd factors lose no bit, and tell apart the same responses in another order.
    mixed = (keys[:, 0] ^ (keys[:, 1] << np.uint64(1))) * (2 * ranks + 1).astype(np.uint64)
    digests: npt.NDArray[np.uint64] = np.add.reduceat(mixed, starts)
    return digests
