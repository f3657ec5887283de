"""What training takes on a device, by shapes; the simulated device measures it in tests/simulated_cuda."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import ModelConfig, Quantization, RunConfig
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.text import size
from dpo_dist.model.files.load import load_config, load_weights, without_weights
from dpo_dist.training.start.footprint import Shapes, activation_bytes, stored_notes
from dpo_dist.training.start.open_run import Run
from tests.support.alone import ALONE
from tests.support.families import FAMILIES, tiny_causal_lm, tiny_config
from tests.support.stored import quantize_mxfp4

pytestmark = pytest.mark.slow


SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}


def bytes_of(kind: str, checkpointing: Any = "none", **options: Any) -> float | None:
    config = AutoConfig.for_model(kind, **SHAPE, **options)
    return activation_bytes(without_weights(config, ModelConfig()), checkpointing)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lfm2", {}),  # in rows: no packed batch
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # sinks: on SDPA
        ("gemma2", {"attn_logit_softcapping": 50.0}),  # as varlen has no caps
    ],
)
def test_what_is_not_known_is_not_guessed(kind: str, options: dict[str, Any]) -> None:
    assert bytes_of(kind, **options) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_bytes_of_a_token_or_none(family: str) -> None:
    found = activation_bytes(without_weights(tiny_config(family), ModelConfig()), "none")
    assert found is None or found > 0


def test_the_more_layers_are_checkpointed_the_less_they_take() -> None:
    of_none, fourth, half, full = (bytes_of("llama", every) or 0.0 for every in ("none", 4, 2, "full"))
    assert of_none > fourth > half > full > 0


@pytest.mark.parametrize("processes", [1, 4])
def test_micro_batches_fill_nine_tenths_of_what_is_left(processes: int) -> None:
    config = load_run_config(["model.path=m", "parallelism.sequence_parallel=1"])
    config = replace(config, model=replace(config.model, gradient_checkpointing="full"))
    causal_lm = without_weights(AutoConfig.for_model("llama", **SHAPE), config.model)
    needs = Shapes(config, causal_lm).footprint(processes)
    assert needs.per_token is not None
    memory = (sum(needs.parts.values()) + 1000 * needs.per_token) / 0.9
    assert needs.largest_micro_batch(memory) == 768, "a multiple of 256"
    assert needs.total_bytes(1000) == pytest.approx(0.9 * memory)
    assert needs.largest_micro_batch(0.5 * memory) == 0
    assert needs.fits(1000, 1.001 * memory)
    assert not needs.fits(1001, memory)


@pytest.mark.parametrize(("gib", "billions"), [(16, 0.55), (24, 0.83), (80, 2.2)])
def test_the_output_layer_takes_less_of_a_small_gpu(gib: int, billions: float) -> None:
    config = load_run_config(["model.path=m", "model.adapter={r: 4, alpha: 8}"])
    causal_lm = without_weights(AutoConfig.for_model("llama", **SHAPE), config.model)
    needs = Shapes(config, causal_lm).footprint(1, gib * 2**30)
    assert needs.parts["output layer"] == pytest.approx(1e9 * billions, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_rank_has_room_for_twice_its_tokens_in_the_experts_of_one_layer(checkpointing: str) -> None:
    settings = ["model.path=m", "parallelism=zero3", f"model.gradient_checkpointing={checkpointing}"]
    whole = load_run_config(settings)
    shared = replace(whole, parallelism=replace(whole.parallelism, experts=4))
    described = tiny_config("qwen3_moe", **WIDE)

    def per_token(config: RunConfig) -> float:
        found = Shapes(config, without_weights(described, config.model)).footprint(4).per_token
        assert found is not None
        return found

    experts = 2 * described.num_experts_per_tok  # in bf16
    width, hidden = described.moe_intermediate_size, described.hidden_size
    assert per_token(shared) - per_token(whole) == pytest.approx(experts * (7 * width + 6 * hidden))


def test_zero3_gathers_at_most_all_weights() -> None:
    config = load_run_config(["model.path=m", "parallelism=zero3"])
    causal_lm = without_weights(AutoConfig.for_model("llama", **SHAPE), config.model)
    parts = Shapes(config, causal_lm).footprint(4).parts
    assert parts["gathered weights"] == pytest.approx(4 * parts["weights"])


def test_micro_batches_are_small_on_a_cpu_where_larger_ones_are_no_faster() -> None:
    for given, tokens in (("auto", 2048), ("8192", 8192)):
        config = load_run_config(["model.path=m", f"trainer.micro_batch_tokens={given}"])
        assert Run(config, ALONE, Console(None)).micro_batch_tokens == tokens


ON_4_BITS = [
    "model.path=m",
    "model.adapter={r: 4, target_modules: [o_proj]}",
    "model.quantization=nf4",
    "parallelism=ddp",
]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32}
WIDE |= {"intermediate_size_mlp": 128}  # of Llama 4


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2", "granitemoe", "llama4_text"])
@pytest.mark.parametrize("kind", Quantization)
def test_experts_take_the_bytes_that_the_plan_says(
    family: str, kind: Quantization, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_causal_lm(tiny_config(family, **WIDE)).save_pretrained(tmp_path)
    config = load_run_config([*ON_4_BITS, f"model.quantization={kind}"])
    described = load_config(tmp_path, config.model)
    loaded = load_weights(tmp_path, described, config.model, torch.device("cpu"))
    plain = load_weights(tmp_path, described, replace(config.model, quantization=None), torch.device("cpu"))
    causal_lm = without_weights(described, config.model)
    assert "experts" not in caplog.text
    sizes = {name: _bytes(weight) for name, weight in loaded.named_parameters()}
    whole = {name: weight.nbytes for name, weight in plain.named_parameters() if ".experts." in name}
    share = sum(sizes[name] for name in whole) / sum(whole.values())
    assert share < {Quantization.nf4: 0.30, Quantization.int8: 0.53}[kind]
    parts, needs = Shapes(config, causal_lm).footprint(4).parts, sum(sizes.values())
    adapter = 2 * sum(weight.numel() for weight in causal_lm.parameters() if weight.requires_grad)
    assert parts["weights"] - adapter == pytest.approx(needs, rel=0.03)
    of_layer = sum(size for name, size in whole.items() if ".1." in name and "bias" not in name)
    assert parts["experts of a layer"] >= of_layer
    assert "experts of a layer" not in Shapes(load_run_config(["model.path=m"]), causal_lm).footprint(4).parts


@pytest.mark.parametrize("kind", [None, *Quantization])
def test_a_base_in_mxfp4_takes_the_bytes_that_the_start_says(
    kind: Quantization | None, tmp_path: Path
) -> None:
    tiny_causal_lm(tiny_config("gpt_oss", **WIDE)).save_pretrained(tmp_path)
    quantize_mxfp4(tmp_path)
    config = load_run_config([*ON_4_BITS, f"model.quantization={kind or 'null'}"])
    described = load_config(tmp_path, config.model)
    loaded = load_weights(tmp_path, described, config.model, torch.device("cpu"))
    causal_lm = without_weights(described, config.model)
    parts, sizes = (
        Shapes(config, causal_lm).footprint(1).parts,
        {n: _bytes(w) for n, w in loaded.named_parameters()},
    )
    adapter = 2 * sum(weight.numel() for weight in causal_lm.parameters() if weight.requires_grad)
    allowed = 0.03 if kind is Quantization.int8 else 0.01
    assert parts["weights"] - adapter == pytest.approx(sum(sizes.values()), rel=allowed)
    experts = sum(each for name, each in sizes.items() if ".experts." in name and "bias" not in name)
    [note] = stored_notes(config.model, causal_lm)
    taken = experts if kind is Quantization.nf4 else parts["weights"]
    assert note.partition("; ")[0].endswith(f": {size(taken)}")
    assert ("experts of a layer" in parts) is (kind is not None)


@pytest.mark.parametrize("kind", [None, Quantization.nf4])
@pytest.mark.parametrize("is_mxfp4", [False, True])
def test_adapted_experts_take_the_bytes_of_their_sums_and_of_an_update_with_its_gradient(
    kind: Quantization | None, is_mxfp4: bool, tmp_path: Path
) -> None:
    tiny_causal_lm(tiny_config("gpt_oss", **WIDE)).save_pretrained(tmp_path)
    if is_mxfp4:
        quantize_mxfp4(tmp_path)
    targets = "model.adapter.target_modules=[experts.gate_up_proj,experts.down_proj]"
    config = load_run_config([*ON_4_BITS, targets, f"model.quantization={kind or 'null'}"])
    causal_lm = without_weights(load_config(tmp_path, config.model), config.model)
    layer = [4 * 128 * 512, 4 * 256 * 128]
    numbers = sum(layer) + (2 + (is_mxfp4 and kind is not None)) * max(layer)  # unpacked in the file's order
    assert Shapes(config, causal_lm).footprint(1).parts["experts of a layer"] == 2 * numbers


def _bytes(weight: Any) -> int:
    """Of a weight with its scales."""
    state = getattr(weight, "quant_state", None)
    scales = [getattr(weight, "SCB", None), *([] if state is None else [state.absmax, state.state2.absmax])]
    return int(weight.nbytes + sum(scale.nbytes for scale in scales if scale is not None))


@pytest.mark.parametrize(("bits", "share"), [("null", 1 / 4), ("int8", 1 / 2)])
def test_a_live_reference_is_whole_on_each_device_if_it_is_quantized(bits: str, share: float) -> None:
    """In 8 bits it is half of bf16, but for what is no linear layer."""
    config = load_run_config(["model.path=m", "reference=live", f"reference.quantization={bits}"])
    causal_lm = without_weights(AutoConfig.for_model("llama", **(SHAPE | {"vocab_size": 8})), ModelConfig())
    whole = 2 * sum(map(torch.numel, causal_lm.parameters()))
    assert Shapes(config, causal_lm).footprint(4).parts["reference"] == pytest.approx(share * whole, rel=0.01)
