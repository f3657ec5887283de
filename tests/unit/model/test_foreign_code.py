"""Code that a model folder names is not imported, unless it is asked for."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.load import load_config, load_tokenizer
from tests.support.tiny_model import write_model

FP32 = ModelConfig(dtype=Dtype.fp32)
CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Own: pass\n"


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | values))


def poisoned(tmp_path: Path) -> tuple[Path, Path]:
    folder, trace = write_model(tmp_path / "model"), tmp_path / "trace"
    (folder / "own.py").write_text(CODE.format(str(trace)))
    return folder, trace


def test_code_of_a_configuration_is_not_run(tmp_path: Path) -> None:
    folder, trace = poisoned(tmp_path)
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(ConfigError, match="names Python code, which is not run") as raised:
        load_config(folder, FP32)
    assert "own.Own" in raised.value.got
    assert "model.trust_remote_code=true" in raised.value.remedy
    assert not trace.exists()


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder, trace = poisoned(tmp_path)
    own = {"AutoTokenizer": ["own.Own", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
    change(folder / "config.json", model_type="own")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(ConfigError, match="names Python code, which is not run") as raised:
        load_tokenizer(folder, FP32, "pairs.reward_model")
    assert "tokenizer_config.json: auto_map" in raised.value.got
    assert raised.value.where == "pairs.reward_model"
    assert not trace.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_classes_of_transformers_are_used_in_place_of_code(file: str, tmp_path: Path) -> None:
    folder, trace = poisoned(tmp_path)
    if not (folder / file).is_file():
        (folder / file).write_text("{}")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change(folder / file, auto_map=dict.fromkeys(names, "own.Own"), custom_generate="own")
    assert load_config(folder, FP32).model_type == "qwen2"
    assert len(load_tokenizer(folder, FP32)) > 0
    assert not trace.exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel"}])
def test_kernels_of_the_hub_are_not_run(name: str, value: object, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    change(folder / "config.json", **{name: value})
    with pytest.raises(ConfigError, match="names code on the Hub") as raised:
        load_config(folder, FP32)
    assert name in raised.value.got
