"""Experts in 4 and 8 bits: the numbers of a forward with the weights that they stand for, and memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.experts import check_shared_experts
from dpo_dist.model.files.load import load_config, load_weights
from dpo_dist.model.layers import checkpoint_layers
from tests.support.families import tiny_causal_lm, tiny_config

pytestmark = pytest.mark.slow

functional = pytest.importorskip("bitsandbytes.functional")

# Widths are multiples of a block: bitsandbytes (0.50) computes other linear layers wrongly on CPUs.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
HEADS = {"head_dim": 16}
STATES = {"linear_value_head_dim": 32}
NARROW = {**WIDE, "moe_intermediate_size": 64}
INPUTS_FIRST = ("gpt_oss", "llama4_text")
OPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_v3": NARROW | {"first_k_dense_replace": 1},
    "gemma4_text": NARROW
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "head_dim": 16}
    | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16}
    | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4_moe": NARROW | HEADS,
    "gpt_oss": WIDE | HEADS,
    "granitemoe": WIDE,
    "granitemoehybrid": WIDE | {"mamba_d_head": 32, "shared_intermediate_size": 64},
    "jetmoe": WIDE | {"num_experts_per_tok": 2, "num_local_experts": 4, "kv_channels": 16},
    "llama4_text": WIDE | HEADS | {"intermediate_size_mlp": 64},
    "mixtral": WIDE | HEADS,
    "olmoe": WIDE,
    "qwen2_moe": NARROW | HEADS | {"shared_expert_intermediate_size": 64},
    "qwen3_5_moe_text": NARROW | HEADS | STATES | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": NARROW | HEADS,
    "qwen3_next": NARROW | HEADS | STATES | {"shared_expert_intermediate_size": 64},
}
IDS = torch.tensor([[3, 9, 4, 17, 5, 22, 11, 6, 8, 13]])


@pytest.mark.parametrize(
    ("family", "ranks", "got"),
    [
        ("qwen3_moe", 3, "3, and qwen3_moe with 4 experts in a layer"),
        ("llama4_text", 2, "2, and llama4_text with no stacked experts"),
        ("llama", 2, "2, and llama with no stacked experts"),
    ],
)
def test_experts_that_processes_cannot_share_equally_are_refused(family: str, ranks: int, got: str) -> None:
    causal_lm = tiny_causal_lm(tiny_config(family))
    check_shared_experts(causal_lm, 1)
    with pytest.raises(ConfigError, match="cannot be shared by so many processes") as raised:
        check_shared_experts(causal_lm, ranks)
    assert raised.value.got == got


def written(folder: Path, family: str, **options: Any) -> Any:
    """A model whose experts and blocks of inputs have very different scales."""
    causal_lm = tiny_causal_lm(tiny_config(family, **(OPTIONS[family] | options)))
    for name, weight in causal_lm.named_parameters():
        if weight.dim() == 3 and "conv" not in name:
            weight.data *= 1.5 ** torch.arange(len(weight))[:, None, None]
            inputs = 1 if family in INPUTS_FIRST else 2
            blocks = 3.0 ** (torch.arange(weight.shape[inputs]) // 64)
            weight.data *= blocks[:, None] if inputs == 1 else blocks
    causal_lm.save_pretrained(folder)
    return causal_lm


def loaded(folder: Path, kind: Quantization | None, dtype: Dtype = Dtype.fp32) -> Any:
    config = ModelConfig(str(folder), dtype=dtype, quantization=kind)
    causal_lm = load_weights(folder, load_config(folder, config), config, torch.device("cpu"))
    return causal_lm.requires_grad_(False)


def rounded(weight: Tensor, kind: Quantization, inputs: int = -1) -> Tensor:
    """The weight [experts, ...] after bitsandbytes has rounded it, an output's inputs in a row."""
    rows = weight.movedim(inputs, -1).contiguous()
    if kind is Quantization.nf4:
        packed = functional.quantize_4bit(rows.view(-1), quant_type="nf4", compress_statistics=True)
        found = functional.dequantize_4bit(*packed)
    else:
        codes, scales, _ = functional.int8_vectorwise_quant(rows.view(-1, rows.shape[-1]).half())
        found = codes.float() * scales[:, None] / 127
    return found.view(rows.shape).movedim(-1, inputs)


