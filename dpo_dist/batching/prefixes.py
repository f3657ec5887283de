"""How examples begin: which leading token ids they share."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_dist.data import Example

Counts = npt.NDArray[np.int64]
Row = npt.NDArray[np.int32]
"""Token ids of a prompt and a response; negative ones stand for the tokens of an image."""


def image_words(digest: bytes, tokens: int) -> Row:
    """Return the words of an image's digest, as negative ids for its placeholders."""
    return np.resize(np.frombuffer(digest, dtype=np.int32), tokens) | np.int32(-(2**31))


def input_rows(example: Example) -> list[Row]:
    """Return the inputs for each response: the prompt, and the response without its last token.

    Words of an image's digest, as negative ids, are in the place of its placeholders.
    """
    prompt = example.prompt_ids
    if example.images:
        words = [image_words(image.digest, image.tokens) for image in example.images]
        prompt = prompt.copy()
        prompt[prompt == example.images[0].placeholder_id] = np.concatenate(words)
    return [np.concatenate((prompt, ids[:-1])) for ids in example.responses]


def common_tokens(first: Row, second: Row) -> int:
    """Return how many leading tokens two rows have in common; the tokens of an image are not divided."""
    length = min(len(first), len(second))
    is_other = first[:length] != second[:length]
    common = int(is_other.argmax()) if is_other.any() else length
    goes_on = [len(row) > common and row[common] < 0 for row in (first, second)]
    if common and first[common - 1] < 0 and any(goes_on):
        text = np.flatnonzero(first[:common] >= 0)
        common = int(text[-1]) + 1 if len(text) else 0
    return common


@dataclass(frozen=True)
class Prefixes:
    """The order of examples by their token ids, and how many leading tokens neighbours in it share.

    Records are sorted by their first row, the prompt with the first response; a record has one place in this
    order, with all its examples. Kept on disk, so that a start does not sort the rows of millions of records.
    """

    places: Counts  # [examples], the place of each example's record
    rows: Counts  # [examples], leading tokens of the record's first row with which the example begins
    # [places + 1], leading tokens that the first rows of a place and of the one before share; the last is 0.
    shared: npt.NDArray[np.int32]

    def select(self, indices: Counts) -> "Prefixes":
        """Return the prefixes of the examples at `indices`; their places are numbered anew."""
        distinct, places = np.unique(self.places[indices], return_inverse=True)
        shared = np.insert(np.minimum.reduceat(self.shared, distinct + 1), 0, 0)
        return Prefixes(places, self.rows[indices], shared)

    def common_with_previous(self) -> Counts:
        """Return how many leading tokens each example shares with the one before it, [examples].

        The examples have to be in ascending order of their places.
        """
        if not len(self.places):
            return np.zeros(0, dtype=np.int64)
        # Two rows share what all neighbours between them share, as in the LCP array of a suffix array (Manber
        # and Myers 1993): no token ids are read.
        edges = np.stack((self.places[:-1] + 1, self.places[1:] + 1), axis=1)
        common = np.minimum(self.rows[:-1], self.rows[1:])
        between = np.minimum.reduceat(self.shared, edges.ravel())[::2] if len(edges) else common
        return np.insert(np.where(edges[:, 0] < edges[:, 1], np.minimum(between, common), common), 0, 0)
