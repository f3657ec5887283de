"""The description of a written model is that of its base, but for what must differ."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.model.load import load_packed
from dpo_dist.model.save import read_description, restore_description, write_weights
from tests.support.families import tiny_family
from tests.support.multimodal import write_multimodal
from tests.support.own_code import ship_code
from tests.support.tiny_model import write_model

CPU = torch.device("cpu")
# Dropout, values of another release, options of generation where old ones had them, a name of the authors.
AUTHORS = {"attention_dropout": 0.1, "transformers_version": "4.41.0", "use_cache": False, "temperature": 0.7}
AUTHORS |= {"own_note": [1]}
GENERATION = {"do_sample": False, "temperature": 0.3, "eos_token_id": [3, 4]}


def change(file: Path, **values: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text()) | values
    file.write_text(json.dumps(content))
    return content


def written_again(base: Path, folder: Path, dtype: Dtype) -> dict[str, Any]:
    """config.json of a model that is loaded and written as training does."""
    causal_lm = load_packed(
        base, ModelConfig(path=str(base), dtype=dtype, trust_remote_code=True), 64, CPU
    ).causal_lm
    weights = {name: weight.detach() for name, weight in causal_lm.named_parameters()}
    write_weights(folder, causal_lm, weights, read_description(base))
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_written_model_is_described_as_its_base(key: str, dtype: Dtype, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    given = change(base / "config.json", **AUTHORS)
    given[key] = given.pop("dtype")
    (base / "config.json").write_text(json.dumps(given))
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    found = written_again(base, tmp_path / "out", dtype)
    if dtype is Dtype.bf16:
        assert found.pop("dtype") == "bfloat16"
        del given[key]
    assert found == given
    copied, original = (folder / "generation_config.json" for folder in (tmp_path / "out", base))
    assert copied.read_bytes() == original.read_bytes()


def test_own_code_whose_config_names_no_type_keeps_its_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older models with code have it: `auto_map` says which class reads config.json."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = ship_code(write_model(tmp_path / "base"), "state")
    given = change(base / "config.json", **AUTHORS)
    del given["model_type"]
    (base / "config.json").write_text(json.dumps(given))
    assert written_again(base, tmp_path / "out", Dtype.fp32) == given | {"architectures": ["Own"]}


def test_a_base_without_generation_options_gets_none(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    (base / "generation_config.json").unlink()
    written_again(base, tmp_path / "out", Dtype.fp32)
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("family", "option", "value"), [("rwkv", "rescale_every", 6), ("phimoe", "router_jitter_noise", 0.02)]
)
def test_options_that_training_switches_off_are_written_as_they_were(
    family: str, option: str, value: float, tmp_path: Path
) -> None:
    tiny_family(family, 97).save_pretrained(tmp_path / "base")
    given = change(tmp_path / "base" / "config.json", **{option: value})
    assert written_again(tmp_path / "base", tmp_path / "out", Dtype.fp32) == given


def test_the_text_part_of_a_model_has_the_dropout_of_its_base(tmp_path: Path) -> None:
    base = write_multimodal(tmp_path / "base", "qwen3_5", 97)
    whole = json.loads((base / "config.json").read_text())
    change(base / "config.json", text_config=whole["text_config"] | {"attention_dropout": 0.25})
    found = written_again(base, tmp_path / "out", Dtype.fp32)
    assert found["model_type"] == whole["text_config"]["model_type"]
    assert found["attention_dropout"] == 0.25
    del whole["text_config"]["attention_dropout"]
    (base / "config.json").write_text(json.dumps(whole))
    assert "attention_dropout" not in written_again(base, tmp_path / "default", Dtype.fp32)


def test_a_part_that_names_a_precision_gets_that_of_the_weights(tmp_path: Path) -> None:
    parts = {"text_config": {"torch_dtype": "bfloat16"}, "vision_config": {"depth": 1}}
    content = {"model_type": "x", "architectures": ["X"], "transformers_weights": "a.safetensors", **parts}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "architectures": ["XForCausalLM"]}))
    restore_description(tmp_path, {"config.json": json.dumps(content).encode()}, torch.float16, {})
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "x",
        "architectures": ["XForCausalLM"],
        "text_config": {"dtype": "float16"},
        "vision_config": {"depth": 1},
        "dtype": "float16",
    }
