"""An adapter of another model, or a folder without one, is a user's error."""

from pathlib import Path

import pytest
import torch

from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter, load_adapter
from tests.support.tiny_model import write_model

CPU = torch.device("cpu")


def test_a_written_adapter_is_read_whole_or_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = ModelConfig(path=str(folder), dtype=Dtype.fp32, adapter=AdapterConfig(r=2))
    trained = load_packed(folder, config, 64, CPU)
    add_adapter(trained, config, seed=0)
    weights = {name: weight for name, weight in trained.causal_lm.named_parameters() if "lora_" in name}
    for weight in weights.values():
        torch.nn.init.normal_(weight)
    trained.causal_lm.save_pretrained(tmp_path / "adapter")
    loaded = load_packed(folder, config, 64, CPU)
    load_adapter(loaded, tmp_path / "adapter")
    found = dict(loaded.causal_lm.named_parameters())
    assert weights
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    with pytest.raises(ConfigError, match="the adapter cannot be added"):
        load_adapter(load_packed(folder, config, 64, CPU), tmp_path)
