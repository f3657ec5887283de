"""What identifies a reference: digests of its files, its fingerprint, and the numerics of all ranks."""

import json
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dpo_dist.config.schema import ModelConfig
from dpo_dist.distributed.processes.world import Peer, World
from dpo_dist.foundation import files as digest_module
from dpo_dist.foundation.errors import ConfigError, ReferenceModelError
from dpo_dist.model.files.folder import DESCRIPTIONS, TOKENIZER_FILES, check_tokenizer_files
from dpo_dist.model.files.load import tokenizer_digest
from dpo_dist.model.files.save import copy_tokenizer
from dpo_dist.reference.digest import (
    Profile,
    check_same_numerics,
    description_digest,
    digest_model,
    digest_on_every_node,
    model_label,
)
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
PROFILE = {
    "dtype": "bf16",
    "matmul_precision": "highest",
    "attention": "varlen",
    "torch": "2.13",
    "gpu": "H200",
}
OWN = ReferenceFingerprint("weights", PROFILE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    for name in OTHERS:
        (folder / name).write_bytes(b"{}")
    return folder


def test_a_digest_is_of_the_files_that_determine_the_function(model: Path, tmp_path: Path) -> None:
    before = digest_model(model).digest
    for name, content in CONTENT.items():
        (model / name).write_bytes(content + b" ")
        assert digest_model(model).digest != before, name
        (model / name).write_bytes(content)
    for name in OTHERS:
        (model / name).write_bytes(b"changed")
    assert digest_model(shutil.copytree(model, tmp_path / "copy")).digest == before
    (model / "more.py").write_bytes(b"")
    assert digest_model(model).digest != before


@pytest.mark.parametrize(
    ("name", "is_described"),
    [
        *((name, True) for name in ("config.json", "generation_config.json", "tokenizer.json")),
        *((name, True) for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")),
        *((name, True) for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja")),
        *((name, True) for name in ("preprocessor_config.json", "processor_config.json", "merges.txt")),
        *((name, True) for name in ("video_preprocessor_config.json", "vocab.json", "emoji.json")),
        *((name, False) for name in ("README.md", "model-1.safetensors", "consolidated.safetensors")),
    ],
)
def test_a_description_has_what_is_read_or_copied_beside_the_weights(
    name: str, is_described: bool, model: Path
) -> None:
    """Whether the file is changed or added."""
    config = ModelConfig(path=str(model))
    file = model / name
    file.parent.mkdir(exist_ok=True)
    seen = set()
    for content in ("{}", "{ }", None):
        if content is not None:
            file.write_text(content)
        elif name != "config.json":
            file.unlink()
        seen.add(description_digest(config, model, None))
    contents = 2 if name == "config.json" else 3
    assert len(seen) == (contents if is_described else 1)


def test_a_description_has_the_tokenizer_of_an_adapter_and_its_weights(model: Path, tmp_path: Path) -> None:
    config, adapter = ModelConfig(path=str(model)), tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        (adapter / name).write_text("{}")
    before = description_digest(config, model, adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        (adapter / name).write_text("{ }")
        assert description_digest(config, model, adapter) != before, name
        (adapter / name).write_text("{}")
    assert description_digest(config, model, adapter) == before


def test_all_files_that_tokenizers_and_processors_of_transformers_name_are_described() -> None:
    """The names in its own modules: a new version may read a file of another name."""
    root = Path(transformers.__file__).parent
    names = set()
    for file in root.glob("models/*/tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES[^=]*= *{(.*?)}", file.read_text(), re.DOTALL):
            names |= set(re.findall(r': *"([^"]+)"', table))
    assert len(names) > 20
    weights_or_pages = ("SAFE_WEIGHTS", "WEIGHTS_", "ADAPTER_", "MODEL_CARD", "TRANSFORMERS_")
    for constant, name in vars(transformers.utils).items():
        if constant.endswith(("_NAME", "_FILE")) and not constant.startswith(weights_or_pages):
            names.add(name)
    patterns = (*TOKENIZER_FILES, DESCRIPTIONS)
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)} == set()


def test_known_files_are_not_read_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digest_model(model, tmp_path / "memo").digest
    assert digest_model(model).digest == first
    monkeypatch.setattr(digest_module, "content_digest", lambda files: pytest.fail(f"{files} read again"))
    assert digest_model(model, tmp_path / "memo").digest == first


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


def test_a_hub_snapshot_is_labelled_with_its_commit(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert model_label("org/model", tmp_path / "snapshots" / commit) == f"org/model@{commit}"
    assert model_label("./model", tmp_path / "model") == "./model"


OF_TOKENIZER = (
    "tokenizer.json tokenizer_config.json chat_template.jinja additional_chat_templates/tool_use.jinja "
    "vocab.json tokenization_own.py"
)
VOCABULARIES = "tokenizer.json vocab.txt spiece.model tokenizer.model.v3 qwen.tiktoken tekken.json"


@pytest.mark.parametrize("name", VOCABULARIES.split())
def test_every_form_of_a_vocabulary_is_found_copied_and_in_the_digest(name: str, tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    (copy := tmp_path / "copy").mkdir()
    before = tokenizer_digest(folder)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        check_tokenizer_files(folder)
    (folder / name).write_bytes(b"a vocabulary")
    check_tokenizer_files(folder)
    assert tokenizer_digest(folder) != before
    copy_tokenizer(folder, copy)
    assert (copy / name).is_file()


def test_a_tokenizers_digest_is_of_the_files_that_decide_token_ids(model: Path) -> None:
    digests = [tokenizer_digest(model)]
    (model / "model-1.safetensors").write_bytes(b"changed")
    assert tokenizer_digest(model) == digests[0]
    for name in OF_TOKENIZER.split():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"changed")
        assert tokenizer_digest(model) not in digests, name
        digests.append(tokenizer_digest(model))
    digests.append(tokenizer_digest(model, with_images=True))
    (model / "preprocessor_config.json").write_bytes(b"changed")
    assert tokenizer_digest(model) == digests[-2]
    assert tokenizer_digest(model, with_images=True) not in digests


def test_fingerprints_differ_by_reference_versions_and_every_field_of_the_profile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [replace(OWN, reference="other"), replace(OWN, profile={**PROFILE, "compile": "new"})]
    others += [replace(OWN, profile={**PROFILE, name: "other"}) for name in PROFILE]
    others += [replace(OWN, profile={name: PROFILE[name] for name in PROFILE if name != "gpu"})]
    name = OWN.name
    assert len({name, *(each.name for each in others)}) == 1 + len(others)
    assert name == ReferenceFingerprint("weights", dict(reversed(PROFILE.items())), "a name").name
    for version in ("LOGP_PATH_VERSION", "STORE_FORMAT"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dpo_dist.reference.store.{version}", 77)
            assert OWN.name != name


def check(monkeypatch: pytest.MonkeyPatch, other: Profile) -> None:
    """Check the numerics profile of this rank, and of another host one that differs by `other`."""

    def gather(_self: World, value: Any) -> list[Any]:
        there = {**PROFILE, **other}
        if isinstance(value, dict):
            return [value, there]
        return [value, value if there == PROFILE else "another digest"]

    monkeypatch.setattr(World, "gather", gather)
    peers = (Peer(0, "host-a", 1, "a"), Peer(1, "host-b", 2, "b"))
    check_same_numerics(PROFILE, World(None, 0, 2, torch.device("cpu"), peers))


def test_ranks_with_other_numerics_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, {})
    for other in ({"gpu": "H100"}, {"gpu": "H100", "dtype": "fp32"}, {"quantization": "int8"}):
        with pytest.raises(ReferenceModelError, match="different numerics") as raised:
            check(monkeypatch, other)
        assert raised.value.remedy.endswith("the same installed packages")
        for name, value in other.items():
            here = PROFILE.get(name, "-")
            assert f"{name}: {here} on rank 0 (host-a); {value} on rank 1 (host-b)" in raised.value.got


@pytest.mark.parametrize("loads_whole", [True, False])
@pytest.mark.parametrize(
    ("places", "readers"), [("aabb", {2}), ("abab", {1}), ("abcc", {1, 2}), ("aaab", {3}), ("aaaa", set())]
)
def test_the_first_rank_of_each_other_node_reads_the_nodes_own_files(
    places: str, readers: set[int], loads_whole: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every node but rank 0's, the files have changed: in config.json, and in the weights."""
    peers = tuple(Peer(rank, f"node-{place}", 1, place) for rank, place in enumerate(places))
    heard = dict[str, str]()
    own = digest_model(model)
    monkeypatch.setattr(World, "on_main", lambda *_: own)
    monkeypatch.setattr(World, "together", lambda _, work: work())
    monkeypatch.setattr(World, "differences", lambda _, facts: heard.clear() or heard.update(facts) or {})
    for name in ("config.json", "model-2.safetensors"):
        (model / name).write_bytes(CONTENT[name] + b" ")
    found = {}
    for rank in range(len(places)):
        world = World(None, rank, len(places), torch.device("cpu"), peers)
        digest_on_every_node(model, model.parent / "memo", False, loads_whole, world)
        expected = own.code | own.weights
        found[rank] = {name for name in heard if heard[name] != expected[name]}
    changed = {"config.json"} | ({"model-2.safetensors"} if loads_whole else set())
    assert found == {rank: changed if rank in readers else set() for rank in range(len(places))}
