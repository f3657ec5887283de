"""Identify a reference model: by the digest of its files, and by numerics that are the same on all ranks.

The digest is that of files, because live tensors are empty under ZeRO-3. The store remembers the digests, so
that each file is read once.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpo_dist.config.schema import ModelConfig
from dpo_dist.distributed.processes.world import World
from dpo_dist.foundation.errors import ConfigError, ReferenceModelError
from dpo_dist.foundation.files import MEMO_FOLDER, content_digest, remembered_digest, text_digest
from dpo_dist.foundation.text import first_few, without_secrets
from dpo_dist.model.files.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    DESCRIPTIONS,
    hub_commit,
    read_model_json,
    tokenizer_folder,
    weight_files,
)
from dpo_dist.model.files.load import tokenizer_digest
from dpo_dist.model.files.manifest import check_base, check_undamaged

Profile = dict[str, str]


@dataclass(frozen=True)
class ModelFiles:
    """Digests of a model folder's files, by name: weights, and code with configuration.

    `code` also has the files of an `adapter` on the model, and under "classes" the `auto_map`. `known`: the
    digest of a model whose weights are not here.
    """

    folder: Path
    code: dict[str, str]
    weights: dict[str, str]
    adapter: Path | None = None
    known: str | None = None

    @property
    def digest(self) -> str:
        """The model's digest: 32 hex digits, the same for a copy of the folder."""
        if self.known is not None:
            return self.known
        parts = [sorted(self.code.items()), sorted(self.weights.items())]
        return text_digest(json.dumps(parts))

    @property
    def base(self) -> str:
        """The digest of config.json and weights alone, whatever the adapter, and whether code is trusted."""
        parts = [(CONFIG_FILE, self.code[CONFIG_FILE]), *sorted(self.weights.items())]
        return text_digest(json.dumps(parts))


def digest_model(
    folder: Path,
    store: Path | None = None,
    *,
    remote_code: bool = False,
    with_weights: bool = True,
    adapter: Path | None = None,
) -> ModelFiles:
    """Return digests of config.json, code, and the weight files that transformers loads.

    `store` remembers digests, so that each file is read once. With `remote_code` (`model.trust_remote_code`)
    the folder's own classes replace those of transformers. Raises CheckpointError for a folder that this
    program wrote and that has changed since, and for an adapter of another base.
    """
    memo = store / MEMO_FOLDER if store is not None else None
    check_undamaged(folder, memo, with_weights=with_weights)
    added = list[Path]()
    if adapter is not None:
        check_undamaged(adapter, memo, with_weights=with_weights)
        added = [adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS]
    own_code = folder.rglob("*.py") if remote_code else folder.glob("*.py")
    code = [folder / CONFIG_FILE, *sorted(own_code)]
    weights = weight_files(folder) if with_weights else []
    names = {file: file.relative_to(folder).as_posix() for file in [*code, *weights]}
    names |= {file: f"adapter/{file.name}" for file in added}
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = dict(zip(names, pool.map(lambda file: remembered_digest(file, memo), names), strict=True))
    files = ModelFiles(
        folder,
        {names[file]: digests[file] for file in [*code, *added]}
        | {"classes": _code_classes(folder, remote_code)},
        {names[file]: digests[file] for file in weights},
        adapter,
    )
    if adapter is not None and with_weights:
        check_base(adapter, folder, lambda: files.base)
    return files


def description_digest(model: ModelConfig, folder: Path, adapter: Path | None) -> str:
    """Return the digest of all files of a policy's start but the base's weights: results copy them."""
    return _digest(_describe(model, folder, adapter))


def description_on_every_node(model: ModelConfig, folder: Path, adapter: Path | None, world: World) -> str:
    """Return `description_digest`, and check that every node has the same files. Collective."""
    described = world.together(lambda: _describe(model, folder, adapter))
    _check_same_files(described, folder, world)
    return _digest(described)


def _digest(described: Mapping[str, str]) -> str:
    return text_digest(json.dumps(sorted(described.items())))


def _describe(model: ModelConfig, folder: Path, adapter: Path | None) -> dict[str, str]:
    """Return digests of all files that are read or copied beside the base's weights.

    They are its descriptions, the tokenizer with its chat template, the adapter, and what an image processor
    reads.
    """
    files = {file.name: content_digest([file]) for file in folder.glob(DESCRIPTIONS)}
    files["tokenizer"] = tokenizer_digest(tokenizer_folder(folder, adapter))
    if adapter is not None:
        files["adapter"] = content_digest([adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS])
    if model.images is not None:
        files["image processor"] = tokenizer_digest(folder, with_images=True)
    return files


def digest_on_every_node(
    folder: Path,
    store: Path,
    remote_code: bool,
    loads_whole: bool,
    world: World,
    adapter: Path | None = None,
) -> ModelFiles:
    """Return rank 0's digests, and check that every other node loads the same files. Collective.

    If `loads_whole`, every rank loads the weights; otherwise rank 0 loads and scatters them.
    """
    digest = partial(digest_model, folder, store, remote_code=remote_code, adapter=adapter)
    main = world.on_main(digest)
    # One rank of each other node reads; the ranks beside it see the same disk.
    place = world.peers[world.rank].place
    reads = not any(peer.place == place for peer in world.peers[: world.rank]) and not world.is_main
    mine = world.together(lambda: digest(with_weights=loads_whole) if reads else main)
    _check_same_files(mine.code | (mine.weights if loads_whole else main.weights), folder, world)
    return main


def _check_same_files(digests: Mapping[str, str], folder: Path, world: World) -> None:
    differences = world.differences(digests)
    if differences:
        raise ReferenceModelError(
            "nodes have different files of the same model",
            where=str(folder),
            got=first_few([f"{name}: {by_rank}" for name, by_rank in differences.items()], "other file"),
            expected="the same files on every node",
            remedy="copy the same model to every node, or put it on a file system that all nodes share",
        )


def model_label(path: str, folder: Path) -> str:
    """Return a model's readable name: the configured path, with the commit of a snapshot from the hub.

    Secrets are hidden: files of the store have the name.
    """
    commit = hub_commit(folder)
    return str(without_secrets(path if commit is None else f"{path}@{commit}"))


def _code_classes(folder: Path, remote_code: bool) -> str:
    """Return the `auto_map` of the folder's own classes if they are trusted and used, else "transformers"."""
    auto_map = read_model_json(folder / CONFIG_FILE).get("auto_map") if remote_code else None
    if not auto_map:
        return "transformers"
    text = json.dumps(auto_map, sort_keys=True)
    if "--" in text:
        raise ConfigError(
            "the model's code is in another repository, where it can change without notice",
            where=str(folder / CONFIG_FILE),
            got=f"auto_map {text}",
            remedy="copy the code into the model folder and name it in auto_map without a repository",
        )
    return text


def check_same_numerics(profile: Profile, world: World) -> None:
    """Check that all ranks compute log-probs under one numerics profile; collective."""
    differences = world.differences(profile)
    if differences:
        raise ReferenceModelError(
            "the processes of this run compute log-probs with different numerics",
            where=", ".join(differences),
            got=first_few([f"{name}: {by_rank}" for name, by_rank in differences.items()], "other"),
            remedy="run on nodes with the same devices and the same installed packages",
        )
