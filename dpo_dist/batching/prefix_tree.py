"""Prefix tree: tokens with which several responses of a micro-batch begin are computed once.

A row is a prompt with a response. In the order of their token ids, a row shares more with the row before it
than with any earlier one, so that the tree is a list of segments: the tokens of each row that the row before
it does not have. Their queries see the shared tokens of that row, and their own.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.prefixes import Row, common_tokens, input_rows
from dpo_dist.data import Example


class Segment(NamedTuple):
    """The tokens of a row that the segment before it in the packed sequence does not have."""

    row: int  # index of its row
    shared: int  # leading tokens that the row has in common with the row of the segment before
    own: int  # its other tokens


def prefix_tree(examples: Sequence[Example], costs: ComputeCosts | None) -> list[Segment]:
    """Return the segments of the rows of `examples`, in the order of the packed sequence.

    A prompt is always shared, more than that only with `costs`, where it costs less than it saves.
    """
    rows: list[Row] = []
    prompts_of_rows: list[int] = []
    is_first: list[bool] = []
    for example in examples:
        rows += input_rows(example)
        prompts_of_rows += [len(example.prompt_ids)] * len(example.responses)
        is_first += [number == 0 for number in range(len(example.responses))]
    tokens = np.array(list(map(len, rows)))
    prompts = np.array(prompts_of_rows)
    plain = np.where(is_first, 0, prompts)
    order = np.arange(len(rows))
    shared = plain
    if costs is not None and costs.shares_prefixes:
        # By bytes, not by ids: any order serves in which rows that begin alike are neighbours.
        by_ids = np.array(sorted(range(len(rows)), key=lambda row: rows[row].tobytes()))
        common = np.array([0, *(common_tokens(rows[a], rows[b]) for a, b in pairwise(by_ids))])
        worth = costs.worth_sharing(common, tokens[by_ids])
        tree = np.where(common >= prompts[by_ids], common, worth)
        if tree.sum() > plain.sum():
            order = by_ids
            shared = tree
    own = tokens[order] - shared
    return [Segment(*map(int, segment)) for segment in zip(order, shared, own, strict=True)]


def paths(segments: Sequence[Segment]) -> list[list[tuple[int, int]]]:
    """Return for each segment where its row is in the packed sequence.

    Parts, in the order of the row's tokens: first token, and the one after the last.
    """
    of_segments: list[list[tuple[int, int]]] = []
    path = list[tuple[int, int]]()
    start = 0
    for _, shared, own in segments:
        path = first_tokens(path, shared)
        if path and path[-1][1] == start:
            path = [*path[:-1], (path[-1][0], start + own)]
        elif own:
            path = [*path, (start, start + own)]
        of_segments.append(path)
        start += own
    return of_segments


def first_tokens(path: Sequence[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """Return the parts of the first `tokens` tokens of a path."""
    parts = []
    for start, stop in path:
        if tokens <= 0:
            break
        parts.append((start, min(stop, start + tokens)))
        tokens -= stop - start
    return parts
