"""A reference with other tokens for the policy's ids is an error; one with more ids is not."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.schema import ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.load import check_same_vocabulary
from tests.support import tiny
from tests.support.tiny_model import write_model

CONFIG = ModelConfig("policy")


def test_the_policys_vocabulary_passes_with_or_without_tokenizer_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    check_same_vocabulary(folder, tiny.qwen(), CONFIG)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    check_same_vocabulary(folder, tiny.qwen(), CONFIG)


def with_another_id(folder: Path, tokenizer: Any) -> Any:
    longer = type(tokenizer).from_pretrained(folder)
    longer.add_tokens(["<new>"])
    return longer


def with_another_token(folder: Path, tokenizer: Any) -> Any:
    for other in folder.glob("*"):
        if other.suffix in (".json", ".jinja") and other.name.startswith(("tokenizer", "special", "chat")):
            other.write_text(other.read_text().replace("<|im_end|>", "<|fin|>"))
    return tokenizer


@pytest.mark.parametrize(
    ("change", "error", "got"),
    [
        (with_another_id, "fewer token ids", f"{len(tiny.qwen())} token ids"),
        (with_another_token, "other ids for the same tokens", "1 of "),
    ],
)
def test_other_ids_or_tokens_are_an_error(change: Any, error: str, got: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tiny.qwen())
    with pytest.raises(ConfigError, match=error) as caught:
        check_same_vocabulary(folder, change(folder, tiny.qwen()), CONFIG)
    assert caught.value.where == "reference.path"
    assert got in str(caught.value.got)
