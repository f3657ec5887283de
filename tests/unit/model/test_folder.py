"""The weight files of a model folder are those that transformers loads."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from transformers.modeling_utils import _get_resolved_checkpoint_files

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.folder import hub_commit, model_folder, weight_files

CONTENT = {
    "model.safetensors.index.json": {
        "metadata": {},
        "weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"},
    },
    "pytorch_model.bin.index.json": {"metadata": {}, "weight_map": {"a": "sub/p-1.bin", "b": "sub/p-1.bin"}},
}
SHARDS = ["m-1.safetensors", "m-2.safetensors", "sub/p-1.bin", "other.safetensors", "training_args.bin"]


def write_folder(folder: Path, names: list[str], config: dict[str, str]) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in [*names, *SHARDS]:
        (folder / name).write_text(json.dumps(CONTENT.get(name, {})))
    return folder


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (["model.safetensors"], {}),
        (["model.safetensors.index.json"], {}),
        (["pytorch_model.bin"], {}),
        (["pytorch_model.bin.index.json"], {}),
        (["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"], {}),
        (["model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"], {}),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], {}),
        (["model.safetensors"], {"transformers_weights": "other.safetensors"}),
        (
            ["model.safetensors", "model.safetensors.index.json"],
            {"transformers_weights": "model.safetensors.index.json"},
        ),
    ],
)
def test_weight_files_are_those_that_transformers_loads(
    names: list[str], config: dict[str, str], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model", names, config)
    resolved, _ = _get_resolved_checkpoint_files(
        str(folder),
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent=None,
        is_remote_code=False,
        transformers_explicit_filename=config.get("transformers_weights"),
    )
    files = weight_files(folder)
    assert [str(file) for file in files if not file.name.endswith(".index.json")] == sorted(resolved)


def test_a_folder_without_known_weight_files_has_no_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", [], {})
    assert weight_files(folder) == []
    with pytest.raises(ConfigError, match="no weights"):
        model_folder(str(folder), None)
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    assert len(weight_files(folder)) == 4


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_index_is_named_in_the_error(content: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", [], {})
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError) as raised:
        weight_files(folder)
    assert raised.value.where.endswith("model.safetensors.index.json")


def test_an_adapter_beside_full_weights_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", ["model.safetensors"], {})
    model_folder(str(folder), None)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter beside full weights") as raised:
        model_folder(str(folder), None, "reference.path")
    assert raised.value.where == "reference.path"


def test_a_mistyped_folder_with_one_slash_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_options: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "base").mkdir(parents=True)
    for path, remedy in (("demo/bas", "did you mean demo/base?"), ("org/bas", "check the path")):
        with pytest.raises(ConfigError) as raised:
            model_folder(path, None)
        assert raised.value.remedy.startswith(remedy)
    with pytest.raises(ConfigError, match="the adapter is neither a local folder nor an adapter found"):
        model_folder("org/bas", None, "model.adapter.path", accepts_adapter=True)


def test_an_adapter_is_a_model_only_where_it_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("dpo_dist.model.folder._snapshot", lambda *_, **_options: tmp_path)
    for path in (str(tmp_path), "org/adapter"):
        assert model_folder(path, None, accepts_adapter=True) == tmp_path
        with pytest.raises(ConfigError, match=r"no config\.json"):
            model_folder(path, None)


def test_the_commit_of_a_cached_model_is_known(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert hub_commit(tmp_path / "models--org--m" / "snapshots" / commit) == commit
    assert hub_commit(tmp_path / commit) is None
    assert hub_commit(tmp_path / "snapshots" / "mine") is None
