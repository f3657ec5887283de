"""Llama 4's temperature of queries by position, where transformers takes a token's index for its position.

In layers without RoPE a query at position p is multiplied by 1 + attn_scale * log(1 + floor((p + 1) /
floor_scale)) (arXiv 2501.19399). In a packed sequence the index of a token is not its position.
"""

from typing import Any

import torch
from torch import Tensor


def corrected_query(module: Any, query: Tensor, positions: Tensor) -> Tensor:
    """Return the queries [tokens, heads, dim] with the temperature of their positions instead of indices."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    indices = torch.arange(len(query), device=query.device)
    ratios = _factors(module, positions) / _factors(module, indices)  # 1, exactly, below floor_scale
    return (query * ratios[:, None, None]).to(query.dtype)


def _factors(module: Any, positions: Tensor) -> Tensor:
    scale: float = module.attn_scale
    return torch.log1p(torch.floor((positions.float() + 1) / module.floor_scale)) * scale + 1
