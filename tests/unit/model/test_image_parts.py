"""Towers and projectors of models that read images: kept, frozen or trained, adapted, never quantized."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from dpo_dist.config.schema import (
    AdapterConfig,
    Dtype,
    ImagesConfig,
    ModelConfig,
    Quantization,
    RunConfig,
    TrainedImageParts,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.load import (
    check_same_vocabulary,
    load_config,
    load_packed,
    without_weights,
)
from dpo_dist.model.files.save import write_adapter
from dpo_dist.model.layers import decoder_layers, image_weights, keep_text, text_notes
from dpo_dist.model.lora import adapted_layers, add_adapter
from dpo_dist.training.start.footprint import Shapes, quantized_weights
from tests.support.image_processors import image_tokenizer, processor_of, write_processor
from tests.support.invented_images import READERS as FAMILIES
from tests.support.invented_images import image_examples, image_reader, invented_images, row_logps
from tests.support.multimodal import IMAGE_MODELS, write_multimodal
from tests.support.packing import VOCABULARY
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FP32 = ModelConfig(dtype=Dtype.fp32)
NONE, PROJECTOR, TOWER = TrainedImageParts
# What lies between the tower and the text model of each family; `visual` has all parts of an image.
MERGER = {"model.visual": ("model.visual.merger", "model.visual.deepstack_merger_list")}
SEPARATE = {"model.vision_tower": (), "model.multi_modal_projector": ("model.multi_modal_projector",)}
PARTS: dict[str, dict[str, tuple[str, ...]]] = dict.fromkeys(
    ("gemma3", "internvl", "llava", "mistral3"), SEPARATE
)
PARTS |= {"gemma4": {"model.vision_tower": (), "model.embed_vision": ("model.embed_vision",)}}
READERS = [name for name in IMAGE_MODELS if name not in ("mllama", "llama4", "lfm2_vl")]
# Weights of towers behind the layer from which features come.
UNREAD = {
    "gemma3": ("model.vision_tower.head",),
    "llava": ("model.vision_tower.encoder.layers.0", "model.vision_tower.post_layernorm"),
}


def config_of(folder: Path, train: TrainedImageParts = NONE, **options: Any) -> ModelConfig:
    return ModelConfig(str(folder), dtype=Dtype.fp32, images=ImagesConfig(train), **options)


def load(config: ModelConfig) -> Any:
    return load_packed(Path(config.path), config, 64, CPU).causal_lm


def names_of(causal_lm: Any, *, trained: bool) -> set[str]:
    return {name for name, weight in causal_lm.named_parameters() if weight.requires_grad is trained}


@pytest.mark.parametrize("model_type", READERS)
def test_parts_for_images_stay_and_are_frozen_or_trained_as_asked(model_type: str, tmp_path: Path) -> None:
    folder, parts = write_multimodal(tmp_path, model_type, VOCABULARY), PARTS.get(model_type, MERGER)
    text = load(replace(config_of(folder), images=None))
    for train in TrainedImageParts:
        config = config_of(folder, train)
        causal_lm = load(config)
        trained, frozen = (names_of(causal_lm, trained=which) for which in (True, False))
        of_text = {name for name, _ in text.named_parameters()}
        assert of_text <= trained
        of_images = {name for name in (trained | frozen) - of_text if name.startswith(tuple(parts))}
        assert of_images == (trained | frozen) - of_text != set()
        named = tuple(parts) if train is TOWER else sum(parts.values(), ()) if train is PROJECTOR else ()
        unread = UNREAD.get(model_type, ()) if train is TOWER else ()
        expected = {name for name in of_images if any(name.startswith(f"{part}.") for part in named)}
        expected -= {name for name in expected if any(name.startswith(f"{part}.") for part in unread)}
        assert trained - of_text == expected
        assert bool(expected) is (train is not NONE)
        shapes = without_weights(load_config(folder, config), config)
        assert names_of(shapes, trained=True) == trained
        number = sum(weight.numel() for name, weight in causal_lm.named_parameters() if name in expected)
        [note] = text_notes(causal_lm)
        assert f" {number:,} of " in note
        assert all(part.rpartition(".")[2] in note for part in parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_trained_weights_are_those_with_a_gradient(name: str) -> None:
    causal_lm = image_reader(name)
    keep_text(causal_lm, ImagesConfig(TOWER))
    row_logps(causal_lm, image_examples(invented_images(name))).sum().backward()
    of_images = image_weights(causal_lm)
    for weight in causal_lm.parameters():
        assert weight.requires_grad is (weight.grad is not None)
        weight.requires_grad_(True)
    keep_text(causal_lm, ImagesConfig(PROJECTOR))
    trained = {weight for weight in of_images if weight.requires_grad}
    assert set() < trained < of_images


@pytest.mark.parametrize("kind", ["mllama", "text", "text class"])
def test_a_model_that_reads_no_images_in_the_place_of_tokens_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "text":
        write_model(tmp_path)
    else:
        write_multimodal(tmp_path, "mllama" if kind == "mllama" else "qwen3_5", VOCABULARY)
    if kind == "text class":
        described = json.loads((tmp_path / "config.json").read_text())
        named = described | {"architectures": ["Qwen3_5ForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(named))
    config = config_of(tmp_path)
    checks: tuple[Callable[[], Any], ...] = (
        lambda: without_weights(load_config(tmp_path, config), config),
        lambda: load(config),
    )
    for check in checks:
        with pytest.raises(ConfigError, match="does not read images") as error:
            check()
        assert error.value.where == "model.path, model.images"
        assert ("layers of its own" if kind == "mllama" else "only text") in error.value.got


def adapted(folder: Path, **adapter: Any) -> Any:
    config = config_of(folder, adapter=AdapterConfig(r=2, **adapter))
    model = load_packed(folder, config, 64, CPU)
    add_adapter(model, config, 0)
    return model.causal_lm


def layers_of(causal_lm: Any) -> set[str]:
    layers = adapted_layers(causal_lm)
    return {name for name, module in causal_lm.named_modules() if module in layers}


def test_adapters_are_on_language_layers_unless_a_target_means_only_layers_for_images(
    tmp_path: Path,
) -> None:
    folder = write_multimodal(tmp_path, "gemma3", VOCABULARY)
    every, queries = adapted(folder), adapted(folder, target_modules=["q_proj"])
    for causal_lm in (every, queries):
        assert all("language_model" in name for name in layers_of(causal_lm))
    assert len(layers_of(queries)) == len(decoder_layers(queries))
    assert names_of(queries, trained=True) < names_of(every, trained=True)
    both = layers_of(adapted(folder, target_modules=["q_proj", "fc1", "layers.0.self_attn.out_proj"]))
    assert layers_of(queries) < both
    layer = "model.vision_tower.encoder.layers.0"  # not the pooling head, which no feature depends on
    assert both - layers_of(queries) == {f"{layer}.mlp.fc1", f"{layer}.self_attn.out_proj"}


def test_an_adapter_of_others_on_language_layers_adds_none_to_a_tower(tmp_path: Path) -> None:
    """Its configuration has only the ends of names, which a tower's layers have, too."""
    folder = write_multimodal(tmp_path / "base", "gemma3", VOCABULARY)
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    lora = LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=".*vision.*")
    get_peft_model(whole, lora).save_pretrained(tmp_path / "sft")
    written = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(written | {"exclude_modules": None}))
    model = load_packed(folder, config_of(folder), 64, CPU)
    add_adapter(model, config_of(folder, adapter=AdapterConfig(path="-")), 0, tmp_path / "sft")
    assert layers_of(model.causal_lm) == layers_of(adapted(folder, target_modules=["q_proj"]))


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_an_adapter_on_experts_is_continued(model_type: str, tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path / "base", model_type, VOCABULARY)
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    first = adapted(folder, target_modules=targets)
    trained = {name: weight for name, weight in first.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        nn.init.normal_(weight)
    write_adapter(tmp_path / "sft", first, trained, torch.float32)
    model = load_packed(folder, config_of(folder), 64, CPU)
    add_adapter(model, config_of(folder, adapter=AdapterConfig(path="-")), 0, tmp_path / "sft")
    continued = dict(model.causal_lm.named_parameters())
    assert names_of(model.causal_lm, trained=True) == trained.keys()
    assert all(torch.equal(weight, continued[name]) for name, weight in trained.items())


@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("gemma3", "multi_modal_projector"),
        ("qwen3_vl", "merger"),
        ("llava", "multi_modal_projector.linear_2"),
    ],
)
def test_an_adapter_can_have_a_copy_of_the_projector(model_type: str, module: str, tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path, model_type, VOCABULARY)
    causal_lm = adapted(folder, modules_to_save=[module])
    copies = {name for name in names_of(causal_lm, trained=True) if ".lora_" not in name}
    plain = {name.replace("modules_to_save.default.", "") for name in copies}
    own = dict(load(config_of(folder)).named_parameters())
    assert plain == {name for name in own if f".{module}." in name} != set()
    assert not any(module in name for name in layers_of(causal_lm))


