"""A reference with other tokens for the policy's ids is an error; one with more ids is not."""

from pathlib import Path

import pytest

from dpo_dist.config.schema import ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.reference.engine import check_same_vocabulary
from tests.support import tiny
from tests.support.tiny_model import write_model

CONFIG = ModelConfig("policy")


def test_the_policys_vocabulary_passes_with_or_without_tokenizer_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    check_same_vocabulary(folder, tiny.qwen(), CONFIG)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    check_same_vocabulary(folder, tiny.qwen(), CONFIG)


def test_a_reference_with_fewer_ids_is_an_error(tmp_path: Path) -> None:
    tokenizer = tiny.qwen()
    folder = write_model(tmp_path / "model", tokenizer)
    ids = len(tokenizer)
    longer = write_model(tmp_path / "longer", tokenizer)
    tokenizer = type(tokenizer).from_pretrained(longer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match="fewer token ids") as caught:
        check_same_vocabulary(folder, tokenizer, CONFIG)
    assert caught.value.where == "reference.path"
    assert f"{ids} token ids" in str(caught.value.got)


def test_other_tokens_for_the_same_ids_are_an_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    for other in folder.glob("*"):
        if other.suffix in (".json", ".jinja") and other.name.startswith(("tokenizer", "special", "chat")):
            other.write_text(other.read_text().replace("<|im_end|>", "<|fin|>"))
    with pytest.raises(ConfigError, match="other ids for the same tokens") as caught:
        check_same_vocabulary(folder, tiny.qwen(), CONFIG)
    assert caught.value.where == "reference.path"
    assert "1 of" in str(caught.value.got)
    assert "<|im_end|>" in str(caught.value.got)
