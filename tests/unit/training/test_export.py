"""The verb `export`: models of all forms, from the files that training started from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    ExportConfig,
    FolderConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
)
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.report.card import run_card
from dpo_dist.training.export import export_checkpoint, export_model
from tests.support import tiny
from tests.support.families import COMMON, LOW_RANK, ROUTED
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model
from tests.unit.distributed.test_checkpoint_export import checkpoint_of, weights_of

pytestmark = pytest.mark.slow


def test_a_changed_adapter_is_refused_where_it_becomes_part_of_the_result(tmp_path: Path) -> None:
    """Of a run that continued an adapter."""
    base, run = write_model(tmp_path / "base"), tmp_path / "run"
    sft = write_sft_adapter(base, tmp_path / "sft")
    config = RunConfig(
        model=ModelConfig(path=str(base), dtype=Dtype.fp32, adapter=AdapterConfig(path=str(sft))),
        reference=ReferenceConfig(store=str(tmp_path / "store")),
        run=FolderConfig(dir=str(run)),
        export=ExportConfig(merge=True),
    )
    (run / "checkpoints").mkdir(parents=True)
    (run / "environment.json").write_text('{"packages": {}}')
    checkpoint = checkpoint_of(weights_of(config, sft), run / "checkpoints" / "step-000001", config, sft)
    write_sft_adapter(base, sft, seed=4)
    with pytest.raises(ConfigError, match="started from has changed") as refused:
        export_model(config, checkpoint, tmp_path / "out", Console(None), run_card)
    assert "model.adapter.path" in refused.value.where
    assert not (tmp_path / "out").exists()


# Buffers of the routers (deepseek_v3), weights that are never trained (ernie4_5_moe).
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": LOW_RANK | ROUTED | {"first_k_dense_replace": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_other_forms_have_their_trained_and_their_other_tensors(
    family: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "model")
    fields = COMMON | FAMILIES[family] | {"vocab_size": len(tiny.qwen())}
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in causal_lm.state_dict().items():
            if "correction_bias" in name:
                tensor.copy_(torch.linspace(-2, 2, tensor.numel()).view_as(tensor))
    causal_lm.save_pretrained(base)
    model = ModelConfig(path=str(base), dtype=Dtype.fp32)
    reference = ReferenceConfig(store=f"{tmp_path}/store")
    config = RunConfig(model=model, reference=reference)
    weights = weights_of(config)
    checkpoint = checkpoint_of(weights, tmp_path / "step-000001", config)
    export_checkpoint(checkpoint, tmp_path / "out", config)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in [*causal_lm.named_parameters(), *causal_lm.named_buffers()]:
        if name not in found:  # a buffer that no file has
            continue
        assert torch.equal(found[name], weights.get(name, tensor))
    changed = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="the model that this run started from has changed"):
        export_checkpoint(checkpoint, tmp_path / "again", config)


def test_moves_below_a_step_of_bf16_are_in_the_written_model_in_the_mean(tmp_path: Path) -> None:
    base = write_model(tmp_path / "model")
    model = ModelConfig(path=str(base), dtype=Dtype.bf16)
    config = RunConfig(model=model, reference=ReferenceConfig(store=f"{tmp_path}/store"))
    start = {name: weight.bfloat16().float() for name, weight in weights_of(config).items()}
    moved = {name: weight * (1 + 2.0**-11) for name, weight in start.items()}
    checkpoint = checkpoint_of(moved, tmp_path / "step-000001", config)
    for out in ("one", "two"):
        export_checkpoint(checkpoint, tmp_path / out, config)
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    shares = []
    for name, weight in one.items():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(weight, two[name]), "the same model from the same checkpoint"
        way = moved[name] - start[name]
        if way.any():  # not of biases, which are 0
            shares.append((weight.float() - start[name]).abs().sum() / way.abs().sum())
    assert float(torch.stack(shares).mean()) == pytest.approx(1, abs=0.1)
