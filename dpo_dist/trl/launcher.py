"""How `accelerate launch` shards a script of TRL, as keys of `train`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import Dtype, Offload
from dpo_dist.foundation.errors import ConfigError

_KINDS = {3: "zero3", 2: "zero2"}
_HALF = (Dtype.bf16, Dtype.fp16)


def launcher_keys(
    environ: Mapping[str, str], *, is_quantized: bool, is_half: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of `parallelism` that the launcher's file means, and what is another way here.

    `is_half`: whether the script's arguments compute in 16 bits, which here they decide alone.
    """
    keys, said = dict[str, Any](), list[str]()
    for kind in ("TP", "CP", "SP"):
        if (ranks := environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")) != "1":
            raise ConfigError(
                "groups of processes of the launcher are not offered",
                where="accelerate launch",
                got=f"parallelism_config_{kind.lower()}_size: {ranks}",
                remedy="remove parallelism_config from its file; processes share long sequences by "
                f"words=['parallelism.sequence_parallel={ranks}']",
            )
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        stage, optimizer, weights = _deepspeed(environ)
        keys["parallelism.kind"] = _KINDS.get(stage, "ddp")
        keys |= _offload("optimizer", optimizer if stage > 1 else "none")
        keys |= _offload("parameters", weights if stage > 2 else "none")
    elif _is_on(environ, "ACCELERATE_USE_FSDP"):
        device = "cpu" if _is_on(environ, "FSDP_OFFLOAD_PARAMS") else "none"
        keys = {
            "parallelism.kind": "zero3",
            **_offload("optimizer", device),
            **_offload("parameters", device),
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


def _deepspeed(environ: Mapping[str, str]) -> tuple[int, str, str]:
    """Return ZeRO's stage, and where optimizer states and weights lie."""
    prefix = "ACCELERATE_DEEPSPEED"
    if (file := environ.get(f"{prefix}_CONFIG_FILE", "none")) != "none":
        zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
        devices = (zero.get(f"offload_{part}", {}).get("device", "none") for part in ("optimizer", "param"))
        return int(zero.get("stage", 0)), *devices
    devices = (environ.get(f"{prefix}_OFFLOAD_{part}_DEVICE", "none") for part in ("OPTIMIZER", "PARAM"))
    return int(environ.get(f"{prefix}_ZERO_STAGE", "2")), *devices


def _offload(what: str, device: str) -> dict[str, str]:
    key = f"parallelism.offload_{what}"
    if device not in set(Offload):
        remedy = "set it to cpu or none there"
        raise ConfigError("it cannot lie there", where=f"accelerate launch: {key}", got=device, remedy=remedy)
    return {} if device == Offload.none else {key: device}


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")