def unpacked_twin(folder: Path, quantized: Any, kind: Quantization, family: str) -> Any:
    """transformers' own model whose weights are those that the quantized ones stand for."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in twin.named_parameters():
        packed = quantized.get_parameter(name)
        if packed.is_floating_point():
            continue
        if weight.dim() == 3:
            weight.data = rounded(weight.data, kind, 1 if family in INPUTS_FIRST else 2)
        elif kind is Quantization.nf4:
            weight.data = functional.dequantize_4bit(packed.data, packed.quant_state)
        else:
            weight.data = functional.int8_vectorwise_dequant(packed.CB, packed.SCB)
    return twin.requires_grad_(False)


def computed(causal_lm: Any) -> tuple[Tensor, Tensor]:
    """Log-probs of the next tokens, and the gradient of their sum by an offset of the inputs."""
    embeddings = causal_lm.get_input_embeddings()
    offset = torch.zeros(1, IDS.shape[1], embeddings.weight.shape[1], requires_grad=True)
    hook = embeddings.register_forward_hook(lambda _module, _inputs, output: output + offset)
    # In evaluation, bitsandbytes also rounds the inputs of 8-bit linear layers on CPUs.
    logits = causal_lm.train()(input_ids=IDS, use_cache=False).logits
    hook.remove()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    logps.sum().backward()
    assert offset.grad is not None
    return logps.detach(), offset.grad


@pytest.mark.parametrize("kind", Quantization)
@pytest.mark.parametrize("family", OPTIONS)
def test_log_probs_and_gradients_are_those_of_the_weights_that_packed_ones_stand_for(
    family: str, kind: Quantization, tmp_path: Path
) -> None:
    """With and without checkpointing."""
    written(tmp_path, family)
    quantized = loaded(tmp_path, kind)
    logps, gradient = computed(unpacked_twin(tmp_path, quantized, kind, family))
    # In 8 bits, linear layers scale their products in place of their weights.
    allowed = {Quantization.nf4: 1e-6, Quantization.int8: 5e-6}[kind]
    for checkpointing in ("none", "full") if quantized.supports_gradient_checkpointing else ("none",):
        checkpoint_layers(quantized, checkpointing)
        found, slope = computed(quantized)
        torch.testing.assert_close(found, logps, atol=allowed, rtol=1e-6)
        torch.testing.assert_close(slope, gradient, atol=allowed * float(gradient.abs().max()), rtol=1e-6)
    experts = {name: one for name, one in quantized.named_parameters() if ".experts." in name}
    assert all(not one.is_floating_point() for name, one in experts.items() if "bias" not in name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("kind", "error"), [(Quantization.nf4, 0.152), (Quantization.int8, 0.004)])
def test_a_number_is_rounded_by_the_largest_of_its_own_block(
    family: str, kind: Quantization, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 4 bits by 0.152 of it, half the largest step between two numbers; a block is 64 inputs."""
    plain, seen = written(tmp_path, family), dict[str, Tensor]()
    name = "model.layers.1.mlp.experts"
    experts = type(plain.get_submodule(name))
    own = experts.forward

    def look(self: Any, *args: Any, **options: Any) -> Any:
        seen.update({weight: getattr(self, weight).clone() for weight in ("gate_up_proj", "down_proj")})
        return own(self, *args, **options)

    monkeypatch.setattr(experts, "forward", look)
    quantized = loaded(tmp_path, kind)
    with torch.no_grad():
        quantized(input_ids=IDS)
    assert set(seen) == {"gate_up_proj", "down_proj"}
    for weight, found in seen.items():
        original = plain.get_parameter(f"{name}.{weight}").detach()
        rows, of_rows = (one.mT if family in INPUTS_FIRST else one for one in (found, original))
        assert_near(rows, of_rows, 64 if kind is Quantization.nf4 else rows.shape[-1], error)


