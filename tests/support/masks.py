"""Masks of the tokens that the loss counts, added to encoded records at random."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpo_dist.data import encode as encode_module
from dpo_dist.data.encode import EncodedExample
from dpo_dist.data.example import Example, Mask, TokenIds

_UNMASKED_SHARE = 0.3


def random_mask(response: TokenIds, seed: int = 0) -> Mask:
    """Return a mask that depends on the token ids: of spans, or of all tokens for some responses."""
    content = hashlib.blake2b(response.tobytes() + bytes([seed]), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(content, "little"))
    if generator.random() < _UNMASKED_SHARE:
        return np.ones(len(response), dtype=np.bool_)
    spans = generator.random(1 + len(response) // 3) < 0.5
    mask = np.resize(np.repeat(spans, 3), len(response))
    mask[generator.integers(len(response))] = True
    return mask


def masked(pair: Example, seed: int = 0) -> Example:
    """Return the same ids with random masks."""
    return replace(pair, trained=tuple(random_mask(response, seed) for response in pair.responses))


def add_masks(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Give every record that is encoded from now on random masks."""
    encode_pair = encode_module.encode_pair

    def encode(*args: Any) -> Any:
        found = encode_pair(*args)
        if not isinstance(found, EncodedExample):
            return found
        return replace(found, trained=tuple(random_mask(response, seed) for response in found.responses))

    monkeypatch.setattr(encode_module, "encode_pair", encode)
