"""One small model, the reference beside it, and the pairs that they score."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.encoded.build import Preparation
from tests.dist.scenario import PAIRS, Assets, entries_of
from tests.support import tiny
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.invented import write_pairs
from tests.support.tiny_model import write_model


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    folder = tmp_path_factory.mktemp("assets")
    pairs = write_pairs(folder / "pairs.jsonl", PAIRS, seed=1, goes_on=True)
    # Widths are multiples of a 4-bit block: else bitsandbytes (0.50) computes linear layers wrongly on CPUs.
    wide = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16, "mlp_only_layers": []}
    mixture = tiny_causal_lm(tiny_config("qwen3_moe", len(tiny.qwen()), **wide))
    mixture.save_pretrained(folder / "mixture")
    tiny.qwen().save_pretrained(folder / "mixture")
    config = DataConfig(cache=str(folder / "encoded"))
    return Assets(
        policy=write_model(folder / "policy", seed=1),
        untied_policy=write_model(folder / "untied", seed=3, tied=False),
        reference=write_model(folder / "reference", seed=2),
        mixture=folder / "mixture",
        wide=write_model(folder / "wide", seed=1, hidden_size=64),
        encoded=Preparation([SourceConfig(str(pairs))], config, tiny.qwen(), "qwen").whole(),
    )


@pytest.fixture(scope="session")
def plain_entries(assets: Assets) -> list[np.ndarray]:
    """Return the reference's log-probs of each response, computed by transformers in this process."""
    model = AutoModelForCausalLM.from_pretrained(assets.reference, dtype=torch.float32)
    return entries_of(model, assets.dataset())
