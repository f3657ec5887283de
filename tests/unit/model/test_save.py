"""A written model is described as its base, but for what must differ; a full disk is one error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.model.load import load_packed
from dpo_dist.model.save import write_description, write_weights
from tests.support.families import tiny_family
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
    write_weights(folder, causal_lm, weights, base)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_a_written_model_is_described_as_its_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    given = change(base / "config.json", **AUTHORS)
    given["torch_dtype"] = given.pop("dtype")
    (base / "config.json").write_text(json.dumps(given))
    (base / "generation_config.json").write_text(json.dumps(GENERATION))
    found = written_again(base, tmp_path / "out", Dtype.bf16)
    assert found.pop("dtype") == "bfloat16"
    del given["torch_dtype"]
    assert found == given
    copied, original = (folder / "generation_config.json" for folder in (tmp_path / "out", base))
    assert copied.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("family", "option", "value"), [("rwkv", "rescale_every", 6), ("phimoe", "router_jitter_noise", 0.02)]
)
def test_options_that_training_switches_off_are_written_as_they_were(
    family: str, option: str, value: float, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_family(family).save_pretrained(base)
    (base / "generation_config.json").unlink()
    given = change(base / "config.json", **{option: value})
    assert written_again(base, out, Dtype.fp32) == given
    assert not (out / "generation_config.json").exists()


def test_a_part_that_names_a_precision_gets_that_of_the_weights(tmp_path: Path) -> None:
    parts = {"text_config": {"torch_dtype": "bfloat16"}, "vision_config": {"depth": 1}}
    write_description(tmp_path / "config.json", {"transformers_weights": "a"} | parts, torch.float16)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == parts | {"text_config": {"dtype": "float16"}, "dtype": "float16"}
