"""A checkpoint as a model folder: the weights of any world, in the model's precision, whole or not at all."""

import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.atomic import is_temporary
from dpo_dist.config.adapter_schema import AdapterConfig
from dpo_dist.config.schema import Dtype, ModelConfig, RunConfig
from dpo_dist.distributed.checkpoint_export import export_checkpoint
from dpo_dist.distributed.checkpoint_manifest import describe_files, write_manifest
from dpo_dist.distributed.slice_files import SavedSlices, write_slices
from dpo_dist.distributed.slices import ModelSlices, Slice
from dpo_dist.errors import CheckpointError
from dpo_dist.model.adapters import add_adapter
from dpo_dist.model.load import TORCH_DTYPES, load_packed
from tests.support.precision import DTYPES
from tests.support.tiny_model import write_model

RANKS = 3


def weights_of(config: RunConfig) -> dict[str, Tensor]:
    """New float32 master weights of the model that `config` trains."""
    model = load_packed(Path(config.model.path), config.model, 64, torch.device("cpu"))
    if config.model.adapter is not None:
        add_adapter(model, config.model, 0)
    torch.manual_seed(7)
    named = model.causal_lm.named_parameters()
    return {name: torch.randn(weight.shape) for name, weight in named if weight.requires_grad}


def cut(weights: dict[str, Tensor], rank: int) -> Iterator[Slice]:
    for name, weight in weights.items():
        size = -(-weight.numel() // RANKS)
        part = weight.flatten()[rank * size : (rank + 1) * size].clone()
        if part.numel():
            yield Slice(name, tuple(weight.shape), rank * size, {"weight": part, "exp_avg": -part})


def checkpoint_of(weights: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    files = [
        file
        for rank in range(RANKS)
        for file in write_slices(ModelSlices("engine", list(cut(weights, rank))), folder, rank)
    ]
    write_manifest(folder, describe_files(files, folder))
    return folder


def run_of(folder: Path, **model: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(path=str(folder), **model))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = write_model(tmp_path_factory.mktemp("base"), tied=False)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_several_ranks_become_a_model_in_its_precision(
    dtype: Dtype, base: Path, tmp_path: Path
) -> None:
    config = run_of(base, dtype=dtype)
    weights = weights_of(config)
    export_checkpoint(
        checkpoint_of(weights, tmp_path / "step-000001"), tmp_path / "out", config, lambda: "A card"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    wanted = TORCH_DTYPES[dtype]
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight.to(wanted)) for name, weight in weights.items())
    assert model.generation_config.temperature == 0.5
    assert (tmp_path / "out" / "README.md").read_text() == "A card"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == model.config.vocab_size


def test_an_adapter_needs_no_weights_of_its_base(base: Path, tmp_path: Path) -> None:
    config = run_of(base, dtype=Dtype.fp32, adapter=AdapterConfig(r=2, alpha=4))
    weights = weights_of(config)
    checkpoint = checkpoint_of(weights, tmp_path / "step-000001")
    whole = base / "model.safetensors"
    whole.rename(tmp_path / "elsewhere")
    try:
        export_checkpoint(checkpoint, tmp_path / "out", config)
    finally:
        (tmp_path / "elsewhere").rename(whole)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    found = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert not (tmp_path / "out" / "config.json").exists()


def test_one_weight_is_in_memory_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read, alive = run_of(base), SavedSlices.whole, list[Any]()

    def counted(saved: SavedSlices, name: str, part: str = "weight") -> Tensor:
        assert part == "weight"
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = read(saved, name, part)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SavedSlices, "whole", counted)
    export_checkpoint(checkpoint_of(weights_of(config), tmp_path / "step-000001"), tmp_path / "out", config)
    assert len(alive) > 10


def test_a_damaged_or_foreign_checkpoint_writes_nothing(base: Path, tmp_path: Path) -> None:
    config = run_of(base)
    checkpoint = checkpoint_of(weights_of(config), tmp_path / "step-000001")
    other = replace(config, model=replace(config.model, adapter=AdapterConfig(r=2)))
    with pytest.raises(CheckpointError, match="are not those that this configuration trains"):
        export_checkpoint(checkpoint, tmp_path / "out", other)
    (victim, *_) = checkpoint.rglob("*.safetensors")
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        export_checkpoint(checkpoint, tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_a_killed_export_left_is_removed_by_the_next(base: Path, tmp_path: Path) -> None:
    config = run_of(base)
    checkpoint = checkpoint_of(weights_of(config), tmp_path / "step-000001")
    child = os.fork()
    if child == 0:
        export_checkpoint(checkpoint, tmp_path / "out", config, lambda: os._exit(1))  # type: ignore[arg-type, return-value]
    os.waitpid(child, 0)
    assert len([path for path in tmp_path.iterdir() if is_temporary(path)]) == 2
    export_checkpoint(checkpoint, tmp_path / "other", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-000001"]


def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(base)
    checkpoint = checkpoint_of(weights_of(config), tmp_path / "step-000001")

    def full(*_: Any) -> Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_dist.distributed.checkpoint_export._mapped", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_checkpoint(checkpoint, tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
