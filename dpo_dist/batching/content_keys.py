"""The content keys of responses, by which a store finds their log-probs (law L3)."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.data import Example, ImageInput, TokenIds

Keys: TypeAlias = npt.NDArray[np.uint64]


def response_key(prompt_ids: TokenIds, response_ids: TokenIds, images: Sequence[ImageInput] = ()) -> bytes:
    """Return the content key of a response to a prompt: 16 bytes over token ids and images (law L3)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(prompt_ids, dtype=np.int32).tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype=np.int32).tobytes())
    for image in images:  # without images the key is that of the token ids
        digest.update(image.digest)
    return digest.digest()


def response_keys(examples: Iterable[Example]) -> Keys:
    """Return the content keys of all responses, as in a reference store; uint64 [responses, 2]."""
    keys: list[bytes] = []
    for example in examples:
        keys += [response_key(example.prompt_ids, ids, example.images) for ids in example.responses]
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)
