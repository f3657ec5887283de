"""A checkpoint as a model folder: the weights of any world, in the model's precision, whole or not at all."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import STATE
from dpo_dist.config.schema import (
    AdapterConfig,
    AdapterVariant,
    Dtype,
    ExportConfig,
    ExportedWeights,
    ImagesConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
    TrainedImageParts,
)
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.text.template import ChatTemplate
from dpo_dist.distributed.checkpoint.saver import MANIFEST
from dpo_dist.distributed.checkpoint.slices import Entries, ModelSlices, Slice, write_slices
from dpo_dist.foundation.errors import CheckpointError, ConfigError
from dpo_dist.model.architectures import auto_class
from dpo_dist.model.files.load import TORCH_DTYPES, load_config, load_packed, without_weights
from dpo_dist.model.files.save import write_description, write_weights
from dpo_dist.model.lora import add_adapter
from dpo_dist.reference.digest import description_digest, digest_model
from dpo_dist.reference.model_source import find_model
from dpo_dist.tools.report.card import model_card
from dpo_dist.training import export as checkpoint_export
from dpo_dist.training.export import export_checkpoint
from tests.support import tiny
from tests.support.families import COMMON, LOW_RANK, ROUTED, tiny_family
from tests.support.multimodal import IMAGE_MODELS, write_multimodal
from tests.support.precision import DTYPES
from tests.support.tiny_model import write_model
from tests.unit.tools.test_card import summary

pytestmark = pytest.mark.slow

RANKS = 3
# Dropout, values of another release, options of generation where old ones had them, a name of the authors.
AUTHORS = {"attention_dropout": 0.1, "transformers_version": "4.41.0", "use_cache": False, "temperature": 0.7}
AUTHORS |= {"own_note": [1]}
GENERATION = {"do_sample": False, "temperature": 0.3, "eos_token_id": [3, 4]}
END = tiny.qwen().eos_token_id


def weights_of(config: RunConfig, start: Path | None = None) -> dict[str, Tensor]:
    """New float32 master weights of the model that `config` trains."""
    model = load_packed(Path(config.model.path), config.model, 64, torch.device("cpu"))
    if config.model.adapter is not None:
        add_adapter(model, config.model, 0, start)
    torch.manual_seed(7)
    named = model.causal_lm.named_parameters()
    return {name: torch.randn(weight.shape) for name, weight in named if weight.requires_grad}


def cut(weights: dict[str, Tensor], rank: int) -> Iterator[Slice]:
    for name, weight in weights.items():
        size = -(-weight.numel() // RANKS)
        part = weight.flatten()[rank * size : (rank + 1) * size].clone()
        if part.numel():
            yield Slice(name, tuple(weight.shape), rank * size, {"weight": part, "exp_avg": -part})


def checkpoint_of(
    weights: dict[str, Tensor], folder: Path, config: RunConfig, start: Path | None = None
) -> Path:
    """A checkpoint of a run that started from the files of `config` as they are now."""
    folder.mkdir()
    base = Path(config.model.path)
    state = {"description": description_digest(config.model, base, start), "base": digest_model(base).base}
    (folder / STATE).write_text(json.dumps(state))
    entries: Entries = {}
    for rank in range(RANKS):
        entries |= write_slices(ModelSlices("engine", list(cut(weights, rank))), folder, rank)
    (folder / MANIFEST).write_text(json.dumps(entries))
    return folder


def exported(config: RunConfig, out: Path, start: Path | None = None, **options: Any) -> dict[str, Tensor]:
    """Export new weights of a run to `out`; return them."""
    weights = weights_of(config, start)
    checkpoint = out.with_name(f"{out.name} of step-000001")
    export_checkpoint(checkpoint_of(weights, checkpoint, config, start), out, config, **options)
    return weights


def run_of(folder: Path, *, export: ExportConfig | None = None, **model: Any) -> RunConfig:
    reference = ReferenceConfig(store=f"{folder} store")
    return RunConfig(
        model=ModelConfig(path=str(folder), **model), reference=reference, export=export or ExportConfig()
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = write_model(tmp_path_factory.mktemp("base"), tied=False)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    described = json.loads((folder / "config.json").read_text()) | AUTHORS
    described["torch_dtype"] = described.pop("dtype")
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_several_ranks_become_a_model_in_its_precision(
    dtype: Dtype, base: Path, tmp_path: Path
) -> None:
    weights = exported(run_of(base, dtype=dtype), tmp_path / "out", card=lambda loader: f"A card of {loader}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    wanted = TORCH_DTYPES[dtype]
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype is wanted
        if dtype is Dtype.bf16:  # one of its neighbours
            assert torch.allclose(found[name].float(), weight, rtol=2**-7, atol=0), name
        else:
            assert torch.equal(found[name], weight.to(wanted)), name
    described, own = (json.loads((one / "config.json").read_text()) for one in (tmp_path / "out", base))
    del own["torch_dtype"]
    assert described == own | {"dtype": str(wanted).removeprefix("torch.")}
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == GENERATION | {"eos_token_id": [3, 4, END]}
    assert (tmp_path / "out" / "README.md").read_text() == "A card of AutoModelForCausalLM"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == model.config.vocab_size


def test_a_part_that_names_a_precision_gets_that_of_the_weights(tmp_path: Path) -> None:
    parts = {"text_config": {"torch_dtype": "bfloat16"}, "vision_config": {"depth": 1}}
    write_description(tmp_path / "config.json", {"transformers_weights": "a"} | parts, torch.float16)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == parts | {"text_config": {"dtype": "float16"}, "dtype": "float16"}


def test_an_adapter_needs_no_weights_of_its_base(base: Path, tmp_path: Path) -> None:
    config = run_of(base, dtype=Dtype.fp32, adapter=AdapterConfig(r=2, alpha=4))
    weights = weights_of(config)
    checkpoint = checkpoint_of(weights, tmp_path / "step-000001", config)
    whole = base / "model.safetensors"
    whole.rename(tmp_path / "elsewhere")
    try:
        export_checkpoint(checkpoint, tmp_path / "out", config)
    finally:
        (tmp_path / "elsewhere").rename(whole)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    found = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_exported_adapter_names_its_base_which_no_other_replaces(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    config = run_of(folder, dtype=Dtype.fp32, adapter=AdapterConfig(r=2))
    exported(config, tmp_path / "out")
    find_model(str(tmp_path / "out"), config.model, tmp_path / "store", "compare.models")
    write_model(folder, seed=1)
    with pytest.raises(CheckpointError, match="base of this model is not the one"):
        find_model(str(tmp_path / "out"), config.model, tmp_path / "store", "compare.models")


def test_a_folder_with_other_weights_than_the_trained_ones_is_refused(base: Path, tmp_path: Path) -> None:
    adapted = run_of(base, dtype=Dtype.fp32, adapter=AdapterConfig(r=2))
    weights = weights_of(adapted)
    next(iter(weights.values()))[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        export_checkpoint(
            checkpoint_of(weights, tmp_path / "step-000001", adapted), tmp_path / "adapter", adapted
        )

    def change(folder: Path, causal_lm: Any, weights: dict[str, Tensor], base: Path) -> None:
        write_weights(folder, causal_lm, {name: weight + 1 for name, weight in weights.items()}, base)

    with (
        mock.patch.object(checkpoint_export, "write_weights", change),
        pytest.raises(CheckpointError, match="differ from the trained ones"),
    ):
        exported(run_of(base), tmp_path / "whole")
    assert not {"adapter", "whole"} & {path.name for path in tmp_path.iterdir()}


def test_a_damaged_or_foreign_checkpoint_writes_nothing(base: Path, tmp_path: Path) -> None:
    config = run_of(base)
    checkpoint = checkpoint_of(weights_of(config), tmp_path / "step-000001", config)
    other = replace(config, model=replace(config.model, adapter=AdapterConfig(r=2)))
    with pytest.raises(CheckpointError, match="are not the ones that this configuration trains"):
        export_checkpoint(checkpoint, tmp_path / "out", other)
    (victim, *_) = checkpoint.rglob("*.safetensors")
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        export_checkpoint(checkpoint, tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_other_weights_than_the_trained_ones_or_a_full_disk_leave_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(base)
    checkpoint = checkpoint_of(weights_of(config), tmp_path / "step-000001", config)

    def write_other(folder: Path, causal_lm: Any, weights: dict[str, Tensor], *rest: Any) -> None:
        weights["lm_head.weight"][0] += 1
        write_weights(folder, causal_lm, weights, *rest)

    full = Mock(side_effect=OSError(28, "No space left on device"))
    for write, fault in (
        (write_other, "weights of the written folder differ"),
        (full, "No space left on device"),
    ):
        monkeypatch.setattr(checkpoint_export, "write_weights", write)
        with pytest.raises(CheckpointError, match=fault):
            export_checkpoint(checkpoint, tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def files_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    return found


def assert_merged_as_by_peft(
    base: Path, adapter: AdapterConfig, folder: Path, images: ImagesConfig | None = None
) -> None:
    """A merged export is peft's merge of the exported adapter, in files with the names of the base."""
    config = run_of(base, dtype=Dtype.fp32, adapter=adapter, images=images)
    checkpoint = checkpoint_of(weights_of(config), folder / "step-000001", config)
    export_checkpoint(checkpoint, folder / "adapter", config)
    export_checkpoint(checkpoint, folder / "merged", replace(config, export=ExportConfig(merge=True)))
    kind = auto_class(AutoConfig.from_pretrained(base), False)
    plain = kind.from_pretrained(base, dtype=torch.float32)
    oracle = PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload().state_dict()
    merged = kind.from_pretrained(folder / "merged", dtype="auto").state_dict()
    assert merged.keys() == oracle.keys()
    for name, weight in oracle.items():
        torch.testing.assert_close(merged[name], weight, atol=1e-5, rtol=1e-5)
    assert files_of(folder / "merged") == files_of(base)


