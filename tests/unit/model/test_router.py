"""Losses of routers of packed models equal those of transformers' own forward of the padded batch."""

from typing import Any

import pytest
import torch

from dpo_dist.config.losses import RouterConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import own_coefficient, router_loss
from dpo_dist.objective.router import RouterLoss, routing_sums, selections
from tests.support.families import tiny_causal_lm, tiny_config, tiny_family
from tests.support.multimodal import IMAGE_MODELS, image_model
from tests.support.packing import VOCABULARY, random_pairs
from tests.support.padded import padded_inputs, rows_of
from tests.unit.model.test_architectures import SHAPES

LOSS = RouterLoss(1.0)


@pytest.mark.parametrize("model_type", ["gpt_oss", "phimoe", "qwen3_5_moe", "qwen3_next", "qwen3_vl_moe"])
def test_the_formula_is_that_of_families_with_other_routers(model_type: str) -> None:
    """Their packed forward is the matter of other tests: here the recorded logits are those of the model."""
    reads_images = model_type in IMAGE_MODELS
    causal_lm = image_model(model_type, VOCABULARY) if reads_images else tiny_family(model_type)
    assert own_coefficient(causal_lm)
    input_ids, mask = padded_inputs([(prompt, ids[:-1]) for prompt, ids in rows_of(random_pairs(SHAPES))])
    outputs = causal_lm(input_ids=input_ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    sums = routing_sums(
        outputs.router_logits, mask.flatten().float(), causal_lm.config.get_text_config().num_experts_per_tok
    )
    ours = LOSS.part(sums, selections(sums), int(mask.sum()))
    torch.testing.assert_close(ours, outputs.aux_loss, rtol=1e-5, atol=0)


def test_the_coefficient_is_that_of_the_model_or_of_the_user() -> None:
    causal_lm = tiny_causal_lm(tiny_config("mixtral", router_aux_loss_coef=0.125))
    assert router_loss(RouterConfig(), causal_lm) is None
    assert router_loss(RouterConfig("model"), causal_lm) == RouterLoss(0.125)
    assert router_loss(RouterConfig(2.0), causal_lm) == RouterLoss(2.0)


@pytest.mark.parametrize(
    ("model_type", "own", "router", "named"),
    [
        ("qwen3", {}, RouterConfig(0.1), "no load-balancing loss"),
        ("doge", {"is_moe": True}, RouterConfig(0.1), "no load-balancing loss"),
        ("mixtral", {"router_aux_loss_coef": 0.0}, RouterConfig("model"), "no coefficient"),
    ],
)
def test_a_loss_that_the_model_does_not_define_is_refused(
    model_type: str, own: dict[str, Any], router: RouterConfig, named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        router_loss(router, tiny_causal_lm(tiny_config(model_type, **own)))
    assert raised.value.remedy
