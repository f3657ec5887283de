"""Pickled weights are refused wherever a model or an adapter is named."""

import json
from pathlib import Path

import pytest
import torch

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.sampling.respond import find_model
from dpo_dist.model.folder import local_model_folder, model_folder
from dpo_dist.model.load import load_config, load_weights
from tests.support.poison import pickled
from tests.support.tiny_model import write_model

FP32 = ModelConfig(dtype=Dtype.fp32)


def replace_weights(folder: Path, name: str, content: bytes = b"") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"]
)
def test_pickled_weights_are_refused_and_named(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    replace_weights(folder, name, pickled(tmp_path / "trace"))
    for find in (local_model_folder, model_folder):
        with pytest.raises(ConfigError, match="weights are pickled") as raised:
            find(str(folder), None, "reference.path")
        assert raised.value.where == "reference.path"
        assert name in raised.value.got
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("shard", ["p-1.bin", "../outside.safetensors", "/outside.safetensors"])
@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_an_index_names_safetensors_of_its_folder_only(index: str, shard: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    replace_weights(folder, index, json.dumps({"weight_map": {"a": shard}}).encode())
    with pytest.raises(ConfigError, match=r"pickled|outside its folder"):
        model_folder(str(folder), None)


def test_a_named_pickle_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "evil.bin"}))
    (folder / "evil.bin").write_bytes(pickled(tmp_path / "trace"))
    with pytest.raises(ConfigError, match="pickled"):
        model_folder(str(folder), None)


def test_pickles_that_no_model_is_loaded_from_do_not_matter(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickled(tmp_path / "trace"))
    assert model_folder(str(folder), None) == folder
    load_weights(folder, load_config(folder, FP32), FP32, torch.device("cpu"))
    assert not (tmp_path / "trace").exists()


def test_weights_are_read_from_safetensors_even_if_a_folder_was_not_checked(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    replace_weights(folder, "pytorch_model.bin", pickled(tmp_path / "trace"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_weights(folder, load_config(folder, FP32), FP32, torch.device("cpu"))
    assert not (tmp_path / "trace").exists()


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = write_model(tmp_path / "model")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    torch.save({"a": torch.ones(2)}, adapter / "adapter_model.bin")
    config = load_run_config([f"model.path={base}", "data.train=[a.jsonl]"])
    for find in (
        lambda: model_folder(str(adapter), None, accepts_adapter=True),
        lambda: find_model(str(adapter), config),
    ):
        with pytest.raises(ConfigError, match="weights are pickled") as raised:
            find()
        assert "adapter_model.bin" in raised.value.got
