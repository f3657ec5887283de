"""Tree of states: the recurrent state at the end of a prefix is the initial state of each of its branches.

A layer with a state (gated delta rule, Mamba-2, convolution) reads tokens in their order, so that a packed
sequence with shared prefixes needs to know where each token's row came from. A segment
(batching/prefix_tree.py) is cut into nodes where branches leave it. Nodes of one level are computed
together, after those of the level before.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.prefix_tree import Segment, first_tokens, paths

_Tokens = npt.NDArray[np.int64]


class StateNode(NamedTuple):
    """Tokens of the packed sequence between two places where branches leave."""

    start: int
    stop: int
    parent: int  # index of the node in whose last state it starts; -1: a row starts here, without a state
    level: int  # number of nodes before it in its row


def state_nodes(segments: Sequence[Segment]) -> list[StateNode]:
    """Return the nodes of the segments, in the order of the packed sequence."""
    # Where the segments leave: behind the last token that each shares with the segment before.
    branches = list[int]()
    path = list[tuple[int, int]]()
    for segment, following in zip(segments, paths(segments), strict=True):
        shared = first_tokens(path, segment.shared)
        branches.append(shared[-1][1] if shared else -1)
        path = following
    nodes = list[StateNode]()
    by_end = dict[int, int]()
    start = 0
    places = sorted(branches)
    for segment, branch in zip(segments, branches, strict=True):
        parent = by_end.get(branch, -1)
        stop = start + segment.own
        inside = places[bisect_right(places, start) : bisect_left(places, stop)]
        edges = sorted({start, stop, *inside})
        for first, end in pairwise(edges):
            level = nodes[parent].level + 1 if parent >= 0 else 0
            nodes.append(StateNode(first, end, parent, level))
            parent = by_end[end] = len(nodes) - 1
        start = stop
    return nodes


def with_contexts(segments: Sequence[Segment], width: int) -> tuple[_Tokens, _Tokens]:
    """Return the segments' tokens, each behind the `width` tokens before it in its row, and their places.

    Tokens are indices in the packed sequence, or -1 before a row begins; places are those of the segments'
    own tokens in this list.
    """
    tokens = list[_Tokens]()
    places = list[_Tokens]()
    path = list[tuple[int, int]]()
    start = 0
    length = 0
    for segment, following in zip(segments, paths(segments), strict=True):
        before = [np.arange(*part) for part in first_tokens(path, segment.shared)]
        context = np.concatenate([np.full(width, -1), *before])[-width:] if width else np.zeros(0, np.int64)
        tokens += [context, np.arange(start, start + segment.own)]
        places.append(np.arange(length + width, length + width + segment.own))
        start += segment.own
        length += width + segment.own
        path = following
    return np.concatenate(tokens), np.concatenate(places)
