"""Arguments of TRL's trainers in Python: `DPOConfig`, `KTOConfig`, adapters, as the keys of a file of TRL."""

import json
import math
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from transformers import TrainingArguments

from dpo_dist.config.rules import best_direction
from dpo_dist.config.schema import Direction
from dpo_dist.foundation.errors import ConfigError

_ALWAYS = ("gradient_checkpointing", "loss_type", "seed")
"""Arguments that are keys also with their default, because ours is another."""
_NO_KEYS = (
    *("output_dir", "resume_from_checkpoint", "hub_token", "words", "distributed_state"),
    *("logging_steps", "eval_steps", "save_steps"),  # those of `intervals`
)
_NO_ADAPTER_KEYS = (
    *("task_type", "base_model_name_or_path", "inference_mode", "revision", "peft_version"),
    *("r", "lora_dropout"),  # TRL switches dropout off with that of the model
)


# Arguments that TRL reads only if another one has this value.
_ONLY_WITH = {
    "ref_model_mixup_alpha": ("sync_ref_model", True),
    "ref_model_sync_steps": ("sync_ref_model", True),
    "f_alpha_divergence_coef": ("f_divergence_type", "alpha_divergence"),
}


@dataclass
class TrainerArguments(TrainingArguments):  # type: ignore[misc]
    """Arguments of both trainers that transformers does not have, or that have another default."""

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    disable_dropout: bool = True
    dataset_num_proc: int | None = None
    max_length: int | None = 1024
    pad_to_multiple_of: int | str | None = "auto"
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    beta: float = 0.1
    activation_offloading: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    words: list[str] = field(default_factory=list)
    """Words of `dpo-dist train`, which win over the translation: `["data.truncation=drop"]`."""

    def __post_init__(self) -> None:
        """Know this process by its environment: transformers would join the processes here."""
        names = {"process_index": "RANK", "local_process_index": "LOCAL_RANK", "num_processes": "WORLD_SIZE"}
        places = {name: int(os.environ.get(key, key == "WORLD_SIZE")) for name, key in names.items()}
        is_main, is_local = not places["process_index"], not places["local_process_index"]
        places |= {"is_main_process": is_main, "is_local_main_process": is_local}
        self.distributed_state: Any = SimpleNamespace(**places)
        for name, value in vars(self).items():
            if isinstance(value, np.generic | np.ndarray):
                setattr(self, name, value.tolist())

    def keys(self) -> dict[str, Any]:
        """Return what is not at its default, and `_ALWAYS`, as keys of a file."""
        usual = vars(type(self)())
        keys = {
            name: json.loads(value) if str(value).startswith('{"') else getattr(value, "value", value)
            for name, value in vars(self).items()
            if name not in _NO_KEYS and (name in _ALWAYS or value != usual.get(name, value))
        }
        if not torch.cuda.is_available():
            keys.pop("use_cpu", None)
        for name, (other, value) in _ONLY_WITH.items():
            if getattr(self, other, None) != value:
                keys.pop(name, None)
        options = keys.get("model_init_kwargs", {})
        options = {name: value for name, value in options.items() if value not in (None, False, "main")}
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or "float32"
        if str(dtype).removeprefix("torch.") == "float16" and not self.fp16 and self.bf16 is not False:
            remedy = "set fp16=True, or dtype='bfloat16': here weights are computed in one type"
            raise refused("model_init_kwargs.dtype", "float16 beside bf16", remedy)
        if self.bf16 is False and not self.fp16 and str(dtype).removeprefix("torch.") != "float32":
            del keys["bf16"]
            options["dtype"] = str(dtype)
        elif self.bf16 is None:  # weights of any dtype are computed in it
            keys["bf16"] = not self.fp16
        return keys | {"model_init_kwargs": options, "num_processes": self.world_size}

    def intervals(self, records: int) -> dict[str, Any]:
        """Return the keys of the intervals in steps, also of one by epoch, or of a share of the run."""
        pairs = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        epoch, keys = math.ceil(records / pairs), dict[str, Any]()
        steps = self.max_steps if self.max_steps > 0 else math.ceil(epoch * self.num_train_epochs)
        for name in ("logging", "eval", "save"):
            strategy, every = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            every = self.logging_steps if every is None else every
            every = epoch if strategy == "epoch" else math.ceil(every if every >= 1 else every * steps)
            if strategy in ("epoch", "steps"):
                keys |= {f"{name}_strategy": "steps", f"{name}_steps": every}
        return keys

    def faults(self, records: int, *, has_evaluation: bool) -> list[ConfigError]:
        """Return errors for arguments that have an effect on these data in TRL, and another one here."""
        found = list[ConfigError]()
        steps = self.intervals(records)
        if self.eval_strategy != "no" and not has_evaluation:
            found.append(refused("eval_strategy", str(self.eval_strategy), "pass an eval_dataset"))
        if self.load_best_model_at_end and self.eval_strategy == "no":
            found.append(
                refused("load_best_model_at_end", "True", "set eval_strategy: the best one is evaluated")
            )
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        is_greater = not metric.endswith("loss") if self.greater_is_better is None else self.greater_is_better
        ours = best_direction(f"eval_{metric}")
        names_best = self.load_best_model_at_end or self.metric_for_best_model
        if names_best and ours is not None and is_greater != (ours is Direction.highest):
            remedy = f"set it to {not is_greater}: here the {ours} value of {metric} is the best"
            found.append(refused("greater_is_better", str(is_greater), remedy))
        if self.dataloader_drop_last and records % (self.per_device_train_batch_size * self.world_size):
            remedy = "leave it out: here the last step of an epoch has the pairs that are left"
            found.append(refused("dataloader_drop_last", "True", remedy))
        if self.logging_first_step and steps.get("logging_steps", 1) > 1:
            remedy = f"set logging_steps=1: here each {steps['logging_steps']}th step has a row"
            found.append(refused("logging_first_step", "True", remedy))
        return found


