"""How `accelerate launch` shards a script of TRL, as keys of `train`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import KIND_OF_STAGE, Dtype, Offload
from dpo_dist.foundation.errors import ConfigError, raise_all
from dpo_dist.foundation.process import is_on
from dpo_dist.foundation.types import leaves
from dpo_dist.tools.convert.arguments import ScriptError, TrainerArguments

_HALF = (Dtype.bf16, Dtype.fp16)
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused")
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# Parts of a file of DeepSpeed without an effect on what is learnt: here the run decides them.
_UNREAD = {
    *("activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "communication_data_type"),
    *("csv_monitor", "data_types", "dump_state", "flops_profiler", "fp16", "memory_breakdown", "scheduler"),
    *("seq_parallel_communication_data_type", "steps_per_print", "tensorboard", "wall_clock_breakdown"),
    *("wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"),
    "optimizer.params.torch_adam",
}
_OTHER_ZERO = {"cpu_offload": "write offload_optimizer", "cpu_offload_params": "write offload_param"}
_OTHER_ZERO |= dict.fromkeys(
    ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"),
    "remove it: here weights and gradients are not quantized to be sent",
)
_LAUNCHER = "accelerate launch"


def launcher_keys(
    environ: Mapping[str, str], args: TrainerArguments, *, is_quantized: bool, is_half: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of `parallelism` that the launcher's file means, and what is another way here.

    `is_half`: whether the script's arguments compute in 16 bits, which here they decide alone. Raise if
    DeepSpeed's part of the file trains in another way than the arguments.
    """
    keys, said = dict[str, Any](), list[str]()
    for kind in ("TP", "CP", "SP"):
        if (ranks := environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) != "1":
            raise ConfigError(
                "groups of processes of the launcher are not offered",
                where="accelerate launch",
                got=f"parallelism_config_{kind.lower()}_size: {ranks}",
                remedy="remove parallelism_config from its file; so that processes share long sequences, "
                f"write DPOConfig(words=['parallelism.sequence_parallel={ranks}'])",
            )
    if args.deepspeed or is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        where, config = _deepspeed(environ, args.deepspeed)
        raise_all([*_faults(where, config, args)])
        if config.get("gradient_clipping") is None and args.max_grad_norm:
            said.append(f"{where}: gradients are clipped by max_grad_norm; DeepSpeed needs gradient_clipping")
        zero = config.get("zero_optimization") or {}
        if (given := str(zero.get("stage") or 0)) not in ("0", "1", "2", "3"):
            raise _other(f"{where}: zero_optimization.stage", given, "write 2 or 3")
        stage = int(given)
        optimizer, weights = (
            (zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("optimizer", "param")
        )
        keys["parallelism.kind"] = KIND_OF_STAGE[stage].value
        keys |= _offload(where, "optimizer", optimizer if stage > 1 else "none")
        keys |= _offload(where, "parameters", weights if stage > 2 else "none")
    elif is_on(environ, "ACCELERATE_USE_FSDP"):
        device = "cpu" if is_on(environ, "FSDP_OFFLOAD_PARAMS") else "none"
        keys = {
            "parallelism.kind": "zero3",
            **_offload(_LAUNCHER, "optimizer", device),
            **_offload(_LAUNCHER, "parameters", device),
        }
        said.append("accelerate launch: weights are sharded by ZeRO-3 (parallelism=zero3) in place of FSDP")
    if keys and is_quantized:
        keys, said = {}, ["accelerate launch: a quantized base is not sharded (parallelism=ddp)"]
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in _HALF and not is_half:
        said.append(
            f"accelerate launch: mixed_precision {precision} is not used: the arguments say bf16=False"
        )
    return keys, said


def _deepspeed(environ: Mapping[str, str], given: Any) -> tuple[str, dict[str, Any]]:
    """Return DeepSpeed's configuration with its name: of the arguments, else of the launcher, as accelerate.

    `given`: the argument `deepspeed`: a mapping or a file.
    """
    if isinstance(given, Mapping):
        return "deepspeed", dict(given)
    prefix = "ACCELERATE_DEEPSPEED"
    if (file := given or environ.get(f"{prefix}_CONFIG_FILE", "none")) != "none":
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            remedy = "name a file in JSON, without comments"
            raise ScriptError(
                "DeepSpeed's file cannot be read", where=file, got=str(error), remedy=remedy
            ) from error
        if not isinstance(config, dict):
            raise ScriptError("DeepSpeed's file has no keys", where=file, remedy="write an object: {...}")
        return str(file), config
    zero: dict[str, Any] = {"stage": environ.get(f"{prefix}_ZERO_STAGE", "2")}
    for part in ("optimizer", "param"):
        device = environ.get(f"{prefix}_OFFLOAD_{part.upper()}_DEVICE", "none")
        zero[f"offload_{part}"] = {"device": device}
    numbers = {
        key: environ.get(f"ACCELERATE_{key.upper()}", "auto")
        for key in ("gradient_accumulation_steps", "gradient_clipping")
    }
    given = {key: value if value == "auto" else float(value) for key, value in numbers.items()}
    return _LAUNCHER, {"zero_optimization": zero, **given}


def _faults(where: str, config: Mapping[str, Any], args: TrainerArguments) -> Iterator[ConfigError]:
    """Yield errors for keys of DeepSpeed that train in another way than the arguments, or than a run here.

    transformers refuses values that differ from its arguments, too; an optimizer or a schedule of the file
    it uses in place of theirs.
    """
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    same = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", args.per_device_train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", args.gradient_accumulation_steps),
        "train_batch_size": ("per_device_train_batch_size", pairs),
        "gradient_clipping": ("max_grad_norm", args.max_grad_norm),
        "bf16.enabled": ("bf16", not args.fp16 if args.bf16 is None else args.bf16),
        "fp16.enabled": ("fp16", args.fp16),
        "optimizer.type": ("optim", "AdamW" if args.optim in _ADAMW else str(args.optim)),
        "optimizer.params.lr": ("learning_rate", args.learning_rate),
        "optimizer.params.betas": ("adam_beta1 and adam_beta2", [args.adam_beta1, args.adam_beta2]),
        "optimizer.params.eps": ("adam_epsilon", args.adam_epsilon),
        "optimizer.params.weight_decay": ("weight_decay", args.weight_decay),
        "optimizer.params.adam_w_mode": ("optim", True),
    }
    for key, value in leaves(config):
        top, name = key.split(".")[0], key.rpartition(".")[2]
        if key in same:
            argument, wanted = same[key]
            if value not in ("auto", None, wanted) and (key, value) != ("optimizer.type", "adamw"):
                remedy = f'write {json.dumps(wanted)} or "auto" there, or set {argument} in the script'
                yield _other(f"{where}: {key}", value, remedy)
        elif key == "scheduler.type":
            schedule = _SCHEDULES.get(value, "linear")
            remedy = f"remove scheduler there; in the script set lr_scheduler_type={schedule!r}, warmup_steps"
            yield _other(f"{where}: {key}", value, remedy)
        elif name in _OTHER_ZERO and value:
            yield _other(f"{where}: {key}", value, _OTHER_ZERO[name])
        elif value and not _UNREAD & {key, top}:
            yield _other(f"{where}: {key}", value, "remove it: a run here does not read it")


def _other(where: str, value: Any, remedy: str) -> ConfigError:
    message = "this trains in another way than the script's arguments"
    return ScriptError(message, where=where, got=json.dumps(value), remedy=remedy)


def _offload(where: str, what: str, device: str) -> dict[str, str]:
    key = f"parallelism.offload_{what}"
    if device not in set(Offload):
        remedy = "write cpu or none there"
        message = "a run here can offload to the memory of the CPU only"
        raise ConfigError(message, where=f"{where}: {key}", got=device, remedy=remedy)
    return {} if device == Offload.none else {key: device}
