"""FLOPs of a step equal PyTorch's count and a count by hand; options by layer are read."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma4TextConfig, LlamaConfig, MambaConfig

from dpo_dist.config.schema import (
    AdapterConfig,
    AttentionBackend,
    ImagesConfig,
    ModelConfig,
    TrainedImageParts,
)
from dpo_dist.model.architectures import WITH_STATES
from dpo_dist.model.attention.kernels import Heads, layer_heads
from dpo_dist.model.exactness import trial_examples
from dpo_dist.model.files.load import without_weights
from dpo_dist.model.flops import StepFlops, compute_costs, matmul_peak, step_flops
from dpo_dist.model.layers import keep_text, layer_values
from dpo_dist.model.lora import add_adapter
from tests.support.families import COMMON, FAMILIES, PACKED, tiny_causal_lm, tiny_config, tiny_family
from tests.support.invented_images import image_reader, invented_images
from tests.support.packing import pack_unkeyed, random_pairs
from tests.unit.model.test_architectures import SHAPES, packed

pytestmark = pytest.mark.slow

# Those of Gemma 3n and Llama 4 have products that are not counted: of every expert, and of no weights. The
# counter knows the weights of a convolution as no product.
COUNTED = [
    name
    for name, (_, kind) in FAMILIES.items()
    if kind is PACKED and name not in {"gemma3n_text", "llama4_text", *WITH_STATES}
]
BATCH = pack_unkeyed(random_pairs(SHAPES))
SIZES: dict[str, Any] = COMMON | {"vocab_size": 97, "head_dim": 8}
GEMMA_4 = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
}
GEMMA_4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}


def flops_of(model_type: str, **own: Any) -> StepFlops:
    return step_flops(without_weights(tiny_config(model_type, **own), ModelConfig()))


def products(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts()["Global"]
    return sum(count for kind, count in counts.items() if str(kind) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize(
    ("model_type", "own"), [*((name, {}) for name in COUNTED), ("gemma4_text", GEMMA_4_EXPERTS)]
)
def test_flops_of_matrices_equal_pytorchs_count(model_type: str, own: dict[str, Any]) -> None:
    config = tiny_config(model_type, **own)
    config._experts_implementation = "eager"  # the counter knows no grouped product
    model = packed(tiny_causal_lm(config))
    with FlopCounterMode(display=False) as counter:
        model(BATCH)
    step = flops_of(model_type, **own).step(len(BATCH.input_ids), len(BATCH.targets), attended=0)
    assert step / 3 == products(counter)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_flops_of_an_adapter_equal_pytorchs_count(targets: Any) -> None:
    adapter, config = AdapterConfig(r=4, alpha=8.0, target_modules=targets), tiny_config("qwen2")
    model = packed(tiny_causal_lm(config))
    add_adapter(model, ModelConfig(path="org/model", adapter=adapter), seed=0)
    # Else the first layer has no gradient of its input, which is the only one that is missing.
    model.causal_lm.enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(BATCH).sum().backward()
    step = step_flops(without_weights(config, ModelConfig(adapter=adapter)))
    assert step.step(len(BATCH.input_ids), len(BATCH.targets), attended=0) == products(counter)
    with FlopCounterMode(display=False) as counter:
        model(BATCH)
    assert step.forward(len(BATCH.input_ids), len(BATCH.targets), attended=0) == products(counter)
    assert step.forward(0, 0, attended=3) == step.step(0, 0, attended=1)


def test_a_step_by_hand() -> None:
    flops = flops_of("qwen2")
    # Two layers, 32 wide: queries and output 32 x 32, keys and values 32 x 16, an MLP of three 32 x 48.
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert flops.per_token == 6 * body
    assert flops.per_target == 6 * 32 * 97
    # Scores and values: 2 operations each for each of 32 numbers in two layers, and twice that backward.
    assert flops.per_attended == 3 * 2 * (2 * 32 + 2 * 32)
    assert flops.step(10, 4, 30) == 10 * flops.per_token + 4 * flops.per_target + 30 * flops.per_attended
    # A hybrid has attention in the second layer only.
    assert flops_of("qwen3_5_text").per_attended == 3 * 2 * (32 + 32)
    # Four heads in two layers: scores over 4 + 4 dimensions, values of 6.
    assert flops_of("deepseek_v3").per_attended == 3 * 2 * 2 * 4 * (4 + 4 + 6)


def test_the_peak_is_a_rate_and_keeps_the_random_state() -> None:
    state = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_options_of_each_layer_are_read() -> None:
    """Gemma 4 has larger heads without a window; transformers accepts options by layer for all."""
    gemma = Gemma4TextConfig(**SIZES | GEMMA_4)
    assert layer_heads(gemma) == [Heads(4, 2, 8, 8), Heads(4, 2, 16, 16)]
    assert step_flops(without_weights(gemma, ModelConfig())).per_attended == 3 * 2 * 4 * (8 + 8 + 16 + 16)
    windows = {0: {"sliding_window": 60}, 1: {"num_key_value_heads": 1}}
    config = LlamaConfig(**SIZES, sliding_window=None, per_layer_config=windows)
    assert layer_values(config, "sliding_window") == [60, None]
    assert layer_values(config, "hidden_size") == [32]
    assert layer_heads(config) == [Heads(4, 2, 8, 8), Heads(4, 1, 8, 8)]
    assert layer_heads(MambaConfig()) == []
    causal_lm = tiny_family("gemma4_text")
    causal_lm.config.sliding_window = 160
    first = trial_examples(causal_lm, 512)[0]
    assert len(first.prompt_ids) + max(map(len, first.responses)) == 200


TOWERS = ["gemma3", "gemma4", "glm46v", "idefics3", "internvl", "llava", "mistral3"]
TOWERS += ["qwen2_5_vl", "qwen3_5", "qwen3_vl"]


@pytest.mark.parametrize("family", TOWERS)
def test_parts_for_images_count_the_products_of_their_weights(family: str) -> None:
    """Small towers have more around the products: a token of the whole image, positions, a pooling head."""
    causal_lm, (image, *_) = image_reader(family), invented_images(family)
    parts: dict[TrainedImageParts, StepFlops] = {}
    for train in TrainedImageParts:
        causal_lm.requires_grad_(True)
        keep_text(causal_lm, ImagesConfig(train))
        parts[train] = step_flops(causal_lm)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        causal_lm.model.get_image_features(**image.inputs, return_dict=True)
    by_kind = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
    counted = sum(n for kind, n in by_kind.items() if kind in ("aten.mm", "aten.addmm", "aten.convolution"))
    frozen, projector, tower = parts.values()
    forward = frozen.forward_per_image_token
    assert forward * image.tokens == pytest.approx(counted, rel=0.2)
    assert frozen.forward(0, 0, 0, 2) == frozen.step(0, 0, 0, 2) == 2 * forward
    assert tower.step(0, 0, 0, 2) == 6 * forward
    assert forward <= projector.per_image_token < tower.per_image_token
    assert compute_costs(tower, prefixes=True).image == tower.per_image_token / tower.per_token


def test_sdpa_on_cuda_keeps_the_keys_of_shared_tokens_for_each_query_head() -> None:
    flops = flops_of("qwen2")
    memory = {
        (backend, device): compute_costs(
            flops, prefixes=True, backend=backend, device=torch.device(device)
        ).copy_memory
        for backend in (AttentionBackend.sdpa, AttentionBackend.varlen)
        for device in ("cpu", "cuda")
    }
    groups = tiny_config("qwen2").num_attention_heads / tiny_config("qwen2").num_key_value_heads
    assert memory.pop((AttentionBackend.sdpa, "cuda")) == pytest.approx(groups * min(memory.values()))
    assert groups > 1
    assert len({*memory.values()}) == 1


@pytest.mark.parametrize(("kind", "least"), [("qwen2", 10), ("qwen3_5_text", 40), ("granitemoehybrid", 40)])
def test_recurrent_layers_share_prefixes_that_are_longer_than_the_padding(kind: str, least: int) -> None:
    """Rows of 400 tokens: half a chunk of a recurrent layer is the price of a node."""
    costs = compute_costs(flops_of(kind), prefixes=True)
    common = np.array([least - 10, least])
    assert costs.worth_sharing(common, np.array([400, 400])).tolist() == [0, least]
