"""Arguments of TRL's trainers in Python: `DPOConfig`, `KTOConfig`, adapters, as the keys of a file of TRL."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from transformers import TrainingArguments

from dpo_dist.config.other_trainers import advice_on
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.process import is_on

_ALWAYS = ("gradient_checkpointing", "loss_type", "seed")
"""Arguments that are keys also with their default, because ours is another."""
_NO_KEYS = (
    *("output_dir", "resume_from_checkpoint", "words"),
    # The trainer itself pushes a model.
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    "hub_token",
    *("logging_steps", "eval_steps", "save_steps"),  # those of `intervals`
    "local_rank",  # the launcher says it
    *("activation_checkpointing", "activation_checkpointing_kwargs"),  # other names of gradient_checkpointing
)
_NO_ADAPTER_KEYS = (
    *("task_type", "base_model_name_or_path", "inference_mode", "revision", "peft_version"),
    "ensure_weight_tying",  # as always here: the trainer refuses modules where it would count
    *("r", "lora_dropout"),  # TRL switches dropout off with that of the model
)


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
        """Know this process by its environment, and derive values as transformers, which would join here."""
        names = {"process_index": "RANK", "local_process_index": "LOCAL_RANK", "num_processes": "WORLD_SIZE"}
        places = {name: int(os.environ.get(key, key == "WORLD_SIZE")) for name, key in names.items()}
        is_main, is_local = not places["process_index"], not places["local_process_index"]
        places |= {"is_main_process": is_main, "is_local_main_process": is_local}
        kind = "NO" if places["num_processes"] == 1 else "MULTI_GPU"  # of accelerate's DistributedType
        self.distributed_state: Any = SimpleNamespace(**places, distributed_type=kind)
        for name, value in vars(self).items():
            if isinstance(value, np.generic | np.ndarray):
                setattr(self, name, value.tolist())
        args: Any = self  # transformers has no types for these
        args.output_dir = os.path.expanduser(args.output_dir or "trainer_output")  # noqa: PTH111  (keeps "./")
        args.do_eval = args.do_eval or args.eval_strategy != "no"
        for name in ("checkpointing", "checkpointing_kwargs"):  # the new name wins, as in transformers
            if (given := getattr(args, f"activation_{name}")) is not None:
                setattr(args, f"gradient_{name}", given)
            setattr(args, f"activation_{name}", getattr(args, f"gradient_{name}"))
        if args.eval_strategy == "steps":
            args.eval_steps = args.eval_steps or args.logging_steps
        if args.load_best_model_at_end and args.metric_for_best_model is None:
            args.metric_for_best_model = "loss"
        if args.greater_is_better is None and args.metric_for_best_model is not None:
            args.greater_is_better = not args.metric_for_best_model.endswith("loss")

    @property
    def device(self) -> torch.device:
        """The device of this process; transformers would reset the states of accelerate to name it."""
        return torch.device("cuda", self.local_process_index) if self.n_gpu else torch.device("cpu")

    @property
    def n_gpu(self) -> int:
        """The GPUs of this process: a run uses one."""
        is_cpu = self.use_cpu or is_on(os.environ, "ACCELERATE_USE_CPU")
        return int(torch.cuda.is_available() and not is_cpu)

    def main_process_first(self, local: bool = True, desc: str = "work") -> Any:
        """Run a block on the main process before the others, which the script has joined."""
        if self.world_size > 1 and not torch.distributed.is_initialized():
            remedy = "call accelerate.PartialState() first: here the processes join when a run starts"
            raise refused("args.main_process_first", f"{self.world_size} processes", remedy)
        return super().main_process_first(local, desc)

    def keys(self, weights: torch.dtype | None = None) -> dict[str, Any]:
        """Return what is not at its default, and `_ALWAYS`, as keys of a file.

        `weights`: the type of those of a model in memory.
        """
        # A script may have a class below ours, with defaults and fields of its own.
        ours = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        usual = vars(ours())
        values = {entry.name: getattr(self, entry.name) for entry in fields(ours)}
        keys = {
            name: _plain(value)
            for name, value in values.items()
            if name not in _NO_KEYS and (name in _ALWAYS or value != usual[name])
        }
        if not torch.cuda.is_available():
            keys.pop("use_cpu", None)
        options = keys.get("model_init_kwargs", {})
        options = {name: value for name, value in options.items() if value not in (None, False, "main")}
        named = options.pop("dtype", None) or options.pop("torch_dtype", None)
        dtype = str(weights or named or "float32").removeprefix("torch.")
        if dtype == "float16" and not self.fp16 and self.bf16 is not False:
            remedy = "set fp16=True, or dtype='bfloat16': here weights are computed in one type"
            where = "model.dtype" if weights else "model_init_kwargs.dtype"
            raise refused(where, "float16 beside bf16", remedy)
        if self.bf16 is False and not self.fp16 and dtype != "float32":
            del keys["bf16"]
            options["dtype"] = dtype
        elif self.bf16 is None:  # weights of any dtype are computed in it
            keys["bf16"] = not self.fp16
        return keys | {"model_init_kwargs": options, "num_processes": self.world_size}

    @property
    def counts_records(self) -> bool:
        """Whether an interval, or the end, is an epoch or a share of the run: these depend on the records."""
        kinds = [self.logging_strategy, self.eval_strategy, self.save_strategy]
        every = [self.logging_steps, self.eval_steps or self.logging_steps, self.save_steps]
        shares = (kind == "steps" and steps < 1 for kind, steps in zip(kinds, every, strict=True))
        return "epoch" in kinds or any(shares) or self._ends_within_epoch

    @property
    def _pairs(self) -> int:
        """The pairs of a step."""
        pairs: int = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        return pairs

    @property
    def _ends_within_epoch(self) -> bool:
        return bool(self.max_steps <= 0 and self.num_train_epochs % 1)

    def intervals(self, records: int) -> dict[str, Any]:
        """Return the keys of the intervals in steps, also of one by epoch, or of a share of the run.

        A run that ends within an epoch has a number of steps, too: as in TRL its last one is whole.
        """
        epoch, keys = math.ceil(records / self._pairs), dict[str, Any]()
        steps = self.max_steps if self.max_steps > 0 else math.ceil(epoch * self.num_train_epochs)
        for name in ("logging", "eval", "save"):
            strategy, every = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            every = self.logging_steps if every is None else every
            every = epoch if strategy == "epoch" else math.ceil(every if every >= 1 else every * steps)
            if strategy in ("epoch", "steps"):
                keys |= {f"{name}_strategy": "steps", f"{name}_steps": every}
        return keys | ({"max_steps": steps} if self._ends_within_epoch else {})

    def epochs(self, records: int) -> int:
        """Return the number of epochs that a run begins, as transformers counts them."""
        steps = math.ceil(records / self._pairs)
        epochs: float = self.max_steps / steps if self.max_steps > 0 else self.num_train_epochs
        return math.ceil(epochs)

    def notes(self, records: int) -> list[str]:
        """Return what is another way here, and may surprise."""
        found, pairs = list[str](), self._pairs
        theirs = math.ceil(self.num_train_epochs * math.ceil(records / pairs))
        here = math.ceil(self.num_train_epochs * records / pairs)
        if self.max_steps <= 0 and not self._ends_within_epoch and here != theirs:
            found.append(
                f"num_train_epochs: {here} steps, where TRL has {theirs}: TRL ends each epoch with a smaller "
                "step, and here a step takes pairs of the next epoch, too"
            )
        if self.max_length is not None and getattr(self, "truncation_mode", None) == "keep_end":
            found.append("truncation_mode: of a pair that is too long both responses keep the same prompt")
        if self.include_num_input_tokens_seen != "no":
            found.append("include_num_input_tokens_seen: rows have no such number here")
        if getattr(self, "loss_type", None) == "kto":
            found.append(
                "loss_type: z of kto comes from responses to other prompts, not of the record before"
            )
        return found

    def faults(self, records: int, *, has_evaluation: bool, stops_early: bool) -> list[ConfigError]:
        """Return errors for arguments that have an effect on these data in TRL, and another one here."""
        found = list[ConfigError]()
        if self.eval_strategy != "no" and not has_evaluation:
            found.append(refused("eval_strategy", str(self.eval_strategy), "pass an eval_dataset"))
        if stops_early and self.eval_strategy == "no":
            remedy = "set eval_strategy and metric_for_best_model, or leave it out"
            found.append(refused("callbacks", "EarlyStoppingCallback without evaluations", remedy))
        if self.load_best_model_at_end and self.eval_strategy == "no":
            found.append(
                refused("load_best_model_at_end", "True", "set eval_strategy: the best one is evaluated")
            )
        if self.eval_on_start and self.eval_strategy == "no" and has_evaluation:
            remedy = "set eval_strategy, or call evaluate() before train()"
            found.append(refused("eval_on_start", "True", remedy))
        if self.dataloader_drop_last and records % (self.per_device_train_batch_size * self.world_size):
            remedy = "leave it out: here a step goes on over the end of an epoch, and no pair is left out"
            found.append(refused("dataloader_drop_last", "True", remedy))
        if "checkpoint" in str(_plain(self.hub_strategy)):
            remedy = "leave it out: the model is pushed at the end, and by save_model"
            found.append(refused("hub_strategy", str(self.hub_strategy), remedy))
        config = _plain(self.accelerator_config)
        config = config if isinstance(config, Mapping) else vars(config or SimpleNamespace())
        if config.get("split_batches"):
            remedy = "leave it out, and set per_device_train_batch_size to the pairs of one process"
            found.append(refused("accelerator_config", "split_batches", remedy))
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


# Arguments of TRL's trainers before 0.13 that TRL has no more, and the keys of dpo_dist with their meaning.
_OLDER = {"max_prompt_length": "data.max_prompt_length", "reference_free": "loss.reference_free"}


def _plain(value: Any) -> Any:
    """Return a value as a file has it: the text of a mapping, numbers of numpy, or an enum."""
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    if isinstance(value, set):  # peft's own, in a LoraConfig that it has used
        return sorted(value)
    return getattr(value, "value", value)


def _written(args: TrainingArguments, usual: dict[str, Any]) -> dict[str, Any]:
    """Return the values of arguments of another class that are not `usual` in ours.

    A value that nobody wrote counts where the default of that class is another one, as of the learning rate,
    but not what transformers computes.
    """
    computed = vars(type(args)(output_dir=args.output_dir)) | {"output_dir": None}
    defaults = {entry.name: entry.default for entry in fields(args)}
    values = {key: getattr(args, key) for key in usual if key in defaults}
    return {
        key: getattr(value, "value", value)
        for key, value in values.items()
        if value != usual[key] and (value != computed[key] or defaults[key] != usual[key])
    }


def not_offered(config: type[TrainerArguments], args: Any, others: dict[str, Any]) -> list[ConfigError]:
    """Return errors for arguments that a trainer does not have, `others`, and for those of another class.

    The remedy for a script of an older TRL is the line of arguments to write.
    """
    name = config.__name__
    others = {key: value for key, value in others.items() if value not in (None, (None, None))}
    if type(args).__module__.startswith("trl."):
        return [refused("args", f"{name} of trl", f"write: from dpo_dist.trl import {name}")]
    if not isinstance(args, TrainingArguments | None):  # where `beta` was the third argument
        others["beta"], args = args, None
    names = (entry.name for entry in fields(config) if not entry.name.startswith("activation_checkpointing"))
    usual = {key: getattr(config(), key) for key in names}
    moved = {key: others.pop(key) for key in [*others] if key in usual or key in _OLDER}
    tokenizer, got = others.pop("tokenizer", None), [*moved]
    if isinstance(args, TrainingArguments) and not isinstance(args, TrainerArguments):
        got.append(type(args).__name__)
    given = {} if args is None else _written(args, usual)
    words = [f"{_OLDER[key]}={json.dumps(moved[key])}" for key in _OLDER.keys() & moved.keys()]
    given |= {key: value for key, value in moved.items() if key in usual and value != usual[key]}
    if isinstance(usual["loss_type"], list) and isinstance(given.get("loss_type"), str):
        given["loss_type"] = [given["loss_type"]]
    if words:
        given["words"] = [*given.get("words", ()), *sorted(words)]
    line = ", ".join(f"{key}={given[key]!r}" for key in usual if key in given)
    ways = [f"write args={name}({line})"] if got else []
    if tokenizer is not None:
        got.append("tokenizer")
        ways.append("write processing_class=... in place of tokenizer=...")
    faults = list[ConfigError]()
    if got:
        message = "this script is of an older TRL, whose trainer had arguments that are now elsewhere"
        remedy = "; ".join(ways)
        faults.append(ConfigError(message, where="trainer", got=", ".join(got), remedy=remedy))
    for key, value in others.items():
        advice = next(iter(advice_on(key, str(value))), "dpo_dist has its own")
        remedy = f"remove it: {advice}"
        faults.append(refused(key, type(value).__name__, remedy))
    return faults


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
    given = {name: _plain(value) for name, value in peft_config.to_dict().items() if value != usual[name]}
    usual_targets = () if given.get("target_parameters") else USUAL_TARGETS.get(model_type, ())
    targets = given.pop("target_modules", None) or usual_targets
    targets = targets if isinstance(targets, str) else sorted(targets)
    names = {"bias": "lora_bias", "modules_to_save": "lora_modules_to_save"}
    keys = {names.get(name, name): value for name, value in given.items() if name not in _NO_ADAPTER_KEYS}
    keys |= {"use_peft": True, "lora_r": _plain(peft_config.r), "lora_alpha": _plain(peft_config.lora_alpha)}
    return keys | {"lora_target_modules": targets}
