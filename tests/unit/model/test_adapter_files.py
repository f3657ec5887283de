"""The adapter that a policy starts from: which ones are refused, and what is read from its files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.schema import AdapterConfig, AdapterVariant, Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.adapter_files import (
    base_notes,
    check_start,
    start_folder,
    tokenizer_folder,
    trained_adapter,
)
from dpo_dist.model.adapter_weights import read_adapter
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import add_adapter
from dpo_dist.reference.digest import digest_model
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft_adapter(base, tmp_path_factory.mktemp("sft"))


@pytest.fixture
def sft(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "sft")


def changed(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_continued_adapter_is_the_one_on_disk(base: Path, sft: Path) -> None:
    config = ModelConfig(path=str(base), adapter=AdapterConfig(path=str(sft)))
    found = trained_adapter(config, start_folder(config))
    assert found is not None
    assert (found.r, found.alpha, found.variant) == (4, 8.0, AdapterVariant.lora)
    assert len(found.target_modules) == 2 * 3
    assert "model.layers.1.mlp.down_proj" in found.target_modules
    above = replace(config, adapter=AdapterConfig(r=7, path=str(sft), on_top=True))
    assert trained_adapter(above, start_folder(above)) == above.adapter
    without = ModelConfig(path=str(base))
    assert start_folder(without) is None
    assert trained_adapter(without, None) is None


def test_a_configuration_that_peft_cannot_read_is_an_error(sft: Path) -> None:
    changed(sft, eva_config=5)
    with pytest.raises(ConfigError, match="cannot start from this kind of adapter"):
        read_adapter(sft)


@pytest.mark.parametrize("named", ["org/Other-7B", "/gone/other/"])
def test_another_base_than_the_adapters_own_is_said(named: str, base: Path, sft: Path) -> None:
    config = ModelConfig(path=str(base), adapter=AdapterConfig(path=str(sft)))
    assert base_notes(config, start_folder(config)) == []
    for same in (f"org/{base.name.upper()}", "", None):
        changed(sft, base_model_name_or_path=same)
        assert base_notes(config, start_folder(config)) == []
    changed(sft, base_model_name_or_path=named)
    (note,) = base_notes(config, start_folder(config))
    assert f"was trained on {named}, model.path is {base}" in note
    assert base_notes(ModelConfig(path=str(base)), None) == []


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"r": 8}, "r"),
        ({"alpha": 32.0}, "alpha"),
        ({"variant": AdapterVariant.dora}, "variant"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]}, "target_modules"),
    ],
)
def test_keys_that_contradict_the_adapter_are_refused(given: dict[str, Any], key: str, sft: Path) -> None:
    with pytest.raises(ConfigError, match=f"has another {key}") as refused:
        check_start(AdapterConfig(path=str(sft), **given), sft)
    assert refused.value.where == f"model.adapter.{key}"
    check_start(AdapterConfig(path=str(sft), on_top=True, **given), sft)


def test_all_contradictions_in_numbers_are_one_error(sft: Path) -> None:
    """As of an experiment that has an adapter of its own."""
    with pytest.raises(ConfigError, match="has another r, alpha") as refused:
        check_start(AdapterConfig(path=str(sft), r=64, alpha=128), sft)
    assert (refused.value.got, refused.value.expected) == ("64, 128.0", "4, 8.0")
    assert "set model.adapter.r=null model.adapter.alpha=null" in refused.value.remedy


def test_a_given_default_is_not_the_same_as_none(sft: Path) -> None:
    dora = AdapterConfig(path=str(sft), variant=AdapterVariant.lora, modules_to_save=[])
    check_start(dora, sft)
    changed(sft, use_dora=True)
    with pytest.raises(ConfigError, match="has another variant"):
        check_start(dora, sft)
    check_start(AdapterConfig(path=str(sft)), sft)


def test_all_linear_is_compared_with_the_layers_of_the_base(base: Path, sft: Path, tmp_path: Path) -> None:
    def start(folder: Path) -> None:
        adapter = AdapterConfig(path=str(folder), target_modules="all-linear")
        config = ModelConfig(str(base), dtype=Dtype.fp32, adapter=adapter)
        add_adapter(load_packed(base, config, 64, torch.device("cpu")), config, 0, start_folder(config))

    with pytest.raises(ConfigError, match="has another target_modules") as refused:
        start(sft)
    assert refused.value.expected == "down_proj, q_proj, v_proj"
    start(write_sft_adapter(base, tmp_path / "all", target_modules="all-linear"))


def test_dora_on_8_bit_weights_is_refused(base: Path, sft: Path) -> None:
    changed(sft, use_dora=True)
    config = ModelConfig(path=str(base), adapter=AdapterConfig(path=str(sft)))
    start_folder(replace(config, quantization=Quantization.nf4))
    with pytest.raises(ConfigError, match="peft cannot compute from 8-bit ones"):
        start_folder(replace(config, quantization=Quantization.int8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "this kind of adapter"),
        ({"bias": "all"}, "this kind of adapter"),
        ({"trainable_token_indices": [1, 2]}, "this kind of adapter"),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "this kind of adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "whose weights its initialization has changed"),
    ],
)
def test_other_kinds_are_refused(values: dict[str, Any], message: str, sft: Path) -> None:
    changed(sft, **values)
    with pytest.raises(ConfigError, match=message):
        check_start(AdapterConfig(path=str(sft)), sft)


def test_an_adapter_with_other_weights_or_none_is_refused(base: Path, sft: Path, tmp_path: Path) -> None:
    whole = write_sft_adapter(base, tmp_path / "whole", modules_to_save=["lm_head"])
    changed(whole, modules_to_save=None)
    with pytest.raises(ConfigError, match="this kind of adapter"):
        check_start(AdapterConfig(path=str(whole)), whole)
    (sft / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be read"):
        check_start(AdapterConfig(path=str(sft)), sft)
    with pytest.raises(ConfigError, match="is a whole model"):
        start_folder(ModelConfig(path="base", adapter=AdapterConfig(path=str(base))))


def test_dora_has_nothing_above_it(base: Path, tmp_path: Path) -> None:
    dora = write_sft_adapter(base, tmp_path / "dora", use_dora=True)
    check_start(AdapterConfig(path=str(dora)), dora)
    with pytest.raises(ConfigError, match="above DoRA"):
        check_start(AdapterConfig(path=str(dora), on_top=True), dora)


def test_the_digest_is_of_base_and_adapter(base: Path, sft: Path) -> None:
    alone, before = digest_model(base), digest_model(base, adapter=sft)
    assert before.digest != alone.digest
    changed(sft, lora_alpha=16)
    assert digest_model(base, adapter=sft).digest not in (before.digest, alone.digest)


def test_the_adapters_own_tokenizer_is_the_policys(base: Path, sft: Path) -> None:
    assert tokenizer_folder(base, sft) == base
    shutil.copy(base / "tokenizer.json", sft)
    assert tokenizer_folder(base, sft) == sft


@pytest.mark.parametrize("on_top", [False, True], ids=["continued", "below another"])
def test_an_adapter_of_the_output_layer_is_refused(on_top: bool, base: Path, tmp_path: Path) -> None:
    sft = write_sft_adapter(base, tmp_path / "sft", target_modules=["q_proj", "lm_head"])
    config = ModelConfig(str(base), dtype=Dtype.fp32, adapter=AdapterConfig(path=str(sft), on_top=on_top))
    model = load_packed(base, config, 64, torch.device("cpu"))
    with pytest.raises(ConfigError, match="cannot be added to the model"):
        add_adapter(model, config, 0, sft)
