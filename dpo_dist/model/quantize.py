"""Weights in 8 or 4 bits under an adapter (QLoRA, arXiv:2305.14314), by the optional bitsandbytes."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from dpo_dist.config.schema import Quantization
from dpo_dist.model.optional_packages import check_bitsandbytes


def quantized_loading(
    quantization: Quantization | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What tells transformers to quantize the linear layers as it loads them; the output layer stays whole.

    Args:
        quantization: null loads them as they are.
        dtype: in which products with them are computed.
        device: where they are put.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if quantization is None:
        return {}
    check_bitsandbytes(quantization, "model.quantization")
    nf4 = quantization is Quantization.nf4
    config = BitsAndBytesConfig(
        load_in_8bit=not nf4,
        load_in_4bit=nf4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(causal_lm: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for CPUs when they are first scored with: what is packed
    passes no gradients on, and both happen by turns.
    """
    module: Any
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
