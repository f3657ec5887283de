"""Every row is a chain of nodes, and each token has its row's tokens as left context."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_dist.batching.prefix_tree import prefix_tree
from dpo_dist.batching.state_tree import state_nodes, with_contexts
from dpo_dist.data.example import Example
from tests.support.packing import SHARING, branching, pack_unkeyed, pair_shapes, random_pairs


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


# A response that begins like another and ends within it, the same response twice, and a prompt of one token.
ODD = [
    Example(ids(5, 6), (ids(7, 8, 9, 4), ids(7), ids(7, 8, 3), ids(7, 8, 9, 4))),
    Example(ids(5), (ids(6, 7), ids(9))),
    Example(ids(5, 6, 7, 8), (ids(9), ids(9, 9))),
    Example(ids(3), (ids(3), ids(4))),
]


@settings(max_examples=100)
@given(shapes=pair_shapes, seed=st.integers(0, 100), width=st.integers(0, 5), is_tree=st.booleans())
def test_rows_are_chains_of_nodes_and_contexts_are_their_tokens(
    shapes: list[tuple[int, ...]], seed: int, width: int, is_tree: bool
) -> None:
    check(branching(random_pairs(shapes, seed), seed), width, is_tree)


def test_odd_rows_are_chains_of_nodes() -> None:
    for width in range(6):
        check(ODD, width, is_tree=True)


def check(examples: list[Example], width: int, is_tree: bool) -> None:
    batch = pack_unkeyed(examples, SHARING if is_tree else None)
    segments = prefix_tree(examples, SHARING if is_tree else None)
    nodes, tokens = state_nodes(segments), batch.input_ids.numpy()
    assert [token for node in nodes for token in range(node.start, node.stop)] == list(range(len(tokens)))
    chains = []
    for node in nodes:
        before = [] if node.parent < 0 else chains[node.parent]
        assert node.level == (0 if node.parent < 0 else nodes[node.parent].level + 1)
        chains.append([*before, *range(node.start, node.stop)])
    of_node = {node.stop - 1: chain for node, chain in zip(nodes, chains, strict=True)}
    for row in batch.rows:  # the last token of a row may lie within a node
        chain = next(chain for end, chain in sorted(of_node.items()) if end >= row[-1])
        assert list(row) == chain[: len(row)]

    found, places = with_contexts(segments, width)
    assert list(found[places]) == list(range(len(tokens)))
    for row in batch.rows:
        padded = np.concatenate([np.full(width, -1), row])
        for number, token in enumerate(row):
            assert list(found[places[token] - width : places[token]]) == list(padded[number : number + width])
