"""Where each row of many shards stands: a few flat arrays, sorted by key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dpo_dist.reference.shard import Shard

_Number = TypeVar("_Number", np.uint64, np.int64, np.uint32)


@dataclass(frozen=True)
class Index:
    """All rows in ascending order of their keys' first words; 28 bytes a row.

    Attributes:
        first_words: uint64 [rows], of the keys.
        second_words: uint64 [rows].
        places: int64 [rows], where a row's first value stands in the values of all shards laid end to end,
            shifted by `token_bits`, and in these its number of tokens.
        checks: uint32 [rows], checksums of the values.
        token_bits: as many as the longest row's number of tokens takes.
    """

    first_words: npt.NDArray[np.uint64]
    second_words: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    checks: npt.NDArray[np.uint32]
    token_bits: int


def first_values(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Where each shard's values start if all are laid end to end; int64 [shards]."""
    tokens = np.array([shard.tokens for shard in shards], dtype=np.int64)
    return np.cumsum(tokens) - tokens


def build_index(shards: Sequence[Shard], first_values: npt.NDArray[np.int64]) -> Index:
    """The index of `shards`; of rows of one key those of earlier shards come first."""
    tokens = [np.diff(shard.ends, prepend=0) for shard in shards]
    token_bits = max((int(of_shard.max(initial=0)) for of_shard in tokens), default=0).bit_length()
    values = sum(shard.tokens for shard in shards)
    assert values.bit_length() + token_bits < 64, "4 TiB of rows of less than 8 million tokens have room"
    places = [
        (shard.ends - of_shard + first_value) << token_bits | of_shard
        for shard, of_shard, first_value in zip(shards, tokens, first_values, strict=True)
    ]
    first_words = _joined([shard.keys[:, 0] for shard in shards], np.uint64)
    # Stable: of rows of one key that two jobs have computed, every rank takes the same.
    order = np.argsort(first_words, kind="stable")
    return Index(
        first_words[order],
        _joined([shard.keys[:, 1] for shard in shards], np.uint64)[order],
        _joined(places, np.int64)[order],
        _joined([shard.checks.astype(np.uint32) for shard in shards], np.uint32)[order],
        token_bits,
    )


def _joined(arrays: Sequence[npt.NDArray[_Number]], dtype: type[_Number]) -> npt.NDArray[_Number]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays])
