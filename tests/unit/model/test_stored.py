"""Bases as published, in FP8 and MXFP4: the weights and log-probs that transformers makes of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from dpo_dist.config.schema import Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.folder import weight_files
from dpo_dist.model.files.load import TORCH_DTYPES, load_config, load_weights
from dpo_dist.model.files.save import ignored_tensors
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.stored import expand, quantize_fp8, quantize_mxfp4

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 64, "intermediate_size": 96}
IDS = torch.tensor([[3, 9, 4, 17, 5, 22, 11, 6, 8, 13]])
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": WIDE,
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 32},
    "deepseek_v3": {"first_k_dense_replace": 1, "moe_intermediate_size": 32, "qk_rope_head_dim": 8},
}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return written(tmp_path, request.param)


def written(folder: Path, family: str, **options: Any) -> Path:
    tiny_causal_lm(tiny_config(family, **(FAMILIES[family] | options))).save_pretrained(folder)
    quantize = quantize_mxfp4 if family == "gpt_oss" else quantize_fp8
    quantize(folder)
    return folder


def loaded(folder: Path, dtype: Dtype = Dtype.fp32, kind: Quantization | None = None) -> Any:
    config = ModelConfig(str(folder), dtype=dtype, quantization=kind)
    return load_weights(folder, load_config(folder, config), config, torch.device("cpu"))


def by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own dequantized model."""
    method = json.loads((folder / "config.json").read_bytes())["quantization_config"]["quant_method"]
    kind = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}[method]
    found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=kind(dequantize=True)
    )
    for weight in found.parameters():  # in float32, transformers leaves norms in the bf16 of the files
        weight.data = weight.data.to(dtype)
    return found


def logps(causal_lm: Any) -> Tensor:
    with torch.no_grad():
        scores = causal_lm.eval()(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)
    return scores[:, :-1].gather(-1, IDS[:, 1:, None])


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_weights_and_log_probs_are_those_of_transformers_own_dequantized_model(
    folder: Path, dtype: Dtype
) -> None:
    ours, theirs = loaded(folder, dtype), by_transformers(folder, TORCH_DTYPES[dtype])
    for name, weight in theirs.named_parameters():
        assert ours.get_parameter(name).dtype is TORCH_DTYPES[dtype]
        assert torch.equal(ours.get_parameter(name), weight), name
        assert ours.get_parameter(name).requires_grad
    assert torch.equal(logps(ours), logps(theirs))
    assert not hasattr(ours.config, "quantization_config")


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [20, 24])
def test_blocks_are_of_the_size_in_the_configuration_and_not_equal_parts_of_a_side(
    rank: int, scales: torch.dtype, tmp_path: Path
) -> None:
    """transformers (5.23) refuses 20 rows of 16, as DeepSeek-V3's 576 of 128, and reads 24 as 2 times 12."""
    tiny_causal_lm(tiny_config("deepseek_v3", q_lora_rank=rank, hidden_size=40)).save_pretrained(tmp_path)
    quantize_fp8(tmp_path, (16, 16), scales)
    files = [file for file in weight_files(tmp_path) if file.suffix != ".json"]
    tensors = {name: one for file in files for name, one in load_file(file).items()}
    ours, compared = loaded(tmp_path), 0
    for name, codes in tensors.items():
        if (scale := tensors.get(f"{name}_scale_inv")) is not None and ".experts." not in name:
            rows, columns = codes.shape
            expected = codes.float() * expand(scale.float(), (16, 16))[:rows, :columns]
            assert torch.equal(ours.get_parameter(name), expected), name
            compared += rows == rank
    assert compared == 2, "q_a_proj of two layers"


def test_a_scale_of_the_whole_weight_is_read(tmp_path: Path) -> None:
    tiny_causal_lm(tiny_config("qwen3")).save_pretrained(tmp_path)
    quantize_fp8(tmp_path, (256, 256), weight_block_size=None)
    theirs = by_transformers(tmp_path, torch.float32)
    assert torch.equal(logps(loaded(tmp_path)), logps(theirs))


def test_a_weight_that_was_left_in_bf16_has_no_scale(tmp_path: Path) -> None:
    """transformers (5.23) leaves sides that no block divides, and writes a scale that it never set."""
    source = tiny_causal_lm(tiny_config("qwen3"))
    source.save_pretrained(tmp_path)
    quantize_fp8(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    (file,) = (file for file in weight_files(tmp_path)[1:] if name in load_file(file))
    left = source.get_parameter(name).detach().bfloat16()
    save_file(load_file(file) | {name: left}, file, {"format": "pt"})
    assert torch.equal(loaded(tmp_path).get_parameter(name), left.float())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_nf4_keeps_experts_in_the_4_bits_of_the_files_exactly(tmp_path: Path, checkpointing: str) -> None:
    pytest.importorskip("bitsandbytes")
    written(tmp_path, "gpt_oss", intermediate_size=64, head_dim=16)
    plain, packed = loaded(tmp_path), loaded(tmp_path, kind=Quantization.nf4)
    experts = [name for name, _ in plain.named_parameters() if re.search(r"experts\.\w+_proj$", name)]
    stored = sum(packed.get_parameter(name).nbytes for name in experts)
    assert stored * 32 == 17 * sum(plain.get_parameter(name).numel() for name in experts)
    assert not any(packed.get_parameter(name).requires_grad for name in experts)
    for name, module in packed.named_modules():  # so that only the experts differ
        if type(module).__name__ == "Linear4bit":
            dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.load_state_dict(plain.get_submodule(name).state_dict())
            packed.set_submodule(name, dense)
    for causal_lm in (plain, packed):
        causal_lm.train()
    if checkpointing == "full":
        packed.gradient_checkpointing_enable()
    slopes = []
    for causal_lm in (plain, packed):
        inputs = causal_lm.get_input_embeddings()(IDS).detach().requires_grad_()
        scores = causal_lm(inputs_embeds=inputs, use_cache=False).logits.log_softmax(-1)
        scores[:, :-1].gather(-1, IDS[:, 1:, None]).sum().backward()
        slopes.append((scores.detach(), inputs.grad))
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-6, rtol=1e-6)


def test_int8_packs_the_weights_that_the_files_stand_for(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    written(tmp_path, "gpt_oss")
    experts = loaded(tmp_path, kind=Quantization.int8).model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype is torch.int8


def test_ignored_tensors_are_written_as_plain_ones(tmp_path: Path) -> None:
    """DeepSeek's layer that predicts a further token is quantized, too."""
    causal_lm = tiny_causal_lm(tiny_config("deepseek_v3"))
    causal_lm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    extra = "model.layers.61.self_attn.o_proj.weight"
    weights[extra] = weights["model.layers.0.self_attn.o_proj.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    quantize_fp8(tmp_path)
    ignored = ignored_tensors(causal_lm, tmp_path, torch.bfloat16)
    assert {*ignored} == {extra}
    torch.testing.assert_close(ignored[extra].float(), weights[extra], atol=0.02, rtol=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_block_size": [32, 32]}, "weight_scale_inv has"),
        ({"quant_method": "awq"}, "use the original model"),
        ({"quant_method": "compressed-tensors"}, "by the lines of docs/models.md (bases in 8 or 4 bits)"),
    ],
)
def test_what_is_not_understood_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    written(tmp_path, "qwen3")
    file = tmp_path / "config.json"
    config = json.loads(file.read_bytes())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path)
    assert words in str(caught.value)
