"""Unread weights are refused under ZeRO-3 too, where rank 0 reads the files."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.load import load_packed
from tests.support.families import tiny_config
from tests.support.ranks import run_ranks

FOREIGN = "v_head.weight"
# One of each way to map names in files to names of weights: the same, with a prefix, experts merged.
KINDS = ("gpt2", "gpt_neox", "mixtral", "olmoe", "opt", "qwen2", "qwen2_moe", "qwen3_moe")


def write(folder: Path, model_type: str) -> Path:
    """Write a tiny model with a tensor of no layer, and one with a module that the architecture lacks."""
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(folder / "whole")
    weights = load_file(folder / "whole" / "model.safetensors") | {FOREIGN: torch.ones(4)}
    save_file(weights, folder / "whole" / "model.safetensors", metadata={"format": "pt"})
    projection = next(name for name in sorted(weights) if "att" in name and weights[name].dim() == 2)
    weights[f"{projection.rpartition('.')[0]}.unheard_of"] = torch.ones(4)
    (folder / "more").mkdir()
    (folder / "more" / "config.json").write_bytes((folder / "whole" / "config.json").read_bytes())
    save_file(weights, folder / "more" / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusals(folders: dict[str, Path], world: World, _folder: Path) -> dict[str, list[str]]:
    return {
        name: [refused(folder / kind, world) for kind in ("whole", "more")]
        for name, folder in folders.items()
    }


def refused(folder: Path, world: World) -> str:
    try:
        load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 16, world.device)
    except ConfigError as error:
        return error.block()
    return ""


def test_weights_that_no_layer_reads_are_refused_under_zero3(tmp_path: Path) -> None:
    folders = {name: write(tmp_path / name, name) for name in KINDS}
    for of_rank in run_ranks(partial(refusals, folders), 2, tmp_path / "ranks"):
        for name, (whole, more) in of_rank.items():
            assert whole == "", name
            assert "does not read" in more, name
            assert "unheard_of" in more
            assert FOREIGN not in more