@pytest.mark.parametrize("quantization", [None, Quantization.nf4])
def test_towers_keep_their_precision_and_lose_their_dropout(
    quantization: Quantization | None, tmp_path: Path
) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # else wrong in 4 bits on CPUs
    folder = write_multimodal(tmp_path, "llava", VOCABULARY, **wide)
    described = json.loads((folder / "config.json").read_text())
    described["vision_config"]["attention_dropout"] = 0.5
    (folder / "config.json").write_text(json.dumps(described))
    causal_lm = load(config_of(folder, quantization=quantization))
    assert causal_lm.config.vision_config.attention_dropout == 0
    linear = {name: module for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, module in linear.items() if not module.weight.is_floating_point()}
    of_text = {name for name in linear if name.startswith("model.language_model.")}
    assert quantized == (of_text if quantization else set())


def test_a_trained_tower_is_checkpointed_with_the_text_model_and_a_frozen_one_is_not(tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path, "gemma3", VOCABULARY)
    for train in (NONE, TOWER):
        causal_lm = load(config_of(folder, train, gradient_checkpointing="full"))
        assert all(layer.gradient_checkpointing for layer in decoder_layers(causal_lm))
        [block] = causal_lm.model.vision_tower.encoder.layers
        assert block.gradient_checkpointing is (train is TOWER)


