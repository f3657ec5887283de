"""Branches of recurrent layers start in the state of their prefix, which the check at start checks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from dpo_dist.batching import state_tree
from dpo_dist.batching.costs import Arrangement, ComputeCosts
from dpo_dist.config.schema import AttentionBackend
from dpo_dist.data.example import Example
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model import states
from dpo_dist.model.architectures import WITH_STATES
from dpo_dist.model.attention.ulysses import check_shared_tokens
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.layers import checkpoint_layers
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.states import ForkedStates
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.packing import SHARING, VOCABULARY, pack_unkeyed, plain_logps
from tests.unit.batching.test_state_tree import ODD
from tests.unit.model.test_architectures import assert_same, gradients, packed

pytestmark = pytest.mark.slow
# One of each kind of layer, and one whose least time step is above 0.
KINDS = ("qwen3_5_text", "kimi_linear", "granitemoehybrid", "nemotron_h", "lfm2")


def remembering(kind: str, **own: Any) -> Any:
    """A model whose states last for hundreds of tokens, as in trained ones."""
    causal_lm = tiny_causal_lm(tiny_config(kind, **own))
    for name, parameter in causal_lm.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -5, -2)
    return causal_lm


def agents() -> list[Example]:
    """Turns of one conversation behind tools of several chunks, whose responses begin alike."""
    generator = np.random.default_rng(5)

    def ids(length: int) -> np.ndarray:
        return generator.integers(3, VOCABULARY, length).astype(np.int32)

    history, found = ids(200), []
    for turn in range(4):
        history = np.concatenate([history, ids(5 + 20 * turn)])
        start = ids(9 * turn)
        responses = tuple(np.concatenate([start, ids(length)]) for length in (1, 70, 12)[: 2 + turn % 2])
        found.append(Example(history, responses))
        history = np.concatenate([history, responses[0]])
    return found


def at_chunks() -> list[Example]:
    """Rows that branch at the ends of chunks, one of them twice; the loss counts every third token."""
    generator = np.random.default_rng(6)

    def ids(length: int) -> np.ndarray:
        return generator.integers(3, VOCABULARY, length).astype(np.int32)

    def counted(*responses: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.arange(len(each)) % 3 == 0 for each in responses)

    row = ids(192)
    pairs = [
        (row[:64], row[64:], ids(65)),
        (row[:64], row[64:128], ids(1)),
        (row[:128], ids(66), ids(2)),
    ]
    return [
        Example(prompt, tuple(responses), counted(*responses)) for prompt, *responses in [*pairs, pairs[0]]
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("examples", "costs", "tokens"),
    [(agents(), SHARING, 695), (ODD, SHARING, 7), (ODD, None, 18), (at_chunks(), SHARING, 191 + 64 + 65 + 1)],
)
def test_long_rows_in_many_levels_odd_ones_and_branches_at_chunks_are_exact(
    kind: str, examples: list[Example], costs: ComputeCosts | None, tokens: int
) -> None:
    """Their log-probs, and the gradient of all weights, which flows back through the states.

    Without costs only prompts are shared: a node with children may be padded.
    """
    causal_lm, batch = remembering(kind), pack_unkeyed(examples, costs)
    assert len(batch.input_ids) == tokens
    counts = torch.from_numpy(np.concatenate([mask for each in examples for mask in each.masks]))
    expected = plain_logps(causal_lm, examples)[counts]
    expected_gradients = gradients(causal_lm, expected)
    logps = packed(causal_lm)(batch)
    assert (logps - expected).abs().max() < 2e-5
    assert_same(gradients(causal_lm, logps), expected_gradients, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_start_in_the_same_states(kind: str) -> None:
    causal_lm = remembering(kind)
    model = packed(causal_lm)
    expected = gradients(causal_lm, model(pack_unkeyed(agents())))
    checkpoint_layers(causal_lm, "full")
    assert_same(gradients(causal_lm, model.train()(pack_unkeyed(agents()))), expected)


def settled(kind: str, **own: Any) -> Arrangement:
    model = PackedCausalLM(remembering(kind, **own), AttentionBackend.sdpa, arrangement=Arrangement.padded)
    StartCheck(model, model, torch.device("cpu"), 256).choose_arrangement()
    return model.arrangement


def without_parents(nodes: list[state_tree.StateNode]) -> list[state_tree.StateNode]:
    return [node._replace(parent=-1, level=0) for node in nodes]


def of_the_sibling(nodes: list[state_tree.StateNode]) -> list[state_tree.StateNode]:
    """A parent of the same level, other than the right one."""

    def other(node: state_tree.StateNode) -> int:
        level = node.level - 1
        others = [n for n, each in enumerate(nodes) if each.level == level and n != node.parent]
        return others[0] if node.parent >= 0 and others else node.parent

    return [node._replace(parent=other(node)) for node in nodes]


Contexts = tuple[np.ndarray, np.ndarray]


def from_zeros(tokens: np.ndarray, places: np.ndarray) -> Contexts:
    is_own = np.zeros(len(tokens), bool)
    is_own[places] = True
    return np.where(is_own, tokens, -1), places


def from_the_sequence(tokens: np.ndarray, places: np.ndarray) -> Contexts:
    count = len(places)
    width = (places[0]) if count else 0
    return np.concatenate([np.full(width, -1), np.arange(count)]), np.arange(width, width + count)


NODES = {"no state of the parent": without_parents, "the state of another branch": of_the_sibling}
CONTEXTS = {"a convolution that starts anew": from_zeros, "one over the packed sequence": from_the_sequence}


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("fault", NODES)
def test_the_check_at_start_refuses_other_states(
    kind: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled(kind) is Arrangement.packed
    monkeypatch.setattr(
        states, "state_nodes", lambda segments: NODES[fault](state_tree.state_nodes(segments))
    )
    assert settled(kind) is not Arrangement.packed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", CONTEXTS)
def test_the_check_at_start_refuses_other_contexts(
    kind: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contexts(segments: Any, width: int) -> Contexts:
        return CONTEXTS[fault](*state_tree.with_contexts(segments, width))

    monkeypatch.setattr(states, "with_contexts", contexts)
    assert settled(kind) is not Arrangement.packed


def test_the_check_at_start_refuses_padding_that_changes_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nemotron-H raises each time step to a least one, so that a naive padding decays the state."""
    assert settled("nemotron_h", time_step_min=0.2) is Arrangement.packed

    def naive(self: ForkedStates, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        limits, bias = options.pop("dt_limit"), options.pop("dt_bias")
        hidden, dt, *others = inputs
        steps = softplus(dt + bias)

        def clamped(x: Any, raised: Any, *rest: Any, **given: Any) -> Any:
            return function(x, raised.clamp(*limits), *rest, **given)

        options["dt_softplus"] = False
        return scan(self, clamped, hidden, steps, *others, **options)

    scan = ForkedStates.scan
    monkeypatch.setattr(ForkedStates, "scan", naive)
    assert settled("nemotron_h", time_step_min=0.2) is not Arrangement.packed


@pytest.mark.parametrize("kind", sorted(WITH_STATES))
def test_ranks_cannot_share_the_tokens_of_a_row(kind: str) -> None:
    check_shared_tokens(tiny_config(kind), 1)
    with pytest.raises(ConfigError, match="hand a state from token to token"):
        check_shared_tokens(tiny_config(kind), 2)
