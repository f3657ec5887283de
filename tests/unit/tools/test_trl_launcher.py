"""What `accelerate launch` means for a script of TRL."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.convert.arguments import DPOConfig, ScriptError
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
    found, said = launcher_keys(environ, DPOConfig(), is_quantized=False, is_half=True)
    assert found == keys
    assert [" in place of FSDP" in line for line in said] == [True] * ("ACCELERATE_USE_FSDP" in environ)


def test_a_file_of_deepspeed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "zero3.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    environ = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    keys, said = launcher_keys(environ, DPOConfig(), is_quantized=False, is_half=True)
    assert keys == {"parallelism.kind": "zero3", "parallelism.offload_optimizer": "cpu"}
    assert ["max_grad_norm" in line for line in said] == [True], "DeepSpeed would not clip"
    for without_a_stage in ("{}", '{"zero_optimization": {}}'):
        file.write_text(without_a_stage)
        keys, _ = launcher_keys(environ, DPOConfig(), is_quantized=False, is_half=True)
        assert keys == {"parallelism.kind": "ddp"}


# A file as the manual of transformers has it, without its schedule.
USUAL: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "betas": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "allgather_bucket_size": 2e8},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "steps_per_print": 2000,
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize(
    ("other", "remedy"),
    [
        ({}, None),
        ({"gradient_clipping": 0.5}, "max_grad_norm"),
        ({"bf16": {"enabled": False}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"train_batch_size": 16}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 2}, "set gradient_accumulation_steps"),
        ({"optimizer": {"type": "Lamb"}}, 'write "AdamW"'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "learning_rate"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, "adam_beta1"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "remove it"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}}}, "='linear'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "not quantized"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "not quantized"),
        ({"zero_optimization": {"stage": 3, "cpu_offload_params": True}}, "offload_param"),
        ({"train_micro_batch_size_per_gpu": 2}, "per_device_train_batch_size"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}, "weight_decay"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, "adam_epsilon"),
        ({"compression_training": {"weight_quantization": {"enabled": True}}}, "remove it"),
    ],
)
def test_a_file_of_deepspeed_that_trains_in_another_way_is_refused(
    other: dict[str, Any], remedy: str | None
) -> None:
    args = DPOConfig(deepspeed=USUAL | other)
    if remedy is None:
        assert launcher_keys({}, args, is_quantized=False, is_half=True) == (
            {"parallelism.kind": "zero2"},
            [],
        )
        return
    with pytest.raises(ScriptError) as raised:
        launcher_keys({}, args, is_quantized=False, is_half=True)
    assert raised.value.where.startswith(f"deepspeed: {next(iter(other))}")
    assert remedy in raised.value.remedy


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "gradient_clipping"])
def test_numbers_of_the_launcher_must_be_those_of_the_arguments(name: str) -> None:
    environ = DEEPSPEED | {f"ACCELERATE_{name.upper()}": "4"}
    with pytest.raises(ScriptError, match=name):
        launcher_keys(environ, DPOConfig(), is_quantized=False, is_half=True)
    args = DPOConfig(gradient_accumulation_steps=4, max_grad_norm=4.0)
    assert launcher_keys(environ, args, is_quantized=False, is_half=True)[1] == []


def test_what_is_another_way_is_said() -> None:
    keys, said = launcher_keys(DEEPSPEED | {STAGE: "3"}, DPOConfig(), is_quantized=True, is_half=True)
    assert keys == {}
    assert "a quantized base is not sharded" in said[0]
    half = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert launcher_keys(half, DPOConfig(), is_quantized=False, is_half=True)[1] == []
    assert (
        "mixed_precision bf16 is not used"
        in launcher_keys(half, DPOConfig(), is_quantized=False, is_half=False)[1][0]
    )


@pytest.mark.parametrize(("kind", "ranks"), [("CP", "2"), ("SP", "4"), ("TP", "8")])
def test_groups_of_processes_are_refused(kind: str, ranks: str) -> None:
    with pytest.raises(ConfigError) as raised:
        launcher_keys(
            {f"PARALLELISM_CONFIG_{kind}_SIZE": ranks}, DPOConfig(), is_quantized=False, is_half=True
        )
    assert f"{kind.lower()}_size: {ranks}" in str(raised.value.got)


def test_nvme_is_refused_by_name() -> None:
    environ = DEEPSPEED | {STAGE: "3", DEVICE.format("PARAM"): "nvme"}
    with pytest.raises(ConfigError) as raised:
        launcher_keys(environ, DPOConfig(), is_quantized=False, is_half=True)
    assert "offload_parameters" in raised.value.where
