"""What `accelerate launch` means for a script of TRL."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.trl.launcher import launcher_keys

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
STAGE, DEVICE = "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_OFFLOAD_{}_DEVICE"
BOTH = {DEVICE.format("OPTIMIZER"): "cpu", DEVICE.format("PARAM"): "cpu"}
OFFLOAD = {"parallelism.offload_optimizer": "cpu", "parallelism.offload_parameters": "cpu"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environ", "keys"),
    [
        ({}, {}),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_USE_DEEPSPEED": "false"}, {}),
        (DEEPSPEED, {"parallelism.kind": "zero2"}),
        (DEEPSPEED | {STAGE: "1"} | BOTH, {"parallelism.kind": "ddp"}),
        (
            DEEPSPEED | {STAGE: "2"} | BOTH,
            {"parallelism.kind": "zero2", "parallelism.offload_optimizer": "cpu"},
        ),
        (DEEPSPEED | {STAGE: "3"}, {"parallelism.kind": "zero3"}),
        (DEEPSPEED | {STAGE: "3"} | BOTH, {"parallelism.kind": "zero3", **OFFLOAD}),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "false"}, {"parallelism.kind": "zero3"}),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "True"}, {"parallelism.kind": "zero3", **OFFLOAD}),
    ],
)
def test_a_launcher_shards_as_its_file_says(environ: dict[str, str], keys: dict[str, Any]) -> None:
    found, said = launcher_keys(environ, is_quantized=False, is_half=True)
    assert found == keys
    assert ["FSDP" in line for line in said] == [True] * ("ACCELERATE_USE_FSDP" in environ)


def test_a_file_of_deepspeed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "zero3.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    environ = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    keys, _ = launcher_keys(environ, is_quantized=False, is_half=True)
    assert keys == {"parallelism.kind": "zero3", "parallelism.offload_optimizer": "cpu"}
    for without_a_stage in ("{}", '{"zero_optimization": {}}'):
        file.write_text(without_a_stage)
        keys, _ = launcher_keys(environ, is_quantized=False, is_half=True)
        assert keys == {"parallelism.kind": "ddp"}


def test_what_is_another_way_is_said() -> None:
    keys, said = launcher_keys(DEEPSPEED | {STAGE: "3"}, is_quantized=True, is_half=True)
    assert keys == {}
    assert "a quantized base is not sharded" in said[0]
    half = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert launcher_keys(half, is_quantized=False, is_half=True)[1] == []
    assert "mixed_precision bf16 is not used" in launcher_keys(half, is_quantized=False, is_half=False)[1][0]


@pytest.mark.parametrize(("kind", "ranks"), [("CP", "2"), ("SP", "4"), ("TP", "8")])
def test_groups_of_processes_are_refused(kind: str, ranks: str) -> None:
    with pytest.raises(ConfigError) as raised:
        launcher_keys({f"PARALLELISM_CONFIG_{kind}_SIZE": ranks}, is_quantized=False, is_half=True)
    assert f"{kind.lower()}_size: {ranks}" in str(raised.value.got)


def test_nvme_is_refused_by_name() -> None:
    environ = DEEPSPEED | {STAGE: "3", DEVICE.format("PARAM"): "nvme"}
    with pytest.raises(ConfigError) as raised:
        launcher_keys(environ, is_quantized=False, is_half=True)
    assert "offload_parameters" in raised.value.where
