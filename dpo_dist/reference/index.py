"""Index of many shards: find entries by key and verify their checksums."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dpo_dist.data.sampler import Indices
from dpo_dist.reference.shard import Keys, Shard, Values, is_intact

_Number = TypeVar("_Number", np.uint64, np.int64, np.uint32)

_KEYS_AT_ONCE = 1 << 16  # the entries of one look-up are Python objects


class Index:
    """Entries of many shards, sorted by the first words of their keys; 28 bytes each, values stay mapped.

    Attributes:
        damaged: number of look-ups whose values did not match their checksum, by number of the shard.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.damaged: Counter[int] = Counter()
        self._values = [shard.values for shard in shards]
        tokens = [np.diff(shard.ends, prepend=0) for shard in shards]
        shard_tokens = np.array([shard.tokens for shard in shards], dtype=np.int64)
        # Offset of each shard's values in the concatenation of all shards.
        self._first_values = np.cumsum(shard_tokens) - shard_tokens
        # As many bits as the number of tokens of the longest entry takes.
        self._token_bits = max((int(of.max(initial=0)) for of in tokens), default=0).bit_length()
        assert int(shard_tokens.sum()).bit_length() + self._token_bits < 64, (
            "4 TiB of entries of less than 8 million tokens fit"
        )
        # int64 [entries]: offset of an entry's values, shifted by `_token_bits`, plus its number of tokens.
        spans = [
            (shard.ends - of_entry + first_value) << self._token_bits | of_entry
            for shard, of_entry, first_value in zip(shards, tokens, self._first_values, strict=True)
        ]
        first_words = _joined([shard.keys[:, 0] for shard in shards], np.uint64)
        # Stable, so that of two entries of one key every rank takes the same: the one of the earlier shard.
        order = np.argsort(first_words, kind="stable")
        self._first_words = first_words[order]
        self._second_words = _joined([shard.keys[:, 1] for shard in shards], np.uint64)[order]
        self._spans = _joined(spans, np.int64)[order]
        self._checks = _joined([shard.checks.astype(np.uint32) for shard in shards], np.uint32)[order]

    def __len__(self) -> int:
        return len(self._first_words)

    def has_keys(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which `keys` have an entry, intact or not; bool [n]. Reads almost no values."""
        if not len(self):
            return np.zeros(len(keys), dtype=np.bool_)
        entries = np.searchsorted(self._first_words, keys[:, 0]).clip(max=len(self) - 1)
        found: npt.NDArray[np.bool_] = self._first_words[entries] == keys[:, 0]
        found &= self._second_words[entries] == keys[:, 1]
        # Few are left: keys whose first word is also that of another key.
        found[~found] = self.shards_of(keys[~found]) >= 0
        return found

    def shards_of(self, keys: Keys) -> Indices:
        """Return the number of the shard with an intact entry of each key, -1 for none; int64 [n]."""
        numbers: list[int] = []
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            _, shards = self.find(keys[start : start + _KEYS_AT_ONCE])
            numbers += [-1 if shard is None else shard for shard in shards]
        return np.array(numbers, dtype=np.int64)

    def find(self, keys: Keys) -> tuple[list[Values | None], list[int | None]]:
        """Return the values of each key and the number of their shard; None where no entry is intact."""
        values: list[Values | None] = [None] * len(keys)
        shards: list[int | None] = [None] * len(keys)
        wanted = np.arange(len(keys))
        entries = np.searchsorted(self._first_words, keys[:, 0])
        # Entries with equal first words are neighbours: try the next one for keys that are not found yet.
        while len(wanted):
            inside = entries < len(self)
            wanted, entries = wanted[inside], entries[inside]
            alike = self._first_words[entries] == keys[wanted, 0]
            wanted, entries = wanted[alike], entries[alike]
            same = self._second_words[entries] == keys[wanted, 1]
            self._load(entries[same], wanted[same].tolist(), values, shards)
            left = np.array([values[number] is None for number in wanted.tolist()], dtype=np.bool_)
            wanted, entries = wanted[left], entries[left] + 1
        return values, shards

    def _load(
        self, entries: Indices, numbers: list[int], values: list[Values | None], shards: list[int | None]
    ) -> None:
        """Set `values` and `shards` at `numbers` to those of `entries`, if they are intact."""
        spans, checks = self._spans[entries], self._checks[entries]
        starts = spans >> self._token_bits
        in_shards = np.searchsorted(self._first_values, starts, side="right") - 1
        starts -= self._first_values[in_shards]
        stops = starts + (spans & ((1 << self._token_bits) - 1))
        columns = (numbers, in_shards.tolist(), starts.tolist(), stops.tolist(), checks.tolist())
        for number, shard, start, stop, check in zip(*columns, strict=True):
            found = self._values[shard][start:stop]
            if is_intact(found, stop - start, check):
                values[number], shards[number] = found, shard
            else:
                self.damaged[shard] += 1


def _joined(arrays: Sequence[npt.NDArray[_Number]], dtype: type[_Number]) -> npt.NDArray[_Number]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays])
