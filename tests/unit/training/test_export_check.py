"""A written folder is compared with the trained weights: what passes, and what does not."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    AttentionBackend,
    Dtype,
    ModelConfig,
    RunConfig,
)
from dpo_dist.config.verb_options import ExportConfig
from dpo_dist.distributed.export import Exported, export_checkpoint
from dpo_dist.foundation.errors import CheckpointError, ConfigError
from dpo_dist.insight.console import Console
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.training.export import check_exported, export_model, read_pairs
from tests.support import tiny
from tests.support.families import COMMON, LOW_RANK, ROUTED, tiny_family
from tests.support.invented import write_pairs
from tests.support.tiny_model import write_model
from tests.unit.distributed.test_checkpoint_export import checkpoint_of

LORA, DORA = (
    AdapterConfig(r=2, alpha=4, variant=kind) for kind in (AdapterVariant.lora, AdapterVariant.dora)
)
WHOLE = AdapterConfig(r=2, alpha=4, modules_to_save=["embed_tokens", "lm_head", "norm"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_pairs(folder / "pairs.jsonl", 20)
    return write_model(folder / "model")


def run_of(base: Path, folder: Path, adapter: AdapterConfig | None, **export: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(base), dtype=Dtype.bf16, adapter=adapter),
        data=DataConfig(train=[SourceConfig(str(base.parent / "pairs.jsonl"))], cache=str(folder / "cache")),
        export=ExportConfig(**export),
    )


def trained(config: RunConfig, seed: int) -> dict[str, Tensor]:
    """Master weights a little away from the start."""
    plain = replace(config.model, dtype=Dtype.fp32)
    model = load_packed(Path(plain.path), plain, 64, torch.device("cpu"))
    if plain.adapter is not None:
        add_adapter(model, plain, 0)
    torch.manual_seed(seed)
    named = list(model.causal_lm.named_parameters())
    return {
        name: weight.detach() + 0.03 * torch.randn(weight.shape)
        for name, weight in named
        if weight.requires_grad
    }


def checkpoint_in(folder: Path, config: RunConfig) -> Path:
    return checkpoint_of(trained(config, 1), folder / "step-000001")


# Buffers of the routers (deepseek_v3), weights that are never trained (ernie4_5_moe), convolutions, which
# the check at start of a run arranges in rows (lfm2).
OTHER_FAMILIES = {
    "deepseek_v3": LOW_RANK | ROUTED | {"first_k_dense_replace": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_models_of_other_forms_pass(family: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 20)
    base = write_model(tmp_path / "model")
    fields = COMMON | OTHER_FAMILIES[family] | {"vocab_size": len(tiny.qwen()), "initializer_range": 0.2}
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in causal_lm.state_dict().items():
            if "correction_bias" in name:
                tensor.copy_(torch.linspace(-2, 2, tensor.numel()).view_as(tensor))
    causal_lm.save_pretrained(base)
    # Options of a run on GPUs.
    options = {"attention": AttentionBackend.flash_attention_2, "activation_offload": True}
    config = run_of(base, tmp_path, None, dtype="fp32")
    config = replace(config, model=replace(config.model, **options))
    assert not any("correction_bias" in name for name in trained(run_of(base, tmp_path, None), 0))
    checkpoint = checkpoint_in(tmp_path, run_of(base, tmp_path, None))
    said: list[str] = []
    check = partial(check_exported, pairs=read_pairs(config), config=config, say=said.append)
    export_checkpoint(checkpoint, tmp_path / "out", config, check=check)
    assert "checked: " in said[0]


CASES: list[tuple[AdapterConfig | None, dict[str, Any]]] = [
    *((None, {"dtype": dtype}) for dtype in ("fp32", "bf16", None)),
    (LORA, {"dtype": "fp32"}),
    (LORA, {"dtype": "bf16"}),
    (DORA, {"merge": True}),
    (WHOLE, {"dtype": "bf16"}),
    (WHOLE, {"merge": True}),
]


@pytest.mark.parametrize(("adapter", "export"), CASES, ids=str)
def test_a_whole_folder_passes_and_a_changed_one_does_not(
    adapter: AdapterConfig | None, export: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    config = run_of(base, tmp_path, adapter, **export)
    said: list[str] = []

    def check(exported: Exported) -> None:
        check_exported(exported, read_pairs(config), config, said.append)
        (file,) = exported.folder.glob("*model.safetensors")
        weights = load_file(file)
        name = next(name for name in weights if "o_proj" in name and "lora_A" not in name)
        save_file(weights | {name: 1.3 * weights[name]}, file, {"format": "pt"})
        check_exported(exported, read_pairs(config), config, said.append)

    with pytest.raises(CheckpointError, match="computes other log-probs"):
        export_checkpoint(checkpoint_in(tmp_path, config), tmp_path / "out", config, check=check)
    assert len([line for line in said if line.startswith("checked: log-probs of 8 responses")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_an_update_that_is_merged_into_a_base_in_bf16_is_rounded_with_it(
    adapter: AdapterConfig, base: Path, tmp_path: Path
) -> None:
    """Weights of the base do not change by rounding, nor those of the adapter much; their sums do."""
    rounded = tmp_path / "model"
    shutil.copytree(base, rounded)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(rounded)
    shutil.copyfile(base.parent / "pairs.jsonl", tmp_path / "pairs.jsonl")
    config = run_of(rounded, tmp_path, adapter, merge=True)
    weights = {name: weight.bfloat16().float() for name, weight in trained(config, 1).items()}
    said: list[str] = []
    check = partial(check_exported, pairs=read_pairs(config), config=config, say=said.append)
    export_checkpoint(checkpoint_of(weights, tmp_path / "step-000001"), tmp_path / "out", config, check=check)
    assert "checked: " in said[0]


def test_a_model_is_scored_as_training_does_and_without_its_gpu(tmp_path: Path) -> None:
    """Of an architecture that no table has, whose responses cannot share a prompt."""
    write_pairs(tmp_path / "pairs.jsonl", 20)
    tokenizer, base = tiny.qwen(), tmp_path / "model"
    tiny_family("lfm2", len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = run_of(base, tmp_path, None, dtype="fp32")
    of_gpu = {"attention": AttentionBackend.varlen, "activation_offload": True, "liger": True}
    on_gpu = replace(config, model=replace(config.model, gradient_checkpointing="full", **of_gpu))
    said: list[str] = []
    export_checkpoint(
        checkpoint_in(tmp_path, config),
        tmp_path / "out",
        config,
        check=lambda exported: check_exported(exported, read_pairs(config), on_gpu, said.append),
    )
    assert said[0].startswith("checked: log-probs of 8 responses")


def test_pairs_that_cannot_be_read_are_an_error_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = SourceConfig(str(tmp_path / "gone.jsonl"))
    config = run_of(base, tmp_path, LORA)
    config = replace(config, data=replace(config.data, train=[gone]))
    monkeypatch.setattr("dpo_dist.training.export.export_checkpoint", lambda *_: pytest.fail("it has begun"))
    checkpoint = checkpoint_in(tmp_path, config)
    with pytest.raises(ConfigError, match="training pairs or the base of the check cannot be read") as error:
        export_model(config, checkpoint, tmp_path / "out", Console(None))
    assert "export.check=false" in error.value.remedy
    assert "gone.jsonl" in error.value.got
    (file,) = shutil.copytree(base, tmp_path / "base").glob("*.safetensors")
    file.unlink()
    without = run_of(base, tmp_path, LORA)
    without = replace(without, model=replace(without.model, path=str(file.parent)))
    with pytest.raises(ConfigError, match="training pairs or the base of the check cannot be read"):
        export_model(without, checkpoint, tmp_path / "out", Console(None))
    assert not (tmp_path / "out").exists()
