"""Options that the layers of a model have in different values."""

from typing import Any

import torch
from transformers import Gemma4TextConfig, LlamaConfig, MambaConfig

from dpo_dist.batching.plan import Reach
from dpo_dist.model.attention import Heads, heads_of_layers, scores_of
from dpo_dist.model.exactness import trial_sequences
from dpo_dist.model.flops import step_flops, without_weights
from dpo_dist.model.layers import layer_values
from tests.support.families import tiny_family

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA_4 = Gemma4TextConfig(
    **SIZES,
    layer_types=["sliding_attention", "full_attention"],
    sliding_window=8,
    head_dim=8,
    global_head_dim=16,
    hidden_size_per_layer_input=0,
)


def test_gemma_4_has_larger_heads_in_layers_without_a_window() -> None:
    assert heads_of_layers(GEMMA_4) == [Heads(4, 2, 8), Heads(4, 2, 16)]
    flops = step_flops(without_weights(GEMMA_4))
    assert flops.per_attended == 3 * 2 * 4 * (8 + 8 + 16 + 16)
    assert flops.reaches == (Reach(8, 0.5),)
    assert [scores.window is None for scores in scores_of(GEMMA_4)] == [True, False]


def test_options_of_each_layer_in_config_json_are_read() -> None:
    """transformers accepts them in the configuration of every architecture."""
    windows = {0: {"sliding_window": 60}, 1: {"num_key_value_heads": 1}}
    config = LlamaConfig(**SIZES, sliding_window=None, head_dim=8, per_layer_config=windows)
    assert layer_values(config, "sliding_window") == [60, None]
    assert layer_values(config, "hidden_size") == [32]
    assert heads_of_layers(config) == [Heads(4, 2, 8), Heads(4, 1, 8)]
    assert [scores.window is None for scores in scores_of(config)] == [True, False]


def test_invented_sequences_are_longer_than_the_window_of_gemma_4() -> None:
    causal_lm = tiny_family("gemma4_text", 97)
    causal_lm.config.sliding_window = 160
    first = trial_sequences(causal_lm, 512)[0]
    assert len(first.prompt_ids) + max(map(len, first.responses)) == 200


def test_a_model_without_attention_has_no_heads() -> None:
    assert heads_of_layers(MambaConfig()) == []


def test_a_token_of_gemma_4_counts_the_experts_it_visits() -> None:
    def per_token(visited: int) -> float:
        experts = {"enable_moe_block": True, "num_experts": 4, "moe_intermediate_size": 16}
        config = Gemma4TextConfig(**GEMMA_4.to_dict() | experts | {"top_k_experts": visited})
        with torch.device("meta"):
            return step_flops(without_weights(config)).per_token

    assert per_token(3) - per_token(2) == 6 * 2 * 3 * 32 * 16
