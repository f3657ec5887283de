"""A model folder is loaded exactly, or an error names its fault."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MusicgenConfig

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.folder import model_folder
from dpo_dist.model.load import load_config, load_packed, load_tokenizer, placement
from dpo_dist.model.packed import PackedCausalLM
from tests.support import tiny
from tests.support.families import tiny_family
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.support.tiny_model import write_model
from tests.unit.model.test_architectures import tiny_causal_lm, tiny_config

CPU = torch.device("cpu")
FP32 = ModelConfig(dtype=Dtype.fp32)
PAIRS = random_pairs([(7, 5, 9), (1, 1, 4)])
# The option of phimoe's router is also a threshold in evaluation.
NOISES = {
    "gpt2": {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "mixtral": {"router_jitter_noise": 0.5},
    "opt": {"dropout": 0.5},
    "phimoe": {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5},
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param)


def load(folder: Path, config: ModelConfig = FP32) -> PackedCausalLM:
    return load_packed(folder, config, 64, CPU)


def test_a_loaded_model_scores_like_the_original(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = plain_logps(plain, PAIRS)
        logps = load(folder)(pack_unkeyed(PAIRS))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(NOISES))
def test_a_model_with_noise_in_training_scores_as_it_is_evaluated(model_type: str, tmp_path: Path) -> None:
    noises = NOISES[model_type]
    tiny_causal_lm(tiny_config(model_type, vocab_size=300, **noises)).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loaded = load(tmp_path).train()
    with torch.no_grad():
        expected, logps = plain_logps(plain, PAIRS), loaded(pack_unkeyed(PAIRS))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


def test_an_evaluation_changes_no_weight(tmp_path: Path) -> None:
    """As RWKV of transformers does, which divides the weights of later layers."""
    causal_lm = tiny_family("rwkv", 97)
    causal_lm.config.rescale_every = 1
    causal_lm.save_pretrained(tmp_path)
    loaded = load(tmp_path).causal_lm.eval()
    before = [weight.detach().clone() for weight in loaded.parameters()]
    loaded(input_ids=torch.tensor([[5, 6, 7]]))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before, strict=True))


def test_the_head_shares_the_parameters_of_the_model(folder: Path) -> None:
    loaded = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state, expected = loaded.causal_lm.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert len(list(loaded.parameters())) == len(list(plain.parameters()))


def test_precision_is_the_configured_one(folder: Path) -> None:
    for dtype, expected in ((Dtype.bf16, torch.bfloat16), (Dtype.fp32, torch.float32)):
        model = load(folder, ModelConfig(dtype=dtype))
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model(pack_unkeyed(PAIRS)).dtype == torch.float32


def truncate_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])


def test_a_model_that_cannot_be_loaded_in_shards_may_load_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate_weights(write_model(tmp_path))
    with pytest.raises(ConfigError) as raised:
        load(tmp_path)
    assert "parallelism" not in str(raised.value.remedy)
    monkeypatch.setattr("dpo_dist.model.load.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="set parallelism=zero2 or ddp"):
        load(tmp_path)


def weights_of(folder: Path, **more: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors") | more
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.norm.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.more.weight",
    ],
)
def test_weights_that_the_architecture_does_not_read_are_refused(name: str, tmp_path: Path) -> None:
    weights_of(write_model(tmp_path), **{name: torch.ones(8)})
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM does not read") as raised:
        load(tmp_path)
    assert name in raised.value.got


def test_tensors_of_other_modules_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A value head, and a layer that predicts further tokens as config.json says (DeepSeek-V3)."""
    foreign = {"v_head.weight": torch.ones(1, 32), "model.layers.2.mlp.up_proj.weight": torch.ones(1, 32)}
    weights_of(write_model(tmp_path), **foreign)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
    load(tmp_path)
    assert all(name in caplog.text for name in foreign)
    weights_of(tmp_path, **{"model.layers.3.mlp.up_proj.weight": torch.ones(1, 32)})
    with pytest.raises(ConfigError, match="does not read"):
        load(tmp_path)


def test_a_model_folder_needs_config_and_weights(folder: Path, tmp_path: Path) -> None:
    assert model_folder(str(folder), None) == folder
    with pytest.raises(ConfigError, match="no effect on a local folder") as caught:
        model_folder(str(folder), "main", "reference.path")
    assert caught.value.where == "reference.revision"
    for missing in ("/no/such/folder", "./none", "a/b/c"):
        with pytest.raises(ConfigError, match="model folder does not exist"):
            model_folder(missing, None)
    with pytest.raises(ConfigError, match=r"no config\.json") as raised:
        model_folder(str(tmp_path), None, key="reference.path")
    assert raised.value.where == "reference.path"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="no weights"):
        model_folder(str(tmp_path), None)


def test_a_tokenizer_needs_its_files(folder: Path, tmp_path: Path) -> None:
    assert len(load_tokenizer(folder, FP32)) == len(tiny.qwen())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(tmp_path, FP32)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, FP32)


def test_liger_is_refused_before_weights_are_read_where_it_cannot_run(folder: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA only") as raised:
        load(folder, ModelConfig(dtype=Dtype.fp32, liger=True))
    assert raised.value.where == "model.liger"


def test_compiling_is_refused_without_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"C\+\+ compiler") as raised:
        load(folder, ModelConfig(dtype=Dtype.fp32, compile=True))
    assert raised.value.where == "model.compile"


@pytest.mark.parametrize("is_sharded", [True, False])
def test_unsharded_weights_are_loaded_directly_to_a_gpu(
    is_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_dist.model.load.is_deepspeed_zero3_enabled", lambda: is_sharded)
    config, gpu = ModelConfig("m"), torch.device("cuda", 3)
    assert placement(config, gpu) == ({} if is_sharded else {"device_map": {"": gpu}})
    assert placement(config, torch.device("cpu")) == {}


def test_a_model_with_several_models_of_text_is_refused(tmp_path: Path) -> None:
    """MusicGen has an encoder of text and a decoder, of which transformers names neither the text model."""
    MusicgenConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="several models of text") as raised:
        load_config(tmp_path, FP32, "reference.path")
    assert (raised.value.where, raised.value.got[:9]) == ("reference.path", "musicgen:")


def test_a_wrong_config_is_no_error_of_the_tokenizer(tmp_path: Path) -> None:
    file = write_model(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": "many"}))
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        load_tokenizer(tmp_path, FP32)
