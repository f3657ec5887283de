"""Initial values from the weights: the function at the start, the gradients, and the exported adapter."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.adapter_weights import AdapterWeights, stack, write_adapter
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import TRAINED, adapter_off, add_adapter, load_adapter, write_initial
from dpo_dist.model.packed import PackedCausalLM
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.support.precision import DTYPES
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model

PAIRS = random_pairs([(3, 4, 2), (5, 1, 6)])
BATCH = pack_unkeyed(PAIRS)
INITS = ("pissa", "pissa_niter_4", "olora")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"))


def started(base: Path, init: str, initial: Path | None = None, dtype: Dtype = Dtype.fp32) -> PackedCausalLM:
    config = ModelConfig(str(base), dtype=dtype, adapter=AdapterConfig(r=4, alpha=6, init=init))
    model = load_packed(base, config, 64, torch.device("cpu"))
    add_adapter(model, config, 0, initial=initial)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [*INITS, "gaussian"])
def test_the_start_and_the_base_are_exactly_the_model(init: str, dtype: Dtype, base: Path) -> None:
    plain = load_packed(base, ModelConfig(str(base), dtype=dtype), 64, torch.device("cpu"))
    model = started(base, init, dtype=dtype)
    assert torch.equal(model(BATCH), plain(BATCH))
    weights = dict(plain.causal_lm.named_parameters())
    for name, weight in model.causal_lm.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, weights[name.replace(".base_layer", "")])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * weight.requires_grad)
    assert (model(BATCH) - plain(BATCH)).abs().max() > 1e-3
    with adapter_off(model):
        assert torch.equal(model(BATCH), plain(BATCH))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_gradients_are_those_of_peft_on_the_residual(init: str, base: Path) -> None:
    model = started(base, init)
    model(BATCH).sum().backward()
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=init, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    oracle = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    plain_logps(oracle, PAIRS).sum().backward()
    wanted = {name.removeprefix("base_model.model."): weight for name, weight in oracle.named_parameters()}
    trained = {name: weight for name, weight in model.causal_lm.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 7
    for name, weight in trained.items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weight.grad, wanted[name].grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("init", INITS)
def test_a_rank_above_the_smaller_side_of_a_layer(init: str, base: Path, tmp_path: Path) -> None:
    config = ModelConfig(str(base), dtype=Dtype.fp32, adapter=AdapterConfig(r=20, alpha=6, init=init))
    model = load_packed(base, config, 64, torch.device("cpu"))
    plain = model(BATCH)
    add_adapter(model, config, 0)
    assert torch.equal(model(BATCH), plain)
    model(BATCH).sum().backward()
    up = model.causal_lm.get_parameter("model.layers.0.self_attn.k_proj.lora_B.default.weight")
    assert up.shape == (16, 20)
    assert up.grad is not None
    assert up.grad[:, :16].abs().min() > 0
    assert not up.grad[:, 16:].any()
    write_initial(model.causal_lm, TRAINED, tmp_path / "initial")
    initial = AdapterWeights.of_folder(tmp_path / "initial")
    layer = "model.layers.0.self_attn.k_proj"
    weight = model.causal_lm.get_submodule(layer).base_layer.weight
    if init == "pissa":  # all factors of the weight
        torch.testing.assert_close(initial.merged(layer, torch.zeros_like(weight)), weight)


def test_the_difference_is_one_adapter_of_the_original_base(base: Path, tmp_path: Path) -> None:
    model = started(base, "pissa")
    write_initial(model.causal_lm, TRAINED, tmp_path / "initial")
    torch.manual_seed(1)
    trained = {name: weight for name, weight in model.causal_lm.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.05 * torch.randn(weight.shape))
    own = AdapterWeights.of_model(
        model.causal_lm.peft_config[TRAINED], trained, lambda name: trained[name].detach()
    )
    initial = AdapterWeights.of_folder(tmp_path / "initial")
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", *stack([(1.0, own), (-1.0, initial)]))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = plain_logps(PeftModel.from_pretrained(plain, tmp_path / "out"), PAIRS)
    torch.testing.assert_close(found, model(BATCH), atol=1e-4, rtol=1e-4)
    again = started(base, "pissa", tmp_path / "initial")
    first = dict(started(base, "pissa").causal_lm.named_parameters())
    assert all(torch.equal(first[name], weight) for name, weight in again.causal_lm.named_parameters())


def test_singular_vectors_above_the_adapter_of_a_start(base: Path, tmp_path: Path) -> None:
    sft = write_sft_adapter(base, tmp_path / "sft")
    plain = load_packed(base, ModelConfig(str(base), dtype=Dtype.fp32), 64, torch.device("cpu"))
    load_adapter(plain, sft)
    adapter = AdapterConfig(r=3, alpha=6, init="pissa", path=str(sft), on_top=True)
    config = ModelConfig(str(base), dtype=Dtype.fp32, adapter=adapter)
    model = load_packed(base, config, 64, torch.device("cpu"))
    add_adapter(model, config, 0, sft)
    started = model(BATCH)
    assert torch.equal(started, plain(BATCH))
    initial = tmp_path / "initial"
    write_initial(model.causal_lm, TRAINED, initial)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * weight.requires_grad)
    moved = model(BATCH)
    assert (moved - started).abs().max() > 0.01
    with adapter_off(model):
        assert torch.equal(model(BATCH), started)
    trained = AdapterWeights.of_model(
        model.causal_lm.peft_config[TRAINED],
        (weights := {name.removeprefix("causal_lm."): weight for name, weight in model.state_dict().items()}),
        weights.__getitem__,
    )
    parts = [(-1.0, AdapterWeights.of_folder(initial)), (1.0, AdapterWeights.of_folder(sft))]
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", *stack([(1.0, trained), *parts]))
    scored = load_packed(base, ModelConfig(str(base), dtype=Dtype.fp32), 64, torch.device("cpu"))
    load_adapter(scored, tmp_path / "out")
    torch.testing.assert_close(scored(BATCH), moved, atol=1e-5, rtol=1e-5)


def test_damaged_initial_values_are_refused(base: Path, tmp_path: Path) -> None:
    """Before another function is trained from a checkpoint."""
    initial = tmp_path / "initial"
    write_initial(started(base, "pissa").causal_lm, TRAINED, initial)
    file = initial / "adapter_model.safetensors"
    content, values = file.read_bytes(), load_file(file)
    (first, *_) = values
    for damage in (
        lambda: file.write_bytes(content[:-1]),
        lambda: save_file({name: value for name, value in values.items() if name != first}, file),
        lambda: save_file(values | {first: values[first][:1].clone()}, file),
        file.unlink,
    ):
        damage()
        with pytest.raises(ConfigError, match="initial values of the adapter are damaged"):
            started(base, "pissa", initial)
