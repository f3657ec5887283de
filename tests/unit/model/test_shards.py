"""Weights in files of bounded size, as transformers and other loaders find them by the index."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_dist.model.save import Shards, copy_description, tensors_of
from tests.support.tiny_model import write_model

LIMIT = 30_000


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_files_stay_within_the_limit_and_the_index_names_every_weight(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_dist.model.save._SHARD_BYTES", LIMIT)
    base, folder = write_model(tmp_path / "base"), tmp_path / "out"
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"torch_dtype": "float32"}))
    folder.mkdir()
    weights, shards = dict(tensors_of(base)), Shards(folder)
    for name, weight in weights.items():
        shards.add(name, weight.to(dtype or weight.dtype))
    shards.close()
    copy_description(base, folder, dtype, {})

    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    count, total = len(files), 0
    assert count > 2
    assert set(files) == {f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    for content in files.values():
        size = sum(weight.nbytes for weight in content.values())
        assert size <= LIMIT or len(content) == 1
        total += size
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, content in files.items() for name in content}
    assert index["metadata"] == {"total_size": total}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert {weight.dtype for weight in loaded.values()} == {dtype or torch.float32}
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight.to(dtype or weight.dtype))
