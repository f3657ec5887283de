"""8-bit or 4-bit weights under an adapter (QLoRA, arXiv:2305.14314), by the optional bitsandbytes."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from dpo_dist.config.schema import Quantization
from dpo_dist.model.optional_packages import check_bitsandbytes


def quantized_loading(
    quantization: Quantization | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that quantize linear layers, except the output layer.

    Args:
        quantization: None returns no arguments.
        dtype: of products with the quantized weights.
        device: of the loaded weights.

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
    """Stop bitsandbytes from repacking 4-bit weights for CPUs at the first scoring.

    Repacked weights pass no gradients, and scoring alternates with training.
    """
    module: Any
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
