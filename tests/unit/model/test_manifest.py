"""A model folder that this program wrote is found damaged, or on another base, before it is used."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_dist.config.schema import ModelConfig
from dpo_dist.foundation.errors import CheckpointError, DpoDistError
from dpo_dist.model.files.manifest import MODEL_MANIFEST, check_undamaged, find_damage, write_manifest
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.model_source import find_model
from dpo_dist.tools.chat.conversation import open_conversation
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("model.safetensors", flip, "model.safetensors has another content"),
    ("model.safetensors", cut, "model.safetensors has another content"),
    ("model.safetensors", empty, "model.safetensors has another content"),
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("config.json", cut, "config.json has another content"),
    ("tokenizer.json", flip, "tokenizer.json has another content"),
    ("chat_template.jinja", empty, "chat_template.jinja has another content"),
]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A model folder of this program."""
    folder = write_model(tmp_path / "written")
    (folder / "README.md").write_text("a card")
    write_manifest(folder, None)
    return folder


@pytest.mark.parametrize(("name", "damage", "expected"), DAMAGE)
def test_damage_is_named_and_the_model_is_not_read(
    name: str, damage: Callable[[Path], object], expected: str, written: Path, tmp_path: Path
) -> None:
    memo = tmp_path / "memo"
    assert find_damage(written, memo) == []
    damage(written / name)
    assert find_damage(written, memo) == [expected]
    with pytest.raises(CheckpointError, match="not as it was written"):
        digest_model(written, tmp_path)
    with pytest.raises(DpoDistError):
        open_conversation(str(written), print)


@pytest.mark.parametrize(
    "name",
    [
        *("added_tokens.json", "special_tokens_map.json", "preprocessor_config.json", "tokenizer.model"),
        *("model-00002-of-00002.safetensors", "model.safetensors.index.json", "modeling_own.py", "notes.txt"),
        *("additional_chat_templates/other.jinja", "adapter_config.json", "generation_config.json.bak"),
    ],
)
def test_a_file_that_was_added_is_named(name: str, written: Path) -> None:
    """It may change what a loader makes of the others."""
    (written / name).parent.mkdir(exist_ok=True)
    (written / name).write_text("{}")
    for with_weights in (True, False):
        assert find_damage(written, None, with_weights=with_weights) == [f"{name} was added"]
    with pytest.raises(CheckpointError, match="not as it was written") as refused:
        check_undamaged(written, None)
    assert "move added ones elsewhere" in refused.value.remedy
    assert "delete" not in refused.value.remedy


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"files": []}', b'{"files": {"config.json": 1}}', b"\xff"]
)
def test_a_damaged_manifest_is_damage_of_the_folder(content: bytes, written: Path, tmp_path: Path) -> None:
    (written / MODEL_MANIFEST).write_bytes(content)
    assert find_damage(written, None) == [f"{MODEL_MANIFEST} cannot be read"]
    with pytest.raises(CheckpointError, match="not as it was written"):
        digest_model(written, tmp_path)


def test_files_that_people_edit_and_folders_of_others_pass(written: Path, tmp_path: Path) -> None:
    pages = ("README.md", "LICENSE", "curves.png", "images/chart.svg")
    for name in ("generation_config.json", *pages, ".gitattributes", ".cache/huggingface/x.json"):
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_text("{}")
    check_undamaged(written, None)
    cut(written / "model.safetensors")
    (written / MODEL_MANIFEST).unlink()
    check_undamaged(written, None)
    check_undamaged(write_model(tmp_path / "of others"), None)


def test_without_weights_only_the_other_files_are_read(written: Path) -> None:
    flip(written / "model.safetensors")
    assert find_damage(written, None, with_weights=False) == []
    (written / "model.safetensors").unlink()
    assert find_damage(written, None, with_weights=False) == ["model.safetensors is missing"]


def test_an_adapter_on_another_base_is_refused_and_on_a_copy_it_is_not(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    adapter = write_sft_adapter(base, tmp_path / "adapter")
    write_manifest(adapter, digest_model(base).base)
    config, store = ModelConfig(path=str(base)), tmp_path / "store"
    of_same = find_model(str(adapter), config, store, "compare.models").digest
    shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    (tmp_path / "copy").rename(base)
    assert find_model(str(adapter), config, store, "compare.models").digest == of_same
    write_model(base, seed=1)
    with pytest.raises(CheckpointError, match="base of this model is not the one") as refused:
        find_model(str(adapter), config, store, "compare.models")
    assert (str(base), str(adapter)) == tuple(refused.value.where.split(", as the base of "))
    with pytest.raises(CheckpointError, match="base of this model is not the one"):
        open_conversation(str(adapter), print)
