"""Check that the offsets of an encoded source are inside its arrays, whoever wrote them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dpo_dist.data.concatenated import Array
from dpo_dist.errors import DataError


def check_offsets(arrays: Mapping[str, Array], outcomes: int, folder: Path) -> None:
    """Check the offsets of an encoded source; the token ids are not read.

    Args:
        arrays: as in the files of `encoded_source`.
        outcomes: number of distinct outcomes.
        folder: of the arrays, for the error.

    Raises:
        DataError: an offset or a number is outside of what it counts.
    """
    starts, tokens = arrays["piece_starts"], arrays["piece_tokens"]
    ends, codes = arrays["pair_pieces"], arrays["outcomes"]
    faults = {
        "piece_starts": len(starts) != len(tokens) or not _inside(starts, tokens, len(arrays["ids"])),
        "pair_pieces": len(ends) > 0
        and (
            int(ends.min()) < 0 or int(ends[-1]) > len(starts) or bool((np.diff(ends, prepend=0) < 2).any())
        ),
        "outcomes": len(codes) > 0 and not 0 <= int(codes.min()) <= int(codes.max()) < outcomes,
    }
    if wrong := [name for name, is_wrong in faults.items() if is_wrong]:
        raise DataError(
            "encoded data are damaged in a way that their digests do not show",
            where=str(folder),
            got=f"offsets outside the arrays: {', '.join(wrong)}",
            remedy="delete this folder of data.cache: the data are encoded again",
        )


def _inside(starts: Array, tokens: Array, size: int) -> bool:
    if not len(starts):
        return True
    if starts.min() < 0 or starts.max() > size or tokens.min() < 0:  # else the sum could overflow
        return False
    return bool((starts + tokens).max() <= size)
