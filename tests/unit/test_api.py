"""The API for scripts and notebooks; docs/python.md is tested in test_python_page.py."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from dpo_dist import api
from dpo_dist.data.encode import EncodedExample
from dpo_dist.errors import ConfigError, ReferenceModelError
from tests.support.tiny_model import write_model


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("dpo_dist.objective.losses", "preference_loss"),
        ("dpo_dist.data.formats", "read_records"),
        ("dpo_dist.data.encode", "encode_pair"),
        ("dpo_dist.reference.store", "LogpStore"),
        ("dpo_dist.config.load", "load_run_config"),
    ],
)
def test_public_names_keep_their_place(module: str, name: str) -> None:
    assert callable(vars(importlib.import_module(module))[name])


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for read in (api.read_metrics, api.read_summary):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path)


def test_a_store_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match="nowhere"):
        api.open_stores(tmp_path / "nowhere")


def test_a_model_that_is_not_loaded_is_an_error() -> None:
    with pytest.raises(ConfigError, match="load_model"):
        api.token_logps("model", [])  # type: ignore[arg-type]


def test_a_model_in_training_mode_is_an_error_and_one_in_evaluation_mode_is_restored(tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(write_model(tmp_path)).train()
    attention, head = plain.config._attn_implementation, plain.get_output_embeddings()
    pairs = [EncodedExample(np.array([5, 6], dtype=np.int32), (np.array([7], dtype=np.int32),) * 2)]
    with pytest.raises(ConfigError, match="training mode"):
        api.pair_logps(plain, pairs)
    logps = api.pair_logps(plain.eval(), pairs)
    assert logps.chosen.requires_grad
    assert (plain.config._attn_implementation, plain.get_output_embeddings()) == (attention, head)
