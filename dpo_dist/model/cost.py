"""What a model's time goes to, from the shape that its config.json gives."""

from typing import Any

from dpo_dist.data.plan import ComputeCosts

# Seconds of a FLOP in attention and in the output layer over those of one in the layers' matrices: 1.37 and
# 0.88 by `scripts/bench_schedule.py --costs` (40M Qwen2 shape, float32, one core of an AMD EPYC), which then
# tell the seconds of 10 micro-batches of very different shapes within 5 %.
_ATTENTION_SLOWNESS = 1.4
_HEAD_SLOWNESS = 0.9

# Their MLP is up and down; that of the others has a gate beside up.
_WITHOUT_GATE = frozenset({"gpt2", "gpt_neox", "opt", "phi", "starcoder2"})


def compute_costs(model_config: Any) -> ComputeCosts:
    """What one token that attends to one key, and one target, cost beside a token in the layers' matrices.

    A parameter of a matrix takes 2 FLOPs a token, a key 4 for each number of the query, in forward and, twice
    that, in backward; the output layer computes its logits once more in backward. It decides how evenly ranks
    are loaded, and no result.

    Args:
        model_config: of transformers, of one of `EXACT_MODEL_TYPES`.
    """
    layers = model_config.num_hidden_layers
    layer = layer_parameters(model_config)
    head = model_config.hidden_size * model_config.vocab_size
    return ComputeCosts(
        key=_ATTENTION_SLOWNESS * 2 * _query_size(model_config) / layer,
        target=_HEAD_SLOWNESS * (4 / 3) * head / (layers * layer),
    )


def layer_parameters(model_config: Any) -> int:
    """Parameters of the matrices that a token goes through in one layer; of experts, the chosen ones."""
    hidden, queries = model_config.hidden_size, _query_size(model_config)
    heads = model_config.num_attention_heads
    key_heads = getattr(model_config, "num_key_value_heads", None) or heads
    attention = 2 * hidden * queries + 2 * hidden * queries * key_heads // heads
    matrices = 2 if model_config.model_type in _WITHOUT_GATE else 3
    return int(attention + matrices * hidden * _mlp_size(model_config))


def _query_size(model_config: Any) -> int:
    heads = model_config.num_attention_heads
    head_size = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    return int(heads * head_size)


def _mlp_size(model_config: Any) -> int:
    """Neurons between up and down that a token meets."""
    sizes = (getattr(model_config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    dense = next((size for size in sizes if size), 4 * model_config.hidden_size)
    experts = getattr(model_config, "num_experts_per_tok", None)
    if not experts:
        return int(dense)
    expert = getattr(model_config, "moe_intermediate_size", None) or dense
    return int(experts * expert + (getattr(model_config, "shared_expert_intermediate_size", None) or 0))