def assert_near(found: Tensor, original: Tensor, size: int, error: float) -> None:
    """Each number is within `error` of the largest of its block, whose scale is rounded, too."""
    numbers, blocks = found.reshape(-1, size), original.reshape(-1, size)
    largest = blocks.abs().amax(-1, keepdim=True)
    assert ((numbers - blocks).abs() <= error * largest + 0.01 * largest.max()).all()
    assert not torch.equal(numbers, blocks)


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many unpacked weights of experts are in memory, each time one more is made."""
    references, counts = list[StorageWeakRef](), list[int]()
    unpack = functional.dequantize_4bit

    def watched(packed: Tensor, state: Any, *args: Any, **options: Any) -> Tensor:
        result: Tensor = unpack(packed, state, *args, **options)
        if result.numel() >= 4 * 64 * 64:
            references.append(StorageWeakRef(result.untyped_storage()))
            counts.append(sum(not one.expired() for one in references))
        return result

    monkeypatch.setattr(functional, "dequantize_4bit", watched)
    yield counts
    assert all(one.expired() for one in references), "they are kept after the backward"


@pytest.mark.parametrize("checkpointing", ["none", 2, "full"])
def test_the_experts_of_one_layer_at_a_time_are_whole(
    checkpointing: int | str, tmp_path: Path, living: list[int]
) -> None:
    written(tmp_path, "qwen3_moe", num_hidden_layers=6, mlp_only_layers=[])
    causal_lm = loaded(tmp_path, Quantization.nf4)
    checkpoint_layers(causal_lm, checkpointing)
    computed(causal_lm)
    assert len(living) == 2 * 6 * 2, "two weights, in each forward, and again for each backward"
    assert max(living) == 2
    del living[:]
    with torch.no_grad():
        causal_lm(input_ids=IDS)
    assert len(living) == 2 * 6
    assert max(living) == 2


def test_the_experts_of_a_model_are_never_whole_together_while_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "qwen3_moe", num_hidden_layers=6, mlp_only_layers=[])
    references, most, pack = list[StorageWeakRef](), [0], functional.quantize_4bit

    def watched(weight: Tensor, *args: Any, **options: Any) -> Any:
        if weight.numel() >= 4 * 64 * 64:
            references.append(StorageWeakRef(weight.untyped_storage()))
            most.append(sum(not one.expired() for one in references))
        return pack(weight, *args, **options)

    monkeypatch.setattr(functional, "quantize_4bit", watched)
    loaded(tmp_path, Quantization.nf4)
    assert len(references) == 2 * 6
    assert max(most) <= 2, "the weight that is packed, and the one before"


def test_widths_that_no_block_divides_are_packed_as_exactly(tmp_path: Path) -> None:
    written(tmp_path, "qwen3_moe", moe_intermediate_size=48)
    plain, quantized = (loaded(tmp_path, kind) for kind in (None, Quantization.nf4))
    name = "model.layers.1.mlp.experts.down_proj"
    packed, weight = quantized.get_parameter(name), plain.get_parameter(name)
    numbers = functional.dequantize_4bit(packed.data, packed.quant_state)
    assert_near(numbers, weight.detach(), 64, 0.152)


def test_linear_layers_that_bitsandbytes_unpacks_wrongly_on_cpus_are_refused(tmp_path: Path) -> None:
    """Where it unpacks them rightly, as 20 inputs, they are loaded."""
    for name, width in (("wrong", 48), ("right", 20)):
        options = {"hidden_size": 64, "head_dim": 16, "intermediate_size": width}
        tiny_causal_lm(tiny_config("qwen3", **options)).save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match="wrongly on a CPU") as caught:
        loaded(tmp_path / "wrong", Quantization.nf4)
    assert "a layer of 48 inputs" in caught.value.got
    assert "set model.quantization=int8" in caught.value.remedy
    loaded(tmp_path / "wrong", Quantization.int8)
    loaded(tmp_path / "right", Quantization.nf4)
