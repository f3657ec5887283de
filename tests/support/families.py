"""Small models of many families, as their own configurations make them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.batching.costs import Arrangement
from tests.support.packing import VOCABULARY

PACKED, PADDED, SINGLE = Arrangement
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
LOW_RANK = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LISTED = {**EXPERTS, **HEADS, "norm_topk_prob": True}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **HEADS,
}
# The last two layers attend to keys and values of the first two.
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    **HEADS,
}
# Sparse attention chooses keys by sums of ReLUs: with few heads many sums are 0, and rounding chooses.
CHOICES = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 8}
# Keys are weighed by their distance in the sequence.
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    **HEADS,
}
# Families that need no options of their own to be small, and can be packed.
PLAIN = """
biogpt ernie4_5 gpt2 gpt_bigcode granite llama mistral olmo olmo2 phi phi3 qwen2 smollm3 starcoder2
"""
# Options of the others, and the arrangement that the log-probs of each are exact in.
FAMILIES: dict[str, tuple[dict[str, Any], Arrangement]] = dict.fromkeys(PLAIN.split(), ({}, PACKED)) | {
    "bamba": (MAMBA2 | {"attn_layer_indices": [1]}, PACKED),
    "bailing_hybrid": (
        LOW_RANK
        | {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 2, "linear_head_dim": 8}
        | {"moe_intermediate_size": 16, **HEADS},
        PACKED,
    ),
    "bloom": ({}, PADDED),
    "codegen": ({"rotary_dim": 4}, PADDED),
    "cohere": ({"logit_scale": 0.25}, PACKED),
    "cohere2": ({"logit_scale": 0.25, "sliding_window": 8, **HEADS}, PACKED),
    "deepseek_v2": (LOW_RANK | ROUTED, PACKED),
    "deepseek_v3": (LOW_RANK | ROUTED, PACKED),
    "deepseek_v32": (LOW_RANK | ROUTED | CHOICES | {"head_dim": 4}, PADDED),
    "deepseek_v4": (
        {"layer_types": ["sliding_attention", "compressed_sparse_attention"], "num_key_value_heads": 1}
        | {"compress_rates": {"compressed_sparse_attention": 4}, "mlp_layer_types": ["hash_moe", "moe"]}
        | {"sliding_window": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"head_dim": 16, "partial_rotary_factor": 0.25, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 8}
        | CHOICES,
        PADDED,
    ),
    "exaone4": ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, PACKED),
    "falcon": ({"new_decoder_architecture": False, "alibi": True}, PADDED),
    "falcon_h1": (MAMBA2 | {"mamba_d_ssm": 64, **HEADS}, PACKED),
    "falcon_mamba": ({"state_size": 4}, PADDED),
    "gemma": (HEADS | {"num_key_value_heads": 1}, PACKED),
    "gemma2": ({"sliding_window": 8, "final_logit_softcapping": 2.0, **HEADS}, PACKED),
    "gemma3_text": ({"sliding_window": 8, **HEADS}, PACKED),
    "gemma3n_text": (
        SHARED_KEYS | {"laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
        PACKED,
    ),
    "gemma4_text": (
        SHARED_KEYS
        | {"global_head_dim": 16, "use_double_wide_mlp": True, "use_bidirectional_attention": "vision"},
        PACKED,
    ),
    "glm": (HEADS, PACKED),
    "glm4": (HEADS, PACKED),
    "glm4_moe": (ROUTED | HEADS | {"n_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}, PACKED),
    "gpt_neo": ({"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8}, PADDED),
    "gpt_neox": ({"rotary_pct": 0.5}, PACKED),
    "gpt_oss": (MIXTURE | HEADS | {"sliding_window": 8}, PACKED),
    "gptj": ({"rotary_dim": 4}, PADDED),
    "granitemoe": (MIXTURE | {"logits_scaling": 4.0}, PACKED),
    "granitemoehybrid": (
        MAMBA2
        | MIXTURE
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "logits_scaling": 2.0},
        PACKED,
    ),
    "hyperclovax": ({"logits_scaling": 0.5}, PACKED),
    "inkling2_text": (INKLING | {"n_layers_per_attn_res_block": 1}, PADDED),
    "inkling_text": (INKLING | {"mlp_layer_types": ["dense", "sparse"], "n_shared_experts": 1}, PADDED),
    "jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        PADDED,
    ),
    "kimi_linear": (
        LOW_RANK
        | ROUTED
        | {"layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 2, "linear_head_dim": 8}
        | {"q_lora_rank": None},
        PACKED,
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, PACKED),
    "lfm2_moe": (EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, PACKED),
    "lfm3": ({"layer_types": ["conv", "full_attention"]}, PACKED),
    "llama4_text": (
        HEADS
        | {"num_local_experts": 2, "moe_layers": [1], "intermediate_size_mlp": 48}
        | {"floor_scale": 4, "attn_scale": 0.5},
        PACKED,
    ),
    "mamba": ({"state_size": 4}, PADDED),
    "mamba2": ({"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16}, PACKED),
    "minimax": ({"num_local_experts": 4, "block_size": 16, **HEADS}, PADDED),
    "minicpm3": (LOW_RANK | {"dim_model_base": 16}, PACKED),
    "ministral": (HEADS | {"sliding_window": 8}, PACKED),
    "ministral3": (HEADS, PACKED),
    "mixtral": (MIXTURE | HEADS, PACKED),
    "mpt": ({}, PADDED),
    "nemotron": ({}, PADDED),
    "nemotron_h": (
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8}
        | {"n_groups": 1, "ssm_state_size": 8, "chunk_size": 16, **HEADS},
        PACKED,
    ),
    "olmo3": ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, PACKED),
    "olmo_hybrid": (DELTA, PACKED),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, PACKED),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, PACKED),
    "phimoe": (MIXTURE, PACKED),
    "qwen2_moe": (LISTED | {"shared_expert_intermediate_size": 16}, PACKED),
    "qwen3": (HEADS, PACKED),
    "qwen3_5_moe_text": (DELTA | EXPERTS | {"shared_expert_intermediate_size": 16}, PACKED),
    "qwen3_5_text": (DELTA, PACKED),
    "qwen3_moe": (LISTED | {"mlp_only_layers": [0]}, PACKED),
    "qwen3_next": (DELTA | EXPERTS | {"shared_expert_intermediate_size": 16}, PACKED),
    "qwen4_exp_text": (
        DELTA
        | EXPERTS
        | {"shared_expert_intermediate_size": 16, "hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 16}
        | {"indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
        PADDED,
    ),
    "recurrent_gemma": ({"attention_window_size": 8, "lru_width": 32, **HEADS}, PADDED),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 512}, PADDED),
    "seed_oss": (HEADS, PACKED),
    "stablelm": ({}, PADDED),
    "xglm": ({"num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "d_model": 32}, PADDED),
    "xlstm": ({"num_heads": 4, "embedding_dim": 32, "num_blocks": 2, "chunk_size": 16}, PADDED),
    "zamba": (
        {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_key_value_heads": 4}
        | {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2, "mamba_d_state": 4}
        | {"mamba_dt_rank": 4},
        PADDED,
    ),
    "zamba2": (
        # The last two layers share weights.
        {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_key_value_heads": 4}
        | {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4, "mamba_headdim": 16}
        | {"mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 16, "adapter_rank": 4, "num_mem_blocks": 1},
        PACKED,
    ),
}


def tiny_config(model_type: str, vocab_size: int = VOCABULARY, **own: Any) -> Any:
    """The configuration of a small model of a family, or of another one that `own` makes small."""
    # The second of Gemma 3n and 4.
    sizes = {"vocab_size": vocab_size, "vocab_size_per_layer_input": vocab_size}
    options, _ = FAMILIES.get(model_type, ({}, PACKED))
    return AutoConfig.for_model(model_type, **{**COMMON, **options, **sizes, **own})


def tiny_causal_lm(config: Any) -> Any:
    """A model in float32 whose random weights are large enough for every path to matter."""
    torch.manual_seed(1)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in causal_lm.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.1)
    for name, buffer in causal_lm.named_buffers():
        if name.endswith("e_score_correction_bias"):  # balances the experts, without a gradient
            buffer.normal_(std=0.3)
    return causal_lm.eval()


def tiny_family(model_type: str, vocab_size: int = VOCABULARY) -> Any:
    return tiny_causal_lm(tiny_config(model_type, vocab_size))


def with_rope(config: Any, rope_type: str, limit: int) -> Any:
    """`config` with another kind of RoPE, trained on sequences of `limit` tokens and stretched beyond."""

    def changed(default: dict[str, Any]) -> dict[str, Any]:
        rotated = int(head_dim * default.get("partial_rotary_factor", 1.0)) // 2
        own: dict[str, dict[str, Any]] = {
            "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "longrope": {
                "short_factor": [1.0 + 0.1 * place for place in range(rotated)],
                "long_factor": [3.0 + place for place in range(rotated)],
            },
        }
        length = {} if rope_type in ("linear", "dynamic") else {"original_max_position_embeddings": limit}
        return default | {"rope_type": rope_type, "factor": 4.0} | length | own.get(rope_type, {})

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = config.rope_parameters
    nested = {name: changed(value) for name, value in parameters.items() if isinstance(value, dict)}
    config.rope_parameters = nested or changed(parameters)
    config.max_position_embeddings = limit if rope_type == "dynamic" else 64
    if rope_type == "longrope":
        config.original_max_position_embeddings = limit
    return config
