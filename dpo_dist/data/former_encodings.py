"""Fingerprints of encoded data, also of the same examples as an earlier version of this program encoded them.

A new version that changes how some records are encoded, or what is stored beside the token ids, encodes all
data again, under other fingerprints. A run whose own examples are the same is still the same run.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from dpo_dist.atomic import is_temporary
from dpo_dist.data.encoded_manifest import Manifest, read_manifest
from dpo_dist.data.encoded_source import EncodedSource
from dpo_dist.digests import text_digest

# Arrays of which training depends; masks only if there are some.
_EXAMPLES = ("ids", "piece_starts", "piece_tokens", "pair_pieces", "keys", "scores")
_MASKS = ("trained", "mask_starts")
# Of several sources that were encoded by several versions.
_MOST_COMBINATIONS = 1 << 12


def data_fingerprint(parts: Iterable[tuple[str, int | None]]) -> str:
    """Return the fingerprint of data, given that of each source and its limit."""
    return text_digest(json.dumps(list(parts)))


def was_fingerprint_of(recorded: str, sources: Sequence[EncodedSource]) -> bool:
    """Return whether an earlier version gave `recorded` to the examples of these sources.

    The folders beside those of the sources are compared: false if the former ones were deleted.
    """
    formers = [list(_formers(source)) for source in sources]
    combinations = itertools.islice(itertools.product(*formers), _MOST_COMBINATIONS)
    return any(data_fingerprint(parts) == recorded for parts in combinations)


def _formers(source: EncodedSource) -> Iterator[tuple[str, int | None]]:
    own = read_manifest(source.folder)
    for folder in sorted(source.folder.parent.iterdir()):
        former = None if is_temporary(folder) else read_manifest(folder)
        if own is not None and former is not None and _has_same_examples(own, former):
            yield former.fingerprint, source.limit


def _has_same_examples(one: Manifest, other: Manifest) -> bool:
    has_masks = [bool(manifest.sizes.get("trained")) for manifest in (one, other)]
    compared = _EXAMPLES + _MASKS if any(has_masks) else _EXAMPLES
    return all(one.digests.get(name) == other.digests.get(name) for name in compared)