LORA, RS_LORA, DORA = (AdapterConfig(r=2, alpha=3, variant=variant) for variant in AdapterVariant)
WHOLE = replace(LORA, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"])

MERGED = {
    "LoRA": (LORA, True),
    "rsLoRA, untied": (RS_LORA, False),
    "DoRA, untied": (DORA, False),
    "whole modules": (WHOLE, True),
    "whole modules, untied": (WHOLE, False),
}


@pytest.mark.parametrize(("adapter", "tied"), MERGED.values(), ids=MERGED)
def test_a_merged_adapter_is_pefts_merge_with_the_names_of_the_base(
    adapter: AdapterConfig, tied: bool, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", tied=tied)
    settings = {"temperature": 0.5, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(settings))
    assert_merged_as_by_peft(base, adapter, tmp_path)
    described, own = (json.loads((one / "config.json").read_text()) for one in (tmp_path / "merged", base))
    assert described == own
    for name in ("merged", "adapter"):
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written == settings | {"eos_token_id": [END]}
    for file in base.glob("tokenizer*"):
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def write_family(folder: Path, family: str, **options: Any) -> Path:
    tokenizer = tiny.qwen()
    torch.manual_seed(0)
    described = AutoConfig.for_model(family, **COMMON | options, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(described, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("phi3", {}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_transposed_fused_and_renamed_weights_are_merged(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = write_family(tmp_path / "base", family, **options)
    assert_merged_as_by_peft(base, DORA, tmp_path)


@pytest.mark.parametrize(("dtype", "wanted"), [(Dtype.fp32, torch.float32), (Dtype.bf16, torch.bfloat16)])
def test_a_merged_model_has_the_precision_of_the_run(
    dtype: Dtype, wanted: torch.dtype, base: Path, tmp_path: Path
) -> None:
    config = run_of(base, dtype=dtype, adapter=AdapterConfig(r=2, alpha=3))
    checkpoint = checkpoint_of(weights_of(config), tmp_path / "step-000001", config)
    export_checkpoint(checkpoint, tmp_path / "out", replace(config, export=ExportConfig(merge=True)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {wanted}


def test_biases_of_routers_are_not_rounded_by_a_merge(tmp_path: Path) -> None:
    """Models load them in float32: a rounded one selects other experts."""
    base = write_family(tmp_path / "base", "deepseek_v3", **LOW_RANK | ROUTED, first_k_dense_replace=1)
    weights = load_file(base / "model.safetensors")
    (name,) = (name for name in weights if "e_score" in name)
    bias = torch.linspace(7, 7.01, len(weights[name]))
    save_file(weights | {name: bias}, base / "model.safetensors", {"format": "pt"})
    adapter = AdapterConfig(r=2, alpha=3, target_modules=["o_proj"])
    config = run_of(base, dtype=Dtype.bf16, adapter=adapter, export=ExportConfig(merge=True))
    exported(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found.pop(name), bias)
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}


def test_a_checkpoint_without_a_moving_average_has_none(base: Path, tmp_path: Path) -> None:
    config = run_of(base, dtype=Dtype.fp32, export=ExportConfig(weights=ExportedWeights.ema))
    with pytest.raises(ConfigError, match=r"only checkpoints of runs with trainer\.ema_decay"):
        exported(config, tmp_path / "out")


FILES = ("special_tokens_map.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Layers that predict further tokens, which no class reads.
FURTHER = {"mtp.fc.weight": torch.ones(4, 3), "mtp.layers.0.mlp.gate.weight": torch.ones(2, 3)}
FURTHER = {name: tensor.bfloat16() for name, tensor in FURTHER.items()}


def write_base(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model that reads images with the files that others have, in float32 or another precision."""
    write_multimodal(folder, model_type, len(tiny.qwen()))
    if dtype is not torch.float32:
        AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    if model_type.startswith("qwen3_5"):
        save_file(
            load_file(folder / "model.safetensors") | FURTHER, folder / "model.safetensors", {"format": "pt"}
        )
    (folder / "generation_config.json").unlink()
    tiny.qwen().save_pretrained(folder)
    for name in (*FILES, *PROCESSORS):
        (folder / name).write_text(f'{{"eos_token": "<|im_end|>", "of": "{name}"}}')
    return folder


ALL, FROZEN = ImagesConfig(TrainedImageParts.tower), ImagesConfig()
PROJECTOR = ImagesConfig(TrainedImageParts.projector)


@pytest.mark.parametrize(
    ("model_type", "images"),
    [
        *((model_type, None) for model_type in IMAGE_MODELS),
        *((model_type, ALL) for model_type in ("gemma3", "qwen3_5", "qwen3_vl")),
        ("gemma4", PROJECTOR),
        ("mistral3", FROZEN),
    ],
)
def test_a_model_that_reads_images_is_whole_again(
    model_type: str, images: ImagesConfig | None, tmp_path: Path
) -> None:
    """It has every tensor of its base, those that are not trained to the last bit, its class and files."""
    base, out = write_base(tmp_path / "base", model_type), tmp_path / "out"
    config = run_of(base, dtype=Dtype.fp32, images=images)
    trained = exported(config, out)
    model, report = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ in json.loads((out / "config.json").read_text())["architectures"]
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in trained.items())
    former = dict(AutoModelForImageTextToText.from_pretrained(base, dtype="auto").named_parameters())
    assert former.keys() >= trained.keys()
    assert all(torch.equal(weights[name], former[name]) for name in former.keys() - trained.keys())
    own, written = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert files_of(out) == files_of(base)
    assert all(torch.equal(written[name], own[name]) for name in own.keys() & FURTHER.keys())
    for file in ("config.json", *FILES, *PROCESSORS):
        assert json.loads((out / file).read_text()) == json.loads((base / file).read_text())
    stops = model.generation_config.eos_token_id
    assert END in (stops if isinstance(stops, list) else [stops])


@pytest.mark.parametrize(
    ("model_type", "adapter"),
    [
        ("gemma3", "rsLoRA, untied"),
        ("llama4", "LoRA"),
        ("mistral3", "whole modules"),
        ("mllama", "LoRA"),
        ("qwen3_5", "LoRA"),
        ("qwen3_vl", "DoRA, untied"),
    ],
)
def test_an_adapter_of_a_model_that_reads_images_is_one_of_its_class(
    model_type: str, adapter: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", model_type)
    assert_merged_as_by_peft(base, MERGED[adapter][0], tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter").state_dict()
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = {name: weight for name, weight in loaded.items() if "lora_B" in name}
    assert found
    assert all(weight.any() for weight in found.values())
    assert len(found) == sum("lora_B" in name for name in written)
    assert_card_loads(
        tmp_path / "adapter", run_of(base, dtype=Dtype.fp32, adapter=MERGED[adapter][0]), loaded
    )
    for file in (*FILES, *PROCESSORS):
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes()


@pytest.mark.parametrize(
    ("model_type", "projector", "layer"),
    [("gemma3", "multi_modal_projector", "fc1"), ("qwen3_vl", "merger", "qkv")],
)
def test_an_adapter_with_parts_for_images_merges_and_goes_on(
    model_type: str, projector: str, layer: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", model_type)
    adapter = replace(LORA, target_modules=["q_proj", layer], modules_to_save=[projector])
    assert_merged_as_by_peft(base, adapter, tmp_path, FROZEN)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(f".{projector}." in name for name in written)
    assert any(f".{layer}.lora_B" in name for name in written)
    go_on = run_of(base, dtype=Dtype.fp32, adapter=AdapterConfig(path="-"), images=FROZEN)
    model = load_packed(base, go_on.model, 64, torch.device("cpu"))
    add_adapter(model, go_on.model, 0, tmp_path / "adapter")
    found = {
        re.sub(r"\.(default|modules_to_save)(?=\.)", "", name): weight
        for name, weight in model.causal_lm.named_parameters()
        if weight.requires_grad
    }
    assert {f"base_model.model.{name}" for name in found} == written.keys()
    assert all(torch.equal(weight, written[f"base_model.model.{name}"]) for name, weight in found.items())


def assert_card_loads(folder: Path, config: RunConfig, expected: dict[str, Tensor]) -> None:
    """The code of the model card loads these tensors from the folder."""
    config = replace(config, data=replace(config.data, train=[SourceConfig("a.jsonl")]))
    content = {**summary(["a"], []), "settings": settings(config)}
    text = model_card(config, content, {}, {}, "AutoModelForImageTextToText")
    code = text.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace("'.'", repr(str(folder))), found)
    assert END in found["model"].generation_config.eos_token_id
    weights = found["model"].state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_an_adapter_of_other_layers_than_those_of_the_class_is_refused_with_what_helps(
    tmp_path: Path,
) -> None:
    """One that peft wrote on the class goes on."""
    base, text = write_base(tmp_path / "base", "qwen3_5"), write_base(tmp_path / "text", "qwen3_5")
    described = json.loads((base / "config.json").read_text()) | {"architectures": ["Qwen3_5ForCausalLM"]}
    (text / "config.json").write_text(json.dumps(described))
    exported(run_of(text, dtype=Dtype.fp32, adapter=LORA), tmp_path / "of_text")
    for name, targets in (
        ("of_class", r".*language_model.*(q_proj|up_proj)"),
        ("of_images", ["qkv", "q_proj"]),
    ):
        model = AutoModelForImageTextToText.from_pretrained(base)
        get_peft_model(model, LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / name)

    def start(folder: Path, adapter: str) -> Any:
        config = ModelConfig(path=str(folder), adapter=AdapterConfig(path=str(tmp_path / adapter)))
        return without_weights(load_config(folder, config), config, tmp_path / adapter)

    for name, layer in (("of_text", "model.layers.0"), ("of_images", "model.visual")):
        with pytest.raises(ConfigError, match="cannot be added") as error:
            start(base, name)
        assert layer in error.value.got
        assert "Qwen3_5ForConditionalGeneration" in error.value.expected
        assert "architectures" in error.value.remedy
    for folder, name in ((text, "of_text"), (base, "of_class")):
        assert any(weight.requires_grad for weight in start(folder, name).parameters())
        weights_of(run_of(folder, dtype=Dtype.fp32, adapter=AdapterConfig(path="-")), tmp_path / name)


SIMPLE, FOR_TOOLS = tiny.CHATML, "{{ tools | tojson }}" + tiny.CHATML


@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates"])
def test_with_a_template_of_the_run_the_written_model_has_no_other(place: str, tmp_path: Path) -> None:
    base, out, own = write_base(tmp_path / "base", "gemma3"), tmp_path / "out", tmp_path / "own.jinja"
    own.write_text("OWN " + SIMPLE)
    stored = {"default": SIMPLE, "tool_use": FOR_TOOLS, "rag": "RAG " + SIMPLE}
    expected = own.read_text()
    if place == "tokenizer_config.json":
        (base / "chat_template.jinja").unlink()
        described = json.loads((base / place).read_text())
        described["chat_template"] = [{"name": name, "template": text} for name, text in stored.items()]
        (base / place).write_text(json.dumps(described))
        (base / "chat_template.json").write_text(json.dumps({"chat_template": FOR_TOOLS}))
    else:
        (base / place).mkdir()
        for name in ("tool_use", "rag"):
            (base / place / f"{name}.jinja").write_text(stored[name])
    (base / "processor_config.json").write_text(json.dumps({"chat_template": FOR_TOOLS, "size": 3}))
    config = replace(run_of(base, dtype=Dtype.fp32), data=DataConfig(chat_template=str(own)))
    exported(config, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert {tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])} == {expected}
    # The same run continues from it.
    assert ChatTemplate(tokenizer, str(own)).text(with_tools=True) == expected
    assert json.loads((out / "processor_config.json").read_text()) == {"size": 3}
    written = [
        text for file in out.rglob("*") if file.suffix in (".json", ".jinja") for text in [file.read_text()]
    ]
    others = [text for text in stored.values() if text != expected]
    assert not any(
        text in content or json.dumps(text) in content
        for text in others
        for content in written
        if text != SIMPLE
    )


@pytest.mark.parametrize("model_type", ["florence2", "siglip"])
def test_a_model_that_writes_no_text_alone_is_refused_as_such(model_type: str) -> None:
    with pytest.raises(ConfigError, match="no model that continues text"):
        without_weights(AutoConfig.for_model(model_type), ModelConfig("m"))


@pytest.mark.parametrize("run", [Dtype.fp32, Dtype.bf16])
def test_all_weights_of_a_model_that_reads_images_have_one_precision(run: Dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3_5", torch.bfloat16)
    exported(run_of(base, dtype=run), tmp_path / "out")
    own, found = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    wanted = torch.float32 if run is Dtype.fp32 else torch.bfloat16
    assert own.keys() == found.keys()
    assert {weight.dtype for weight in found.values()} == {wanted}
    kept = [name for name in own if "visual" in name or name in FURTHER]
    assert all(torch.equal(found[name], own[name].to(wanted)) for name in kept)


@pytest.mark.parametrize("model_type", ["gpt2", "glm4_moe"])
def test_no_weight_of_the_base_stands_for_a_trained_one_whose_name_the_class_ignores(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern for a buffer of GPT-2 also fits a bias, one for a further layer a layer of a larger model."""
    base, out = write_model(tmp_path / "base"), tmp_path / "out"
    causal_lm = tiny_family(model_type, len(tiny.qwen()))
    causal_lm.save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}  # as on the hub
    further = {} if model_type == "gpt2" else {"model.layers.2.norm.weight": torch.ones(3)}
    save_file(weights | further, base / "model.safetensors", {"format": "pt"})
    if further:
        patterns = [r"model\.layers\.1.*", r"model\.layers\.2.*"]
        monkeypatch.setattr(type(causal_lm), "_keys_to_ignore_on_load_unexpected", patterns)
        adapter = replace(LORA, target_modules=["q_proj"])
        assert_merged_as_by_peft(base, adapter, tmp_path)
    trained = exported(run_of(base, dtype=Dtype.fp32), out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in trained.items())
    assert files_of(out).keys() >= further.keys()


def test_a_text_model_that_config_json_names_is_written_without_the_files_of_images(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base", "qwen3_5"), tmp_path / "out"
    described = json.loads((base / "config.json").read_text()) | {"architectures": ["Qwen3_5ForCausalLM"]}
    (base / "config.json").write_text(json.dumps(described))
    trained = exported(run_of(base, dtype=Dtype.fp32), out)
    assert files_of(out).keys() == trained.keys()
    assert not any((out / name).exists() for name in PROCESSORS)
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "Qwen3_5ForCausalLM"
