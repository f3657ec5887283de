"""Check that the offsets of an encoded source are inside its arrays and its ids in the vocabulary."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dpo_dist.data.concatenated import Array
from dpo_dist.errors import DataError


def check_offsets(
    arrays: Mapping[str, Array], outcome_pairs: Sequence[int], files: int, folder: Path
) -> None:
    """Check the offsets of an encoded source; the token ids are not read.

    Args:
        arrays: as in the files of `encoded_source`.
        outcome_pairs: examples of a record with each distinct outcome.
        files: number of files of the records.
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
        "outcomes": len(codes) > 0 and not 0 <= int(codes.min()) <= int(codes.max()) < len(outcome_pairs),
    }
    if not any(faults.values()):
        pairs = np.bincount(codes, minlength=len(outcome_pairs)) @ np.asarray(outcome_pairs, dtype=np.int64)
        faults["outcomes"] = int(pairs) != len(ends)
        faults |= _faults_of_examples(arrays, files)
    if wrong := [name for name, is_wrong in faults.items() if is_wrong]:
        raise DataError(
            "encoded data are damaged in a way that their digests do not show",
            where=str(folder),
            got=f"offsets outside the arrays: {', '.join(wrong)}",
            remedy="delete this folder of data.cache: the data are encoded again",
        )


def check_ids(pieces: Sequence[Array], largest: int, origin: Callable[[], str]) -> None:
    """Check the token ids of one example: an id outside of the vocabulary would abort a GPU's process.

    Args:
        pieces: int32 [tokens] each.
        largest: upper bound of ids.
        origin: returns the file and line of the example, for the error.

    Raises:
        DataError: an id is negative or above `largest`.
    """
    # As unsigned numbers, negative ids are large ones.
    if np.concatenate(pieces).view(np.uint32).max(initial=0) > largest:
        raise DataError(
            "encoded data are damaged in a way that their digests do not show",
            where=origin(),
            got="token ids above the largest one of the manifest",
            remedy="delete this folder of data.cache: the data are encoded again",
        )


def _faults_of_examples(arrays: Mapping[str, Array], files: int) -> dict[str, bool]:
    """Return whether each array has another length than the examples, or values outside of their range."""
    ends, tokens = arrays["pair_pieces"], arrays["piece_tokens"]
    pairs = len(ends)
    responses = (int(ends[-1]) if pairs else 0) - pairs
    lengths = {"keys": 2 * responses, "origins": 2 * pairs, "prompts": pairs}
    lengths |= dict.fromkeys(("scores", "mask_starts", "trained_tokens", "truncated"), responses)
    faults = {name: len(arrays[name]) != length for name, length in lengths.items()}
    if any(faults.values()) or not pairs:
        return faults
    of_files, counted, starts = arrays["origins"][::2], arrays["trained_tokens"], arrays["mask_starts"]
    faults["origins"] = not 0 <= int(of_files.min()) <= int(of_files.max()) < files
    is_response = np.ones(len(tokens), dtype=np.bool_)
    is_response[ends[:-1]], is_response[0], is_response[ends[-1] :] = False, False, False
    of_responses = tokens[is_response]
    faults["trained_tokens"] = counted.min() < 0 or bool((counted > of_responses).any())
    has_mask = counted < of_responses
    faults["mask_starts"] = not _inside(starts[has_mask], of_responses[has_mask], len(arrays["trained"]))
    return faults


def _inside(starts: Array, tokens: Array, size: int) -> bool:
    if not len(starts):
        return True
    if starts.min() < 0 or starts.max() > size or tokens.min() < 0:  # else the sum could overflow
        return False
    return bool((starts + tokens).max() <= size)
