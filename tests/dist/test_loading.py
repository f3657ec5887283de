"""Weights under ZeRO-3, of which rank 0 reads the files: loaded as shards, and none that no layer reads."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Dtype, ModelConfig, Offload
from dpo_dist.distributed.deepspeed_config import frozen_config, sharded_loading
from dpo_dist.distributed.processes.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.load import load_packed
from tests.dist.scenario import Assets
from tests.support.families import tiny_config
from tests.support.ranks import run_ranks

FOREIGN = "v_head.weight"
# One of each way to map names in files to names of weights: the same, with a prefix, experts merged.
KINDS = ("qwen2", "gpt2", "qwen3_moe")


def write(folder: Path, model_type: str) -> None:
    """Write a tiny model with a tensor of no layer, and one of a module that the architecture lacks."""
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | {FOREIGN: torch.ones(4)}
    projection = next(name for name in sorted(weights) if "att" in name and weights[name].dim() == 2)
    weights[f"{projection.rpartition('.')[0]}.unheard_of"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_all(assets: Assets, models: Path, world: World, _folder: Path) -> dict[str, Any]:
    """Whether the reference, and a policy after it, are shards; and the errors of other models."""
    config = ModelConfig(dtype=Dtype.fp32)
    with sharded_loading(world, frozen_config(Offload.none, Dtype.fp32)):
        reference = load_packed(assets.reference, config, 1024, world.device)
    policy = load_packed(assets.policy, config, 1024, world.device)
    sharded = [all(hasattr(w, "ds_tensor") for w in model.parameters()) for model in (reference, policy)]
    errors = []
    for model_type in KINDS:
        with pytest.raises(ConfigError, match="does not read") as caught:
            load_packed(models / model_type, config, 16, world.device)
        errors.append(caught.value.got)
    return {"sharded": sharded, "errors": errors}


def test_models_are_loaded_as_shards_and_weights_that_no_layer_reads_are_refused(
    assets: Assets, tmp_path: Path
) -> None:
    for model_type in KINDS:
        write(tmp_path / "models" / model_type, model_type)
    for of_rank in run_ranks(partial(load_all, assets, tmp_path / "models"), 2, tmp_path / "ranks"):
        assert of_rank["sharded"] == [True, True]
        for error in of_rank["errors"]:
            assert "unheard_of (1 in all)" in error
            assert FOREIGN not in error
