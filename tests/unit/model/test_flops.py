"""FLOPs of a step equal PyTorch's count and a count by hand."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from dpo_dist.batching.plan import Reach
from dpo_dist.config.schema import AdapterConfig, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model import flops as counting
from dpo_dist.model.flops import (
    StepFlops,
    compute_costs,
    datasheet_peak,
    matmul_peak,
    step_flops,
    without_weights,
)
from dpo_dist.model.lora import add_adapter
from tests.support.packing import pack_unkeyed, random_pairs
from tests.unit.model.test_architectures import ARCHITECTURES, SHAPES, packed, tiny_causal_lm, tiny_config

PATTERN = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_flops_of_matrices_equal_pytorchs_count(model_type: str) -> None:
    config = tiny_config(model_type)
    config._experts_implementation = "eager"  # the counter knows no grouped product
    model = packed(tiny_causal_lm(config))
    batch = pack_unkeyed(random_pairs(SHAPES))
    with FlopCounterMode(display=False) as counter:
        model(batch)
    products = counter.get_flop_counts()["Global"]
    seen = sum(count for kind, count in products.items() if str(kind) in ("aten.mm", "aten.addmm"))
    step = step_flops(without_weights(config)).of(len(batch.input_ids), len(batch.targets), attended=0)
    assert step / 3 == seen


def test_a_configuration_that_builds_no_model_is_refused() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "unheard_of", "rope_theta": 10000.0}
    with pytest.raises(ConfigError, match="unheard_of"):
        step_flops(without_weights(config))


def test_a_step_by_hand() -> None:
    flops = step_flops(without_weights(tiny_config("qwen2")))
    # Two layers, 32 wide: queries and output 32 x 32, keys and values 32 x 16, an MLP of three 32 x 48.
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert flops.per_token == 6 * body
    assert flops.per_target == 6 * 32 * 97
    # Scores and values: 2 operations each for each of 32 numbers in two layers, and twice that backward.
    assert flops.per_attended == 3 * 2 * (2 * 32 + 2 * 32)
    assert flops.of(10, 4, 30) == 10 * flops.per_token + 4 * flops.per_target + 30 * flops.per_attended


def test_keys_and_values_of_low_rank_have_sizes_of_their_own() -> None:
    flops = step_flops(without_weights(tiny_config("deepseek_v3")))
    # Four heads in two layers: scores over 4 + 4 dimensions, values of 6.
    assert flops.per_attended == 3 * 2 * 2 * 4 * (4 + 4 + 6)


@pytest.mark.parametrize(
    ("model_type", "own", "reaches"),
    [
        ("llama", {}, ()),
        ("mistral", {"sliding_window": 8}, (Reach(8, 1.0),)),
        ("mistral", {"sliding_window": None}, ()),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, ()),
        (
            "qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            (Reach(8, 0.5),),
        ),
        ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 8}, (Reach(8, 5 / 6),)),
        ("llama4_text", {"num_hidden_layers": 4, "attention_chunk_size": 8}, (Reach(8, 0.75, True),)),
    ],
)
def test_layers_with_windows_or_chunks_are_counted(
    model_type: str, own: dict[str, Any], reaches: tuple[Reach, ...]
) -> None:
    flops = step_flops(without_weights(tiny_config(model_type, head_dim=8, **own)))
    assert flops.reaches == compute_costs(flops).reaches == reaches


def test_a_token_counts_the_experts_it_visits() -> None:
    def per_token(**own: Any) -> float:
        return step_flops(without_weights(tiny_config("qwen3_moe", **own))).per_token

    expert, router = 2 * 3 * 32 * 16, 2 * 32
    assert per_token(num_experts_per_tok=3) - per_token(num_experts_per_tok=2) == 6 * expert
    assert per_token(num_experts=8) - per_token(num_experts=4) == 6 * 4 * router


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_flops_of_an_adapter_equal_pytorchs_count(targets: Any) -> None:
    adapter = AdapterConfig(r=4, alpha=8.0, target_modules=targets)
    config = tiny_config("qwen2")
    model = packed(tiny_causal_lm(config))
    add_adapter(model, ModelConfig(path="org/model", adapter=adapter), seed=0)
    # Else the first layer has no gradient of its input, which is the only one that is missing.
    model.causal_lm.enable_input_require_grads()
    batch = pack_unkeyed(random_pairs(SHAPES))
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    products = counter.get_flop_counts()["Global"]
    seen = sum(count for kind, count in products.items() if str(kind) in ("aten.mm", "aten.addmm"))
    assert (
        step_flops(without_weights(config), adapter).of(len(batch.input_ids), len(batch.targets), attended=0)
        == seen
    )


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla P100", None),
    ],
)
def test_a_device_is_found_by_its_full_name(name: str, tflops: float | None) -> None:
    assert datasheet_peak(name, torch.bfloat16) == (None if tflops is None else 1e12 * tflops)


def test_costs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_ATTENTION_SLOWNESS", 2.0)
    monkeypatch.setattr(counting, "_HEAD_SLOWNESS", 1.5)
    costs = compute_costs(StepFlops(per_token=600.0, per_target=60.0, per_attended=3.0))
    assert costs.key == pytest.approx(2.0 * 3 / 600)
    assert costs.target == pytest.approx(
        1.5 * (8 * 60 / 6) / 600
    )  # two more operations a number: logits again


def test_attention_dominates_only_in_very_long_sequences() -> None:
    qwen7b = AutoConfig.for_model(
        "qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )
    costs = compute_costs(step_flops(without_weights(qwen7b)))
    assert 5_000 < 1 / costs.key < 40_000
    assert 0.05 < costs.target < 0.2


def test_the_peak_is_a_rate_and_keeps_the_random_state() -> None:
    state = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), state)
