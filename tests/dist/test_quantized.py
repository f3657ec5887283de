"""Adapters on 8-bit and 4-bit weights; bitsandbytes is an optional extra."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Dtype, ModelConfig, ParallelismKind, Quantization
from dpo_dist.model.load import keep_trainable, quantized_loading
from tests.dist.scenario import Assets
from tests.dist.test_adapters import DORA, LORA, scored_plainly, steps
from tests.support.ranks import run_ranks

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    ("quantization", "adapter"),
    [(Quantization.nf4, LORA), (Quantization.nf4, DORA), (Quantization.int8, LORA)],
)
def test_two_ranks_train_the_same_as_one_on_the_base_that_plain_transformers_quantizes(
    quantization: Quantization, adapter, assets: Assets, tmp_path: Path
) -> None:
    model = ModelConfig(str(assets.policy), dtype=Dtype.fp32, adapter=adapter, quantization=quantization)
    scenario = partial(steps, model, assets)
    (one,) = run_ranks(scenario, 1, tmp_path / "one", ParallelismKind.ddp)
    two = run_ranks(scenario, 2, tmp_path / "two", ParallelismKind.ddp)
    for of_rank in two:
        assert of_rank["norms"] == pytest.approx(one["norms"], rel=2e-4)
        assert of_rank["before"]["policy"] == of_rank["before"]["base"] == of_rank["after"]["base"]
    whole = AutoModelForCausalLM.from_pretrained(assets.policy, dtype=torch.float32)
    base = torch.tensor(one["before"]["base"])
    assert (scored_plainly(whole, assets) - base).abs().max() > 1e-3

    loading = quantized_loading(quantization, torch.float32, torch.device("cpu"))
    quantized = AutoModelForCausalLM.from_pretrained(assets.policy, dtype=torch.float32, **loading)
    keep_trainable(quantized)
    torch.testing.assert_close(scored_plainly(quantized, assets), base, atol=1e-3, rtol=1e-3)
    reloaded = PeftModel.from_pretrained(quantized, tmp_path / "two" / "model")
    seen = torch.tensor(two[0]["after"]["policy"])
    torch.testing.assert_close(scored_plainly(reloaded, assets), seen, atol=1e-3, rtol=1e-3)