def test_a_reference_reads_images_by_the_policys_processor(tmp_path: Path) -> None:
    processor = processor_of(tmp_path / "policy", "qwen2_5_vl")
    tokenizer, config = image_tokenizer("qwen2_5_vl"), config_of(tmp_path / "policy")
    same = write_processor(tmp_path / "same", "qwen2_5_vl")
    other = write_processor(tmp_path / "other", "qwen2_5_vl", image_mean=[0.5, 0.5, 0.5])
    check_same_vocabulary(same, tokenizer, config, processor)
    check_same_vocabulary(other, tokenizer, replace(config, images=None), None)
    with pytest.raises(ConfigError, match="reads images in another way") as error:
        check_same_vocabulary(other, tokenizer, config, processor)
    assert error.value.where == "reference.path, model.images"
    for file in other.glob("*processor_config.json"):
        file.unlink()
    check_same_vocabulary(other, tokenizer, config, processor)


def test_memory_counts_towers_whole_and_that_of_a_trained_one_is_not_known(tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path, "gemma3", VOCABULARY)
    text = without_weights(load_config(folder, FP32), FP32)
    weights = {}
    for train in (NONE, TOWER):
        config = config_of(folder, train)
        needs = Shapes(
            RunConfig(model=config), without_weights(load_config(folder, config), config)
        ).footprint(1)
        assert (needs.per_token is None) is (train is TOWER)
        weights[train] = needs.parts["weights"]
        assert weights[train] > Shapes(RunConfig(model=FP32), text).footprint(1).parts["weights"]
    assert weights[NONE] == weights[TOWER]
    quantized = without_weights(load_config(folder, config_of(folder)), config_of(folder)).requires_grad_(
        False
    )
    assert quantized_weights(quantized) == quantized_weights(text.requires_grad_(False))
