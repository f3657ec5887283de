"""A model folder is found and loaded exactly, without running its code, or an error names its fault."""

import contextlib
import errno
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import _get_resolved_checkpoint_files

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Dtype, ModelConfig, Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.folder import model_folder, weight_files
from dpo_dist.model.files.load import (
    check_same_vocabulary,
    load_config,
    load_packed,
    load_tokenizer,
    load_weights,
    placement,
    without_weights,
)
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.model_source import find_model
from tests.support import tiny
from tests.support.families import tiny_causal_lm, tiny_config, tiny_family
from tests.support.multimodal import IMAGE_MODELS, write_multimodal
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.support.tiny_model import write_model

CPU = torch.device("cpu")
FP32 = ModelConfig(dtype=Dtype.fp32)
PAIRS = random_pairs([(7, 5, 9), (1, 1, 4)])
# The option of phimoe's router is also a threshold in evaluation.
NOISES: dict[str, dict[str, float]] = {
    "gpt2": {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "mixtral": {"router_jitter_noise": 0.5},
    "opt": {"dropout": 0.5},
    "phimoe": {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5},
}


def load(folder: Path, config: ModelConfig = FP32) -> PackedCausalLM:
    return load_packed(folder, config, 64, CPU)


def changed(file: Path, **values: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


def refused(message: str, work: Callable[..., object], *arguments: Any, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError, match=message) as raised:
        work(*arguments, **options)
    return raised.value


@pytest.mark.parametrize("model_type", sorted(NOISES))
def test_a_model_with_noise_in_training_scores_as_it_is_evaluated(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type, **NOISES[model_type])
    tiny_causal_lm(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = load(tmp_path).train()
    with torch.no_grad():
        expected, logps = plain_logps(plain, PAIRS), loaded(pack_unkeyed(PAIRS))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


def test_a_token_that_also_pads_has_the_gradient_of_its_inputs(tmp_path: Path) -> None:
    """Many base models name their end as the padding, of which packed sequences have none."""
    write_model(tmp_path, tied=False)
    token, gradients = int(PAIRS[0].prompt_ids[0]), []
    for padding in (None, token):
        changed(tmp_path / "config.json", pad_token_id=padding)
        model = load(tmp_path)
        model(pack_unkeyed(PAIRS)).sum().backward()
        gradients.append(model.causal_lm.get_input_embeddings().weight.grad)
    assert gradients[0][token].abs().max() > 0
    assert torch.equal(*gradients)


def test_tables_of_positions_keep_where_they_begin(tmp_path: Path) -> None:
    """That of ProphetNet is an embedding with a padding."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "decoder_ffn_dim": 64, "num_decoder_attention_heads": 4}
    config = AutoConfig.for_model(
        "prophetnet", **sizes, num_decoder_layers=1, is_encoder_decoder=False, add_cross_attention=False
    )
    plain = tiny_causal_lm(config)
    plain.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(load(tmp_path).causal_lm(ids).logits, plain(ids).logits)


class FullLog(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_of_the_log_is_no_fault_of_the_model(tmp_path: Path) -> None:
    write_model(tmp_path)
    with contextlib.redirect_stderr(FullLog()):
        error = refused("No space left", load, tmp_path)
    assert error.message == "a file cannot be written or read"


def test_an_evaluation_changes_no_weight(tmp_path: Path) -> None:
    """As RWKV of transformers does, which divides the weights of later layers."""
    causal_lm = tiny_family("rwkv")
    causal_lm.config.rescale_every = 1
    causal_lm.save_pretrained(tmp_path)
    loaded = load(tmp_path).causal_lm.eval()
    before = [weight.detach().clone() for weight in loaded.parameters()]
    loaded(input_ids=torch.tensor([[5, 6, 7]]))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("name", "predicted", "is_refused"),
    [
        ("model.layers.0.self_attn.q_norm.weight", 1, True),
        ("model.norm.bias", 1, True),
        ("model.layers.more.weight", 1, True),
        ("model.layers.2.mlp.up_proj.weight", 0, True),
        ("model.layers.2.mlp.up_proj.weight", 1, False),
        ("v_head.weight", 0, False),
    ],
)
def test_tensors_that_the_architecture_does_not_read_are_refused_or_of_other_modules(
    name: str, predicted: int, is_refused: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A value head; a further layer that predicts further tokens, if config.json has such (DeepSeek-V3)."""
    weights = write_model(tmp_path) / "model.safetensors"
    save_file(load_file(weights) | {name: torch.ones(1, 32)}, weights, metadata={"format": "pt"})
    changed(tmp_path / "config.json", num_nextn_predict_layers=predicted)
    if is_refused:
        assert name in refused("Qwen2ForCausalLM does not read", load, tmp_path).got
    else:
        load(tmp_path)
        assert name in caplog.text


def with_another_head(folder: Path, head: str, **change: float) -> Path:
    """Give a tied model a copy of its embeddings as output layer in a file of its own, with an index."""
    weights = load_file(folder / "model.safetensors")
    (name,) = (each for each in weights if each.endswith(("embed_tokens.weight", "wte.weight")))
    save_file({head: weights[name] + change.get("plus", 0)}, folder / "head.safetensors", {"format": "pt"})
    files = dict.fromkeys(weights, "model.safetensors") | {head: "head.safetensors"}
    (folder / INDEX).write_text(json.dumps(SHARDED | {"weight_map": files}))
    changed(folder / "config.json", transformers_weights=INDEX)
    return folder


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("smollm3", "lm_head.weight"),
        ("gpt2", "lm_head.weight"),
        ("biogpt", "output_projection.weight"),
        ("gemma3", "lm_head.weight"),  # whose files name the embeddings otherwise than the model does
    ],
)
def test_a_head_of_its_own_beside_tied_embeddings_is_refused_unless_it_is_equal(
    model_type: str, head: str, tmp_path: Path
) -> None:
    def written(name: str, **change: float) -> Path:
        folder = tmp_path / name
        if model_type in IMAGE_MODELS:
            write_multimodal(folder, model_type, 64)
        else:
            tiny_causal_lm(tiny_config(model_type)).save_pretrained(folder)
        return with_another_head(folder, head, **change)

    causal_lm = load(written("equal")).causal_lm
    assert causal_lm.get_input_embeddings().weight is causal_lm.get_output_embeddings().weight
    folder = written("other", plus=0.01)
    for config in (FP32, replace(FP32, quantization=Quantization.nf4)):
        error = refused("ties two weights", load, folder, config)
        assert head in error.got
        assert error.got.count(".weight") == 2
    changed(folder / "config.json", tie_word_embeddings=False)  # the remedy
    own = load(folder).causal_lm.get_output_embeddings().weight
    assert torch.equal(own, load_file(folder / "head.safetensors")[head])


@pytest.mark.parametrize(
    ("option", "sizes"),
    [
        ("vocab_size", "embed_tokens.weight: {tokens} x 32 in the files, 1000 x 32 by config.json"),
        ("intermediate_size", "down_proj.weight: 32 x 64 in the files, 32 x 1000 by config.json"),
    ],
)
def test_a_size_that_differs_from_config_json_is_named(option: str, sizes: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tokens = load_config(folder, FP32).vocab_size
    changed(folder / "config.json", **{option: 1000})
    error = refused("other sizes than config.json says", load, folder)
    assert sizes.format(tokens=tokens) in error.got
    assert f"({option})" in error.remedy


@pytest.mark.parametrize("is_sharded", [True, False])
def test_unsharded_weights_are_loaded_directly_to_a_gpu(
    is_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_dist.model.files.load.shards_loading", lambda: is_sharded)
    config, gpu = ModelConfig("m"), torch.device("cuda", 3)
    assert placement(config, gpu) == ({} if is_sharded else {"device_map": {"": gpu}})
    assert placement(config, CPU) == {}


INDEX = "model.safetensors.index.json"
SHARDED = {"metadata": {}, "weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([INDEX], None),
        (["model.safetensors", INDEX, "pytorch_model.bin"], None),
        (["model.safetensors"], "other.safetensors"),
        (["model.safetensors", INDEX], INDEX),
    ],
)
def test_weight_files_are_those_that_transformers_loads(
    names: list[str], named: str | None, tmp_path: Path
) -> None:
    changed(tmp_path / "config.json", **({} if named is None else {"transformers_weights": named}))
    for name in [*names, "m-1.safetensors", "m-2.safetensors", "other.safetensors", "training_args.bin"]:
        (tmp_path / name).write_text(json.dumps(SHARDED if name == INDEX else {}))
    resolved, _ = _get_resolved_checkpoint_files(
        str(tmp_path),
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent=None,
        is_remote_code=False,
        transformers_explicit_filename=named,
    )
    files = weight_files(tmp_path)
    assert [str(file) for file in files if file.name != INDEX] == sorted(resolved)


def test_an_adapter_is_a_model_only_where_it_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **_options: str(tmp_path))
    for path in (str(tmp_path), "org/adapter"):
        assert model_folder(path, None, accepts_adapter=True) == tmp_path
        refused("contains an adapter", model_folder, path, None)
    write_model(tmp_path)
    refused("contains an adapter", model_folder, str(tmp_path), None)


class Poison:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "evil_model.bin"])
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    if name.startswith("evil"):
        changed(folder / "config.json", transformers_weights=name)
    for file in (name, "optimizer.pt", "training_args.bin"):
        (folder / file).write_bytes(pickle.dumps(Poison(tmp_path / "trace")))
    if not name.startswith("evil"):  # pickles that no model is loaded from do not matter
        assert model_folder(str(folder), None) == folder
        load_weights(folder, load_config(folder, FP32), FP32, CPU)
    (folder / "model.safetensors").unlink()
    error = refused("no weights in safetensors", model_folder, str(folder), None, "reference.path")
    assert error.where == "reference.path"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused("no weights in safetensors", model_folder, str(folder), None)
    # Also of a folder that was not checked.
    refused("cannot be loaded", load_weights, folder, load_config(folder, FP32), FP32, CPU)
    assert not (tmp_path / "trace").exists()


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", write_model(tmp_path / "model")
    adapter.mkdir()
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    torch.save({"a": torch.ones(2)}, adapter / "adapter_model.bin")
    config = load_run_config([f"model.path={base}", "data.train=[a.jsonl]"])
    refused("no weights in safetensors", model_folder, str(adapter), None, accepts_adapter=True)
    refused("no weights in safetensors", find_model, str(adapter), config.model, tmp_path, "pairs.models")


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A model with code beside it that leaves a trace."""
    folder = write_model(tmp_path / "model")
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'trace')!r}).touch()\nclass Own: pass\n"
    )
    return folder


def test_code_of_a_model_folder_is_not_run(poisoned: Path) -> None:
    changed(poisoned / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    error = refused("names Python code, which is not run", load_config, poisoned, FP32)
    assert "own.Own" in error.got
    assert "model.trust_remote_code=true" in error.remedy
    own = {"AutoTokenizer": ["own.Own", None]}
    changed(poisoned / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
    (poisoned / "tokenizer.json").rename(poisoned / "vocab.json")
    error = refused("names Python code", load_tokenizer, poisoned, FP32, "pairs.reward_model")
    assert "tokenizer_config.json: auto_map" in error.got
    assert error.where == "pairs.reward_model"
    assert not (poisoned.parent / "trace").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_classes_of_transformers_are_used_in_place_of_code(file: str, poisoned: Path) -> None:
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    changed(poisoned / file, auto_map=dict.fromkeys(names, "own.Own"), custom_generate="own")
    assert load_config(poisoned, FP32).model_type == "qwen2"
    assert len(load_tokenizer(poisoned, FP32)) > 0
    assert not (poisoned.parent / "trace").exists()


def test_own_code_of_a_model_that_reads_images_is_used_where_it_is_trusted(tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path, "mistral3", len(tiny.qwen()))
    (folder / "own.py").write_text(
        "from transformers import Mistral3ForConditionalGeneration\n"
        "class Own(Mistral3ForConditionalGeneration): pass\n"
    )
    changed(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    assert type(load(folder).causal_lm).__name__ == "Mistral3ForConditionalGeneration"
    trusted = replace(FP32, trust_remote_code=True)
    assert type(load(folder, trusted).causal_lm).__name__ == "Own"
    assert type(without_weights(load_config(folder, trusted), trusted)).__name__ == "Own"


@pytest.mark.parametrize(
    ("name", "value"),
    [("_attn_implementation", "someone/kernel"), ("experts_implementation", {"": "someone/kernel"})],
)
def test_kernels_of_the_hub_are_not_run(name: str, value: object, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    changed(folder / "config.json", **{name: value})
    assert name in refused("names code on the Hub", load_config, folder, FP32).got


def test_a_reference_has_the_policys_ids_for_the_same_tokens(tmp_path: Path) -> None:
    """Without a tokenizer of its own it has enough of them."""
    folder, tokenizer = write_model(tmp_path / "model"), tiny.qwen()
    check_same_vocabulary(folder, tokenizer, FP32, None)
    longer = load_tokenizer(folder, FP32)
    longer.add_tokens(["<new>"])
    error = refused("other token ids", check_same_vocabulary, folder, longer, FP32, None)
    assert "1 of " in error.got
    assert "'<new>'" in error.got

    for file in folder.glob("tokenizer*"):
        file.write_text(file.read_text().replace("<|im_end|>", "<|fin|>"))
    error = refused("other token ids", check_same_vocabulary, folder, tokenizer, FP32, None)
    assert error.where == "reference.path"
    assert "1 of " in error.got

    for file in folder.glob("tokenizer*"):
        file.unlink()
    check_same_vocabulary(folder, tokenizer, FP32, None)