@dataclass
class DPOConfig(TrainerArguments):
    """Arguments of TRL's `DPOConfig`, with their defaults."""

    truncation_mode: str = "keep_start"
    padding_free: bool = False
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    label_smoothing: float = 0.0
    use_weighting: bool = False
    discopop_tau: float = 0.05
    pad_token: str | None = None


@dataclass
class KTOConfig(TrainerArguments):
    """Arguments of TRL's `KTOConfig`, with their defaults."""

    train_sampling_strategy: str = "sequential"
    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


class ScriptError(ConfigError, ValueError):
    """A script of TRL cannot run here; a `ValueError` as there."""


def refused(key: str, got: str, remedy: str) -> ConfigError:
    """Return the error for an argument of TRL that has an effect there, and none here."""
    return ScriptError("this argument of TRL is not offered", where=key, got=got, remedy=remedy)


def adapter_keys(peft_config: Any, model_type: str) -> dict[str, Any]:
    """Return the options of a new LoRA adapter as keys of a file."""
    if peft_config.peft_type != "LORA":
        raise refused("peft_config", str(peft_config.peft_type), "pass a LoraConfig")
    usual = type(peft_config)().to_dict()
    given = {name: value for name, value in peft_config.to_dict().items() if value != usual[name]}
    targets = given.pop("target_modules", None) or USUAL_TARGETS.get(model_type)
    targets = targets if isinstance(targets, str) else sorted(targets or ())
    names = {"bias": "lora_bias", "modules_to_save": "lora_modules_to_save"}
    keys = {names.get(name, name): value for name, value in given.items() if name not in _NO_ADAPTER_KEYS}
    keys |= {"use_peft": True, "lora_r": peft_config.r, "lora_alpha": peft_config.lora_alpha}
    return keys | {"lora_target_modules": targets}
