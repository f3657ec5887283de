"""Operations of a step: those that a counter inside PyTorch sees, and those that a hand adds up."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from dpo_dist.model import flops as counting
from dpo_dist.model.flops import StepFlops, compute_costs, count_flops, matmul_peak
from dpo_dist.model.packable import EXACT_MODEL_TYPES
from tests.support.packing import pack_unkeyed, random_pairs
from tests.unit.test_architectures import SHAPES, packed, tiny_causal_lm, tiny_config


@pytest.mark.parametrize("model_type", sorted(EXACT_MODEL_TYPES))
def test_matrices_are_those_that_pytorch_counts_in_a_forward(model_type: str) -> None:
    config = tiny_config(model_type)
    config._experts_implementation = "eager"  # the counter knows no grouped product
    model = packed(tiny_causal_lm(config))
    batch = pack_unkeyed(random_pairs(SHAPES))
    with FlopCounterMode(display=False) as counter:
        model(batch)
    products = counter.get_flop_counts()["Global"]
    seen = sum(count for kind, count in products.items() if str(kind) in ("aten.mm", "aten.addmm"))
    step = count_flops(config).of(len(batch.input_ids), len(batch.targets), attended=0)
    assert step / 3 == seen


def test_a_step_by_hand() -> None:
    flops = count_flops(tiny_config("qwen2"))
    # Two layers, 32 wide: queries and output 32 x 32, keys and values 32 x 16, an MLP of three 32 x 48.
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert flops.per_token == 6 * body
    assert flops.per_target == 6 * 32 * 97
    # Scores and values: 2 operations each for each of 32 numbers in two layers, and twice that backward.
    assert flops.per_attended == 3 * 2 * (2 * 32 + 2 * 32)
    assert flops.of(10, 4, 30) == 10 * flops.per_token + 4 * flops.per_target + 30 * flops.per_attended


def test_a_token_is_charged_for_the_experts_it_visits() -> None:
    def per_token(**own: Any) -> float:
        return count_flops(tiny_config("qwen3_moe", **own)).per_token

    expert, router = 2 * 3 * 32 * 16, 2 * 32
    assert per_token(num_experts_per_tok=3) - per_token(num_experts_per_tok=2) == 6 * expert
    assert per_token(num_experts=8) - per_token(num_experts=4) == 6 * 4 * router


def test_costs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_ATTENTION_SLOWNESS", 2.0)
    monkeypatch.setattr(counting, "_HEAD_SLOWNESS", 1.5)
    costs = compute_costs(StepFlops(per_token=600.0, per_target=60.0, per_attended=3.0))
    assert costs.key == pytest.approx(2.0 * 3 / 600)
    assert costs.target == pytest.approx(
        1.5 * (8 * 60 / 6) / 600
    )  # two more operations a number: logits again


def test_attention_is_as_dear_as_all_else_in_very_long_sequences_only() -> None:
    qwen7b = AutoConfig.for_model(
        "qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    costs = compute_costs(count_flops(qwen7b))
    assert 5_000 < 1 / costs.key < 40_000
    assert 0.05 < costs.target < 0.2


def test_the_peak_is_a_rate_and_leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), state)
