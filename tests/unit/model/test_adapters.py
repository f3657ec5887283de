"""LoRA adapters: their layers and modules, the base without them, starts from others, files as of peft."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_dist.config.schema import AdapterConfig, AdapterVariant, Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.folder import base_warnings, start_folder, tokenizer_folder
from dpo_dist.model.files.load import load_packed, without_weights
from dpo_dist.model.files.save import write_merged
from dpo_dist.model.lora import adapted_layers, adapter_off, add_adapter
from dpo_dist.model.packed import LogpHead, PackedCausalLM
from dpo_dist.reference.digest import digest_model
from tests.support.families import tiny_family
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.support.remedies import words_to_write
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model
from tests.support.written import write_trained

pytestmark = pytest.mark.slow


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PAIR = ["embed_tokens", "lm_head"]
PAIRS = random_pairs([(3, 4, 2), (5, 1, 6)])
BATCH = pack_unkeyed(PAIRS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft_adapter(base, tmp_path_factory.mktemp("sft"))


@pytest.fixture
def sft(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "sft")


def config_of(folder: Path, start: Path | None = None, **adapter: Any) -> ModelConfig:
    path = None if start is None else str(start)
    return ModelConfig(str(folder), dtype=Dtype.fp32, adapter=AdapterConfig(path=path, **adapter))


def load(folder: Path) -> PackedCausalLM:
    return load_packed(folder, ModelConfig(str(folder), dtype=Dtype.fp32), 64, CPU)


def adapted(folder: Path, start: Path | None = None, **adapter: Any) -> PackedCausalLM:
    model = load(folder)
    add_adapter(model, config_of(folder, start, **adapter), 0, start)
    return model


def changed(folder: Path, **values: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


@torch.no_grad()
def of_peft(base: Path, adapter: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return plain_logps(PeftModel.from_pretrained(model, adapter).eval(), PAIRS)


def adapted_names(model: PackedCausalLM) -> set[str]:
    layers = adapted_layers(model)
    return {name for name, module in model.causal_lm.named_modules() if module in layers}


def saved_names(model: PackedCausalLM) -> set[str]:
    """Trained weights that are no matrices of the adapter."""
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name.removeprefix("causal_lm.") for name in trained if ".lora_" not in name}


def test_layers_are_all_linear_ones_but_the_head_or_those_named_by_their_ends(
    base: Path, tmp_path: Path
) -> None:
    model = adapted(base)
    assert len(adapted_names(model)) == 2 * len(LINEAR)
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == LINEAR
    assert type(model.causal_lm.get_output_embeddings()) is LogpHead
    named = adapted(base, target_modules=["mlp.up_proj", "model.layers.1.self_attn.q_proj"])
    own = {f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)} | {"model.layers.1.self_attn.q_proj"}
    assert adapted_names(named) == own
    targets = named.causal_lm.peft_config["default"].target_modules
    assert targets == sorted(targets)  # peft keeps a set, whose order differs between processes
    pattern = r".*\.(q_proj|up_proj)"
    sft = write_sft_adapter(base, tmp_path / "sft", target_modules=pattern)
    assert adapted(base, sft).causal_lm.peft_config["default"].target_modules == pattern


def test_an_sft_adapter_with_whole_modules_is_start_and_reference(folder: Path, tmp_path: Path) -> None:
    """peft gives embeddings and output layer of a tied base two copies, which are trained apart."""
    sft = write_sft_adapter(folder, tmp_path / "sft", modules_to_save=PAIR)
    files = load_file(sft / "adapter_model.safetensors")
    copies = [files[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head")]
    assert not torch.equal(*copies)
    started = of_peft(folder, sft)
    model = adapted(folder, sft)
    torch.testing.assert_close(model(BATCH), started, atol=1e-5, rtol=1e-5)
    assert len(saved_names(model)) == 2
    before = model(BATCH)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.add_(0.03 * torch.randn_like(weight))
    with adapter_off(model):
        assert torch.equal(model(BATCH), before)
    out = tmp_path / "out"
    weights = {name.removeprefix("causal_lm."): weight for name, weight in model.state_dict().items()}
    write_trained(model.causal_lm, weights, out)
    torch.testing.assert_close(of_peft(folder, out), model(BATCH), atol=1e-5, rtol=1e-5)
    assert (of_peft(folder, out) - started).abs().max() > 0.01


def test_one_of_two_modules_that_share_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    if not load(folder).causal_lm.config.tie_word_embeddings:
        assert len(saved_names(adapted(folder, modules_to_save=["lm_head"]))) == 1
        return
    with pytest.raises(ConfigError, match="share a weight") as refused:
        adapted(folder, modules_to_save=["lm_head"])
    assert refused.value.expected == "model.embed_tokens and lm_head"
    sft = write_sft_adapter(folder, tmp_path / "sft", modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="share a weight"):
        adapted(folder, sft)


def test_a_linear_layer_is_trained_in_full_or_has_matrices(base: Path) -> None:
    model = adapted(base, modules_to_save=["down_proj"])
    assert len(adapted_layers(model)) == 2 * 6
    assert len(saved_names(model)) == 2
    with pytest.raises(ConfigError, match="not a linear layer"):
        adapted(base, modules_to_save=["mlp.down_proj"], target_modules=["down_proj"])


def test_keys_of_an_adapter_that_is_continued_are_refused(base: Path, sft: Path) -> None:
    """As of an experiment that has an adapter of its own."""
    given = {"r": 64, "alpha": 128.0, "variant": AdapterVariant.lora, "target_modules": ["q_proj"]}
    given |= {"modules_to_save": []}
    with pytest.raises(ConfigError, match="keeps its kind and size") as refused:
        start_folder(config_of(base, sft, **given))
    assert set(refused.value.where.split(", ")) == {f"model.adapter.{key}" for key in given}
    assert {*words_to_write(refused.value.remedy)} == {f"model.adapter.{key}=null" for key in given}


@pytest.mark.parametrize(
    ("values", "message", "remedy"),
    [
        ({"peft_type": "IA3"}, "IA3", "merge the adapter"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING", "peft cannot merge"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens", "peft cannot merge"),
        (
            {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            "ensure_weight_tying",
            "merge the adapter",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights", "merge the adapter"),
    ],
)
def test_other_kinds_are_refused(
    values: dict[str, Any], message: str, remedy: str, base: Path, sft: Path
) -> None:
    with pytest.raises(ConfigError, match="this kind of adapter") as refused:
        start_folder(config_of(base, changed(sft, **values)))
    assert message in refused.value.got
    assert remedy in refused.value.remedy


def test_an_adapter_with_other_weights_or_none_is_refused(base: Path, sft: Path, tmp_path: Path) -> None:
    whole = write_sft_adapter(base, tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="this kind of adapter"):
        start_folder(config_of(base, changed(whole, modules_to_save=None)))
    odd = changed(shutil.copytree(sft, tmp_path / "odd"), eva_config=5)  # peft cannot read it
    of_head = write_sft_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    for adapter in (odd, of_head):
        with pytest.raises(ConfigError, match="cannot be added to the model"):
            adapted(base, adapter)
    shallow = AutoConfig.from_pretrained(base, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="cannot be added to the model") as refused:
        without_weights(shallow, config_of(base, sft), sft)
    assert "no linear layers model.layers.1." in refused.value.got
    (sft / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be read"):
        start_folder(config_of(base, sft))
    with pytest.raises(ConfigError, match="a whole model, not an adapter"):
        start_folder(config_of(base, base))


PAGE = Path(__file__).parents[3] / "docs" / "models.md"
OF_MERGING = "head = base.get_output_embeddings()\n"


@pytest.mark.parametrize(
    ("options", "has_tokens"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["lm_head"], "use_dora": True}, False),
        ({"modules_to_save": PAIR}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"trainable_token_indices": {"embed_tokens": [5, 6]}}, True),
    ],
)
def test_the_lines_that_merge_an_adapter_make_the_same_model(
    options: dict[str, Any], has_tokens: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a tied base, where peft's `merge_and_unload` alone would change embeddings and output layer."""
    adapter = write_sft_adapter(base, tmp_path / "ADAPTER", **options)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith(("lora_embedding_A", "trainable_tokens_delta")):  # which start at 0
            weight.add_(0.05 * torch.randn_like(weight))
    save_file(weights, file)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    expected = PeftModel.from_pretrained(plain, adapter)(ids).logits.log_softmax(-1)
    [lines] = [
        part.partition("```")[0] for part in PAGE.read_text().split("```python\n") if OF_MERGING in part
    ]
    lines = lines.replace("bfloat16", "float32").replace("BASE", str(base))
    if has_tokens:
        before, after = lines.split(OF_MERGING)
        lines = before + "\n".join(after.splitlines()[2:])
    monkeypatch.chdir(tmp_path)
    exec(lines, {})  # as a reader does
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "MERGED", dtype=torch.float32)
    torch.testing.assert_close(merged(ids).logits.log_softmax(-1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("target", "is_refused"), [("q_proj", True), ("in_proj", False)])
def test_an_adapter_on_layers_that_share_a_weight_is_not_merged(
    target: str, is_refused: bool, tmp_path: Path
) -> None:
    """Each layer of Zamba2 with attention has matrices of its own on the same weights."""
    tiny_family("zamba2").save_pretrained(tmp_path / "base")
    sft = write_sft_adapter(tmp_path / "base", tmp_path / "sft", target_modules=[target])
    by_peft = of_peft(tmp_path / "base", sft)
    refused = pytest.raises(ConfigError, match=r"layers\.1\..*q_proj and .*layers\.2\.")
    with refused if is_refused else nullcontext():
        write_merged(tmp_path / "merged", tmp_path / "base", sft, torch.float32, trust_remote_code=False)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(plain_logps(merged.eval(), PAIRS), by_peft, atol=1e-5, rtol=1e-5)


def test_dora_has_no_8_bit_base(base: Path, tmp_path: Path) -> None:
    dora = write_sft_adapter(base, tmp_path / "dora", use_dora=True)
    config = config_of(base, dora)
    assert start_folder(replace(config, quantization=Quantization.nf4)) == dora
    with pytest.raises(ConfigError, match="this kind of adapter"):
        start_folder(replace(config, quantization=Quantization.int8))


@pytest.mark.parametrize("named", ["org/Other-7B", "/gone/other/"])
def test_another_base_than_the_adapters_own_is_said(named: str, base: Path, sft: Path) -> None:
    config = config_of(base, sft)
    assert base_warnings(config, sft) == []
    (sft.parent / "link").symlink_to(base)
    for same in (f"org/{base.name.upper()}", f"{sft.parent}/link", "", None):
        assert base_warnings(config, changed(sft, base_model_name_or_path=same)) == []
    (note,) = base_warnings(config, changed(sft, base_model_name_or_path=named))
    assert f"was trained on {named}, but model.path is {base}" in note
    assert base_warnings(ModelConfig(path=str(base)), None) == []


def test_an_adapter_and_its_base_are_the_digest_and_its_tokenizer_the_policys(
    base: Path, sft: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", seed=9)
    found = [digest_model(base), digest_model(base, adapter=sft), digest_model(other, adapter=sft)]
    found.append(digest_model(base, adapter=changed(sft, lora_alpha=16)))
    assert len({files.digest for files in found}) == 4
    assert tokenizer_folder(base, sft) == base
    shutil.copy(base / "tokenizer.json", sft)
    assert tokenizer_folder(base, sft) == sft
