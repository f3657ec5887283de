"""A stored log-prob belongs to the weights on disk and to the numerics; neither changes unnoticed."""

import os
from pathlib import Path

import pytest

from dpo_dist.reference import key as key_module
from dpo_dist.reference.key import ReferenceSpace, model_digest, tokenizer_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in (
        ("config.json", b"{}"),
        ("model-1.safetensors", b"weights one"),
        ("model-2.safetensors", b"weights two"),
        ("modeling_own.py", b"code"),
        ("generation_config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("README.md", b"words"),
    ):
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "name", ["config.json", "model-1.safetensors", "model-2.safetensors", "modeling_own.py"]
)
def test_every_file_that_decides_the_function_counts(model: Path, name: str) -> None:
    before = model_digest(model)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[::-1] + b" ")
    assert model_digest(model) != before
    (model / name).write_bytes(content)
    assert model_digest(model) == before
    (model / name).rename(model / f"a-{name}") if name != "config.json" else (model / "more.py").write_bytes(
        b""
    )
    assert model_digest(model) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "generation_config.json"])
def test_files_beside_the_function_do_not_count(model: Path, name: str) -> None:
    before = model_digest(model)
    (model / name).write_bytes(b"changed")
    assert model_digest(model) == before


def test_a_copy_has_the_same_digest(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_digest(copy) == model_digest(model)


def test_known_files_are_not_read_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = key_module.content_digest

    def spy(files: list[Path]) -> str:
        read.extend(file.name for file in files)
        return digest(files)

    monkeypatch.setattr(key_module, "content_digest", spy)
    first = model_digest(model, tmp_path / "memo")
    assert len(read) == 4
    assert model_digest(model, tmp_path / "memo") == first
    assert len(read) == 4
    assert model_digest(model) == first
    (model / "model-2.safetensors").write_bytes(b"weights 2!!")
    read.clear()
    assert model_digest(model, tmp_path / "memo") != first
    assert read == ["model-2.safetensors"]


def test_a_change_that_keeps_size_and_time_is_seen(model: Path, tmp_path: Path) -> None:
    file = model / "model-1.safetensors"
    before, status = model_digest(model, tmp_path), file.stat()
    file.write_bytes(b"WEIGHTS ONE")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert model_digest(model, tmp_path) != before


def test_a_damaged_memo_is_written_anew(model: Path, tmp_path: Path) -> None:
    before = model_digest(model, tmp_path)
    (tmp_path / "file_digests.json").write_text('{"half')
    assert model_digest(model, tmp_path) == before
    assert model_digest(model, tmp_path) == before


def test_spaces_differ_by_reference_and_by_every_part_of_the_profile() -> None:
    profile = {"dtype": "bf16", "attention": "sdpa"}
    base = ReferenceSpace("weights", profile)
    others = [
        ReferenceSpace("other", profile),
        ReferenceSpace("weights", {**profile, "dtype": "fp32"}),
        ReferenceSpace("weights", {**profile, "gpu": "new"}),
        ReferenceSpace("weights", {"dtype": "bf16"}),
    ]
    assert len({space.name for space in (base, *others)}) == 5
    assert base.name == ReferenceSpace("weights", dict(reversed(profile.items()))).name
    assert base.describe()["profile"] == profile


def test_a_change_of_the_log_prob_path_starts_a_new_space(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ReferenceSpace("weights", {}).name
    monkeypatch.setattr(key_module, "LOGP_PATH_VERSION", key_module.LOGP_PATH_VERSION + 1)
    assert ReferenceSpace("weights", {}).name != before


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"]
)
def test_whatever_makes_ids_of_text_is_in_the_tokenizer_s_digest(model: Path, name: str) -> None:
    before = tokenizer_digest(model)
    (model / name).write_bytes(b"changed")
    assert tokenizer_digest(model) != before


def test_weights_are_not_in_the_tokenizer_s_digest(model: Path) -> None:
    before = tokenizer_digest(model)
    (model / "model-1.safetensors").write_bytes(b"changed")
    assert tokenizer_digest(model) == before
