"""Small mixtures of experts."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support import tiny

OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
}
OWN["qwen2_moe"] = {**OWN["qwen3_moe"], "shared_expert_intermediate_size": 16, "mlp_only_layers": []}
OWN["glm4_moe"] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def write_moe(folder: Path, model_type: str) -> Path:
    tokenizer = tiny.qwen()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        router_jitter_noise=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **OWN[model_type],
    )
    torch.manual_seed(1)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in causal_lm.named_buffers():
        if name.endswith("e_score_correction_bias"):  # balances the experts, without a gradient
            buffer.normal_(std=0.3)
    causal_lm.save_pretrained(folder)
    return folder
