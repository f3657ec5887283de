"""Adapters on stacked experts: peft, the merged model and the gradient of whole weights are the oracles."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    AttentionBackend,
    Dtype,
    ModelConfig,
    Quantization,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.load import load_config, load_weights, without_weights
from dpo_dist.model.files.save import write_adapter, write_merged
from dpo_dist.model.flops import stacked_experts, step_flops
from dpo_dist.model.layers import checkpoint_layers
from dpo_dist.model.lora import adapter_off, add_adapter, experts_note
from dpo_dist.model.packed import PackedCausalLM
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.stored import quantize_mxfp4
from tests.unit.model.test_flops import GEMMA_4_EXPERTS

pytestmark = pytest.mark.slow

RANK, ALPHA = 2, 6.0
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v4": {},
    "gemma4_text": GEMMA_4_EXPERTS,
    "glm4_moe": {},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoehybrid": {},
    "jamba": {},
    "kimi_linear": {"num_experts": 4, "n_routed_experts": 4},
    "lfm2_moe": {},
    "llama4_text": {},
    "minimax": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
}
INPUTS_FIRST = ("gpt_oss",)  # peft takes Llama 4's inputs for outputs, which changes no product
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.tensor([[3, 9, 4, 17, 5, 22, 11, 6, 8, 13]])


def write_base(folder: Path, family: str, **options: Any) -> Path:
    tiny_causal_lm(tiny_config(family, **(FAMILIES[family] | options))).save_pretrained(folder)
    return folder


def adapted(base: Path, start: Path | None = None, *, packed: Quantization | None = None, **keys: Any) -> Any:
    """The policy with an adapter whose update is not 0, if `keys` describe a new one."""
    given = {} if start else {"r": RANK, "alpha": ALPHA, "target_modules": EXPERTS} | keys
    config = ModelConfig(str(base), dtype=Dtype.fp32, adapter=AdapterConfig(**given), quantization=packed)
    causal_lm = load_weights(base, load_config(base, config), config, torch.device("cpu"))
    model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
    causal_lm.set_attn_implementation("eager")
    add_adapter(model, config, 0, start)
    torch.manual_seed(3)
    for name, weight in causal_lm.named_parameters():
        if start is None and "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def logps(causal_lm: Any) -> Tensor:
    logits: Tensor = causal_lm(input_ids=IDS, use_cache=False).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def trained(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model.causal_lm.named_parameters() if one.requires_grad}


def write(folder: Path, model: Any) -> Path:
    weights = {name: weight.detach() for name, weight in trained(model).items()}
    write_adapter(folder, model.causal_lm, weights, torch.float32)
    return folder


def update(first: Tensor, second: Tensor, like: Tensor, scale: float, family: str) -> Tensor:
    """The update of experts [experts, ...] by peft's matrices [experts * rank, in], [out, rank * experts]."""
    rows = first.reshape(len(like), RANK, -1)
    columns = second.reshape(len(second), RANK, len(like)).permute(2, 0, 1)
    found = scale * columns @ rows
    return found.mT if family in INPUTS_FIRST else found


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((family, AdapterVariant.lora) for family in FAMILIES),
        ("qwen3_moe", AdapterVariant.rslora),
        ("gpt_oss", AdapterVariant.rslora),
    ],
)
def test_an_adapter_is_the_merged_model_with_the_gradient_of_its_weights(
    family: str, variant: AdapterVariant, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", family)
    model = adapted(base, variant=variant)
    matrices = trained(model)
    assert matrices
    assert all(".experts." in name and ".lora_" in name for name in matrices)
    found = logps(model.causal_lm)
    found.sum().backward()
    start = logps(plain(base)).detach()
    assert (found - start).abs().max() > 0.01
    with adapter_off(model), torch.no_grad():
        torch.testing.assert_close(logps(model.causal_lm), start, atol=1e-6, rtol=1e-6)

    folder = write(tmp_path / "adapter", model)
    write_merged(tmp_path / "merged", base, folder, torch.float32, trust_remote_code=False)
    merged, by_peft = plain(tmp_path / "merged"), PeftModel.from_pretrained(plain(base), folder)
    whole = logps(merged.requires_grad_(True))
    torch.testing.assert_close(found, whole, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found, logps(by_peft), atol=2e-6, rtol=1e-6)

    whole.sum().backward()
    scale = ALPHA / (RANK**0.5 if variant is AdapterVariant.rslora else RANK)
    for name, weight in stacked_experts(merged).items():
        part = name.rpartition(".")[0] + ("" if "down_proj" in name else ".base_layer")
        first, second = (matrices[f"{part}.lora_{side}.default.weight"] for side in "AB")
        leaves = [one.detach().clone().requires_grad_() for one in (first, second)]
        (update(*leaves, weight, scale, family) * weight.grad).sum().backward()
        for ours, leaf in zip((first, second), leaves, strict=True):
            allowed = 2e-6 * float(leaf.grad.abs().max())
            torch.testing.assert_close(ours.grad, leaf.grad, atol=allowed, rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "is_mxfp4", "checkpointing"),
    [
        ("qwen3_moe", False, "none"),
        *((family, False, "full") for family in ("qwen3_moe", "gpt_oss", "llama4_text")),
        ("gpt_oss", True, "full"),
    ],
)
def test_an_adapter_on_packed_experts_is_one_on_the_weights_that_they_stand_for(
    family: str, is_mxfp4: bool, checkpointing: str, tmp_path: Path
) -> None:
    """And merged it is added to the base's files, not to what 4 bits stand for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    # Widths are multiples of a block: bitsandbytes (0.50) computes others wrongly on CPUs.
    wide = {
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "intermediate_size_mlp": 64,
    }
    base = write_base(tmp_path / "base", family, **wide)
    if is_mxfp4:  # the experts stay as they are in the files, which the twin reads, too
        quantize_mxfp4(base)
    model, twin = adapted(base, packed=Quantization.nf4), adapted(base)
    checkpoint_layers(model.causal_lm, checkpointing)
    packed = {name.replace("base_layer.", ""): one for name, one in model.causal_lm.named_parameters()}
    stacks = {name.replace("base_layer.", ""): one for name, one in stacked_experts(twin.causal_lm).items()}
    assert stacks
    for name, weight in twin.causal_lm.named_parameters():
        of_name = packed[name.replace("base_layer.", "")]
        if of_name.is_floating_point() or (is_mxfp4 and "experts" in name):
            continue
        found = functional.dequantize_4bit(of_name.data, of_name.quant_state)
        is_turned = weight.dim() == 3 and family in ("gpt_oss", "llama4_text")
        weight.data = found.view(weight.mT.shape).mT if is_turned else found.view(weight.shape)
    ours, theirs = (logps(one.causal_lm.train()) for one in (model, twin))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    for name, weight in trained(twin).items():
        found = trained(model)[name].grad
        torch.testing.assert_close(found, weight.grad, atol=1e-6 * float(weight.grad.abs().max()), rtol=1e-6)

    folder = write(tmp_path / "adapter", model)
    of_files = torch.bfloat16 if is_mxfp4 else torch.float32
    write_merged(tmp_path / "merged", base, folder, of_files, trust_remote_code=False)
    exact = PeftModel.from_pretrained(plain(base), folder).merge_and_unload()
    merged = plain(tmp_path / "merged")
    for name, weight in stacked_experts(merged).items():
        assert torch.equal(weight, exact.get_parameter(name).to(of_files).float())
        assert not torch.equal(weight, plain(base).get_parameter(name))


def test_no_sum_of_experts_and_their_updates_is_kept_for_backward(tmp_path: Path) -> None:
    model = adapted(write_base(tmp_path / "base", "qwen3_moe", mlp_only_layers=[]))
    kept = list[int]()

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        logps(model.causal_lm.train())
    assert kept
    assert not {weight.numel() for weight in stacked_experts(model.causal_lm).values()} & {*kept}


def test_a_continued_adapter_starts_as_the_reference_and_keeps_its_form(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3_moe", mlp_only_layers=[])
    first = adapted(base, target_modules=["q_proj", *EXPERTS])
    folder = write(tmp_path / "first", first)
    model = adapted(base, folder)
    start = logps(first.causal_lm).detach()
    torch.testing.assert_close(logps(model.causal_lm).detach(), start, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.1)
    assert (logps(model.causal_lm) - start).abs().max() > 0.01
    with adapter_off(model), torch.no_grad():
        torch.testing.assert_close(logps(model.causal_lm), start, atol=1e-6, rtol=1e-6)
    again = load_file(write(tmp_path / "again", model) / "adapter_model.safetensors")
    assert again.keys() == load_file(folder / "adapter_model.safetensors").keys()
    by_peft = PeftModel.from_pretrained(plain(base), tmp_path / "again")
    torch.testing.assert_close(logps(by_peft), logps(model.causal_lm), atol=2e-6, rtol=1e-6)


def test_an_adapter_of_peft_on_experts_alone_is_continued(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt_oss")
    given = get_peft_model(plain(base), LoraConfig(r=RANK, target_parameters=["mlp.experts.down_proj"]))
    given.save_pretrained(tmp_path / "given")
    model = adapted(base, tmp_path / "given")
    torch.testing.assert_close(logps(model.causal_lm), logps(given), atol=2e-6, rtol=1e-6)
    again = PeftModel.from_pretrained(plain(base), write(tmp_path / "again", model))
    torch.testing.assert_close(logps(again), logps(given), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["gate_up_proj"], {"experts.gate_up_proj"}),
        (["mlp.experts.gate_up_proj"], {"experts.gate_up_proj"}),
        (["model.layers.1.mlp.experts.down_proj"], {"experts.down_proj"}),
        (["q_proj", "down_proj"], {"q_proj", "experts.down_proj"}),
        ("all-linear", LINEAR),
        (["all-linear", "1.mlp.experts.down_proj"], LINEAR | {"experts.down_proj"}),
    ],
)
def test_names_that_reach_experts(targets: Any, found: set[str], tmp_path: Path) -> None:
    """By default neither experts nor routers are adapted."""
    config = tiny_config("qwen3_moe", mlp_only_layers=[])
    adapter = AdapterConfig(r=RANK, alpha=ALPHA, target_modules=targets)
    causal_lm = without_weights(config, ModelConfig("m", adapter=adapter))
    written = causal_lm.peft_config["default"]
    names = [name.rpartition(".")[2] for name in written.target_modules]
    names += [".".join(name.split(".")[-2:]) for name in written.target_parameters or []]
    assert set(names) == found
    assert bool(experts_note(causal_lm, adapter)) is (targets == "all-linear")
    assert all(".lora_" in name for name, weight in causal_lm.named_parameters() if weight.requires_grad)


def test_a_name_of_linear_layers_does_not_reach_experts() -> None:
    adapter = AdapterConfig(r=RANK, alpha=ALPHA, target_modules=["gate_proj", "up_proj", "down_proj"])
    causal_lm = without_weights(tiny_config("llama4_text"), ModelConfig("m", adapter=adapter))
    assert not causal_lm.peft_config["default"].target_parameters
    assert "experts.gate_up_proj,experts.down_proj" in experts_note(causal_lm, adapter)[0]
    assert not experts_note(without_weights(tiny_config("llama"), ModelConfig("m", adapter=adapter)), adapter)


def test_three_weights_of_one_module_are_adapted() -> None:
    """peft's wrappers are around each other."""
    targets = [f"shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    adapter = AdapterConfig(r=RANK, alpha=ALPHA, target_modules=targets)
    causal_lm = without_weights(tiny_config("inkling_text"), ModelConfig("m", adapter=adapter))
    assert len([name for name, _ in causal_lm.named_parameters() if ".lora_A" in name]) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variant": AdapterVariant.dora}, "no DoRA for stacked experts"),
        ({"target_modules": ["gate"]}, "not a linear layer"),
        ({"target_modules": ["gate.weight"]}, "not a linear layer"),
        ({"target_modules": ["experts"]}, "not a linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_weights_are_read(
    keys: dict[str, Any], message: str
) -> None:
    adapter = AdapterConfig(**({"r": RANK, "alpha": ALPHA, "target_modules": EXPERTS} | keys))
    with pytest.raises(ConfigError, match=message) as refused:
        without_weights(tiny_config("qwen3_moe"), ModelConfig("m", adapter=adapter))
    assert "DoRA" in message or "experts.gate_up_proj" in refused.value.expected


def test_an_adapter_of_a_router_is_not_continued(tmp_path: Path) -> None:
    """As peft's own `all-linear` makes it; the start's first checks have no weights."""
    base = write_base(tmp_path / "base", "qwen3_moe", mlp_only_layers=[])
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(plain(base), lora).save_pretrained(tmp_path / "adapter")
    model = ModelConfig(str(base), adapter=AdapterConfig(path=str(tmp_path / "adapter")))
    for start in (
        partial(adapted, base, tmp_path / "adapter"),
        partial(without_weights, load_config(base, model), model, tmp_path / "adapter"),
    ):
        with pytest.raises(ConfigError, match="matrices on the weight of Qwen3MoeTopKRouter") as refused:
            start()
        assert refused.value.remedy.startswith("merge the adapter")


def test_a_token_is_multiplied_with_the_matrices_of_the_experts_that_it_visits() -> None:
    def flops(*targets: str) -> float:
        adapter = AdapterConfig(r=4, alpha=4.0, target_modules=["q_proj", *targets])
        config = tiny_config("qwen3_moe", mlp_only_layers=[])
        return step_flops(without_weights(config, ModelConfig("m", adapter=adapter))).per_token

    # Two layers, 2 of 4 experts, rank 4: gate and up from 32 to 2 * 16, down from 16 to 32.
    assert flops(*EXPERTS) - flops() == 6 * 2 * 2 * 4 * ((32 + 32) + (16 + 32))
