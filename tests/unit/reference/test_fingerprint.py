"""Fingerprints and model digests change with weights, code and numerics, and with nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_dist.data.build import tokenizer_digest
from dpo_dist.foundation import files as digest_module
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.reference.digest import digest_model, model_label
from dpo_dist.reference.store import ReferenceFingerprint

INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
CONTENT = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-1.safetensors": b"weights one",
    "model-2.safetensors": b"weights two",
    "modeling_own.py": b"code",
}
OTHERS = ("generation_config.json", "tokenizer.json", "README.md", "consolidated.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    for name in OTHERS:
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.mark.parametrize("name", CONTENT)
def test_every_file_that_determines_the_function_counts(model: Path, name: str) -> None:
    before = digest_model(model).digest
    (model / name).write_bytes(CONTENT[name] + b" ")
    assert digest_model(model).digest != before
    (model / name).write_bytes(CONTENT[name])
    assert digest_model(model).digest == before
    (model / "more.py").write_bytes(b"")
    assert digest_model(model).digest != before


def test_other_files_and_the_place_of_the_folder_do_not_count(model: Path, tmp_path: Path) -> None:
    before = digest_model(model).digest
    for name in OTHERS:
        (model / name).write_bytes(b"changed")
    assert digest_model(model).digest == before
    assert digest_model(shutil.copytree(model, tmp_path / "copy")).digest == before


def test_known_files_are_not_read_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = digest_module.content_digest

    def spy(files: list[Path]) -> str:
        read.extend(file.name for file in files)
        return digest(files)

    monkeypatch.setattr(digest_module, "content_digest", spy)
    first = digest_model(model, tmp_path / "memo").digest
    assert sorted(read) == sorted(CONTENT)
    assert digest_model(model, tmp_path / "memo").digest == digest_model(model).digest == first


def test_other_classes_are_another_model(model: Path) -> None:
    """`model.trust_remote_code` selects the folder's own classes, and all of their code counts."""
    plain = digest_model(model).digest
    assert digest_model(model, remote_code=True).digest == plain
    (model / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}')
    trusted = digest_model(model, remote_code=True).digest
    assert trusted != digest_model(model).digest
    (model / "layers").mkdir()
    (model / "layers" / "own.py").write_text("scale = 2")
    assert digest_model(model, remote_code=True).digest != trusted
    (model / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "org/code--modeling.Own"}}')
    with pytest.raises(ConfigError, match="in another repository"):
        digest_model(model, remote_code=True)
    digest_model(model)


def test_a_file_that_changes_while_it_is_read_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_module.content_digest

    def overtaken(files: list[Path]) -> str:
        result = digest(files)
        files[0].write_bytes(files[0].read_bytes() + b" ")
        return result

    monkeypatch.setattr(digest_module, "content_digest", overtaken)
    with pytest.raises(ConfigError, match="changes while it is read"):
        digest_model(model, tmp_path / "memo")
    assert not (tmp_path / "memo").exists()


def test_a_hub_snapshot_is_labelled_with_its_commit(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert model_label("org/model", tmp_path / "snapshots" / commit) == f"org/model@{commit}"
    assert model_label("./model", tmp_path / "model") == "./model"


def test_fingerprints_differ_by_reference_versions_and_every_field_of_the_profile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = {"dtype": "bf16", "attention": "sdpa"}
    base = ReferenceFingerprint("weights", profile)
    others = [
        ReferenceFingerprint("other", profile),
        ReferenceFingerprint("weights", {**profile, "dtype": "fp32"}),
        ReferenceFingerprint("weights", {**profile, "gpu": "new"}),
        ReferenceFingerprint("weights", {"dtype": "bf16"}),
    ]
    assert len({each.name for each in (base, *others)}) == 5
    assert base.name == ReferenceFingerprint("weights", dict(reversed(profile.items()))).name
    name = base.name
    assert name == replace(base, label="a name").name
    for version in ("LOGP_PATH_VERSION", "STORE_FORMAT"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dpo_dist.reference.store.{version}", 77)
            assert base.name != name


TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json chat_template.jinja additional_chat_templates/tool_use.jinja "
    "vocab.json tokenization_own.py vocabulary.tiktoken tekken.json"
)


@pytest.mark.parametrize("name", TOKENIZER_FILES.split())
def test_files_that_decide_token_ids_are_in_the_tokenizers_digest(model: Path, name: str) -> None:
    before = tokenizer_digest(model)
    (model / "model-1.safetensors").write_bytes(b"changed")
    assert tokenizer_digest(model) == before
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"changed")
    assert tokenizer_digest(model) != before
