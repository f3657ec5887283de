"""An adapter as supervised fine-tuning leaves it: made and saved by peft alone."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def write_sft_adapter(
    base: Path, folder: Path, *, seed: int = 3, scale: float = 0.05, **options: Any
) -> Path:
    """A LoRA adapter of the model in `base` whose update is visible in log-probs."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **chosen))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=scale)
            elif ".lora_magnitude_vector." in name:
                weight.mul_(1.1)
            elif ".modules_to_save." in name:
                weight.add_(scale * torch.randn_like(weight))
    adapted.save_pretrained(folder)
    return folder
