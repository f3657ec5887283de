"""Shares of a packed sequence: each token and target is of one rank, attention sees the whole sequence."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.ulysses import check_shared_tokens
from tests.support.packing import pack_unkeyed, random_pairs
from tests.unit.model.test_architectures import WINDOWED, assert_same, gradients, packed, windowed

T = TypeVar("T")


@dataclass(frozen=True)
class InThreads:
    """Ranks that are threads of this process."""

    rank: int
    ranks: int
    barrier: threading.Barrier
    sent: list[Tensor]

    def all_to_all(self, parts: Tensor) -> Tensor:
        return torch.stack([part[self.rank] for part in self._all(parts)])

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack(self._all(part))

    def _all(self, tensor: Tensor) -> list[Tensor]:
        self.barrier.wait()
        self.sent[self.rank] = tensor
        self.barrier.wait()
        return list(self.sent)


def on_ranks(ranks: int, work: Callable[[InThreads], T]) -> list[T]:
    """Return what each rank returns."""
    barrier, sent = threading.Barrier(ranks, timeout=30), [torch.empty(0)] * ranks
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, [InThreads(rank, ranks, barrier, sent) for rank in range(ranks)]))


@pytest.mark.parametrize(
    ("heads", "possible"),
    [
        ((28, 4), {1, 2, 4, 28}),
        ((32, 8), {1, 2, 4, 8, 16, 32}),
        ((6, 6), {1, 2, 3, 6}),
    ],
)
def test_ranks_that_cannot_divide_the_heads_are_an_error_with_those_that_can(
    heads: tuple[int, int], possible: set[int]
) -> None:
    sizes = {"hidden_size": heads[0] * 8, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    config = LlamaConfig(**sizes)
    for ranks in range(1, 40):
        if ranks in possible:
            check_shared_tokens(config, ranks)
            continue
        with pytest.raises(ConfigError, match="divided among so many ranks") as raised:
            check_shared_tokens(config, ranks)
        assert raised.value.expected == f"one of {', '.join(map(str, sorted(possible)))}"


FAMILIES = ("cohere2", "gemma2", "gpt_oss", "llama4_text", "olmo3", "phi3", "qwen3", "deepseek_v3", "granite")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("model_type", "routes"),
    [*((name, False) for name in FAMILIES), ("mixtral", True), ("qwen3_moe", True)],
)
def test_a_model_on_several_ranks_equals_one_rank(model_type: str, routes: bool, ranks: int) -> None:
    """Windows shorter than responses, and a number of tokens that the ranks do not divide."""
    batch = pack_unkeyed(random_pairs([(7, 5, 9), (1, 1, 4), (12, 3, 3)]))
    assert len(batch.input_ids) % 2
    own = {"num_local_experts": 4} if model_type == "mixtral" else {}
    causal_lm = windowed(model_type, 3 if model_type in WINDOWED and not routes else None, **own)

    def compute(model: PackedCausalLM) -> Tensor:
        found = model(batch, with_routing=routes)
        values = found[1] if routes else found
        assert isinstance(values, Tensor)
        return values

    def share(exchange: InThreads) -> Tensor:
        model = packed(causal_lm)
        model.sequence = exchange
        return compute(model)

    expected = compute(packed(causal_lm))
    expected_gradients = gradients(causal_lm, expected)
    found = on_ranks(ranks, share)
    for values in found:
        assert (values - expected).norm() <= 1e-6 * expected.norm()
    assert_same(gradients(causal_lm, found[0]), expected_gradients)
