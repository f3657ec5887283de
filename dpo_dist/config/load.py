"""From overrides to one frozen `RunConfig`.

Hydra composes `conf/` onto the schema. What it composed is merged into the schema once more, because Hydra
lets `+loss.gamma=1` add a key that nobody reads.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_dist.config.check import check
from dpo_dist.config.explain import explain, explain_key, unset
from dpo_dist.config.fields import declaration
from dpo_dist.config.keys import in_words
from dpo_dist.config.loss_kinds import LossTermConfig
from dpo_dist.config.overrides import check_overrides, given_keys
from dpo_dist.config.parse import parse_overrides
from dpo_dist.config.presets import keep_chosen_presets
from dpo_dist.config.reference_mode import resolve_reference
from dpo_dist.config.schema import AdapterConfig, RunConfig, SourceConfig
from dpo_dist.errors import ConfigError

_Typed = TypeVar("_Typed")
HYDRA_VERSION = "1.3"
# ValueError: Hydra's own, for example for a group chosen by a number.
_COMPOSITION_FAULTS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)


def config_dir() -> Path:
    """The folder of `config.yaml` and the groups: inside an installed package, beside a checked out one."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        "the configuration files of dpo_dist are missing",
        where=str(package / "conf"),
        remedy="install the package again",
    )


def load_run_config(overrides: Sequence[str], own_folder: Path | None = None) -> RunConfig:
    """Compose, type and check one run.

    Args:
        overrides: as on the command line of a verb: `["+experiment=qwen7b", "loss.beta=0.2"]`.
        own_folder: a folder of further configuration groups, as of `--config-dir`.

    Returns:
        The configuration with every value resolved and `run.dir` filled in.

    Raises:
        ConfigError: a key, value or choice that does not exist, or options that do not go together.
    """
    return resolve(compose(overrides, own_folder), overrides, own_folder)


def compose(overrides: Sequence[str], own_folder: Path | None = None, *, name: str = "config") -> DictConfig:
    """What Hydra composes from `overrides`, not yet typed or checked.

    Raises:
        ConfigError: it cannot be composed.
    """
    parsed = parse_overrides(overrides)
    folders = _folders(own_folder)
    check_overrides(parsed, folders)

    def compose_lines(lines: Sequence[str]) -> DictConfig:
        with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(config_dir())):
            return hydra.compose(name, overrides=[*_search_path(own_folder), *lines])

    try:
        composed = compose_lines(overrides)
        keep_chosen_presets(composed, parsed, folders, compose_lines)
    except _COMPOSITION_FAULTS as fault:
        raise explain(fault, parsed, folders) from fault
    return composed


def resolve(composed: DictConfig, overrides: Sequence[str] = (), own_folder: Path | None = None) -> RunConfig:
    """Type and check what Hydra composed from `overrides`, and fill in `reference.mode` and `run.dir`.

    Raises:
        ConfigError: as `load_run_config`.
    """
    parsed, folders = parse_overrides(overrides), _folders(own_folder)
    try:
        config = _typed(RunConfig, OmegaConf.to_container(composed, resolve=True), "", folders)
    except OmegaConfBaseException as fault:
        raise explain(fault, parsed, folders) from fault
    data = replace(
        config.data,
        train=_sources("data.train", config.data.train),
        eval=_sources("data.eval", config.data.eval),
    )
    model = replace(config.model, adapter=_adapter(config.model.adapter))
    loss = replace(config.loss, terms=_terms(config.loss.terms))
    config = replace(config, data=data, model=model, loss=loss)
    config = resolve_reference(config, given_keys(parsed))
    check(config)
    return replace(config, run=replace(config.run, dir=str(run_dir(config))))


def _folders(own_folder: Path | None) -> list[Path]:
    return [config_dir(), *([own_folder] if own_folder is not None else [])]


def _search_path(own_folder: Path | None) -> list[str]:
    if own_folder is None:
        return []
    quoted = str(own_folder.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    return [f'hydra.searchpath=["file://{quoted}"]']


def run_dir(config: RunConfig) -> Path:
    """`run.dir`, by default `<run.root>/<run.name>-<digest>`: the same on every rank and in every start."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    return Path(config.run.root) / f"{config.run.name}-{run_digest(config)}"


def run_digest(config: RunConfig) -> str:
    """8 hex digits of SHA-256 over what defines the run's result; paths count as they are written."""
    canonical = json.dumps(_defining(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def defining_sections() -> list[str]:
    """Return the sections of which a key can define the run's result."""
    return [field.name for field in fields(RunConfig) if declaration(field).defines_result]


def to_yaml(config: RunConfig) -> str:
    """`config` as YAML that `from_yaml` reads and that can be used as an experiment."""
    return "# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> RunConfig:
    """The configuration that `to_yaml` wrote.

    Raises:
        ConfigError: as `load_run_config`.
    """
    try:
        loaded = cast(DictConfig, OmegaConf.create(text))
    except YAMLError as fault:
        raise explain(fault, (), _folders(None)) from fault
    return resolve(loaded)


def _schema(kind: type) -> DictConfig:
    """The typed node of a frozen dataclass; OmegaConf makes these read-only, which forbids composing."""
    node = cast(DictConfig, OmegaConf.structured(kind))
    _make_writable(node, kind)
    return node


def _make_writable(node: DictConfig, kind: type) -> None:
    OmegaConf.set_readonly(node, False)
    for field in fields(kind):
        if isinstance(field.type, type) and is_dataclass(field.type):
            _make_writable(node[field.name], field.type)


def _typed(kind: type[_Typed], content: Any, prefix: str, folders: Sequence[Path] = ()) -> _Typed:
    """`content` as a `kind`, strictly: no key beyond its own, every mandatory one set."""
    node = OmegaConf.merge(_schema(kind), content)
    for key in sorted(OmegaConf.missing_keys(node)):
        raise unset(prefix + key, folders)
    return cast(_Typed, OmegaConf.to_object(node))


def _adapter(content: Any) -> AdapterConfig | None:
    """OmegaConf types a section that may be null too, but its frozen node could not be overridden."""
    where = "model.adapter"
    if content is None:
        return None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{where} is not an adapter",
            where=where,
            got=str(content),
            expected=f"null or {in_words(AdapterConfig)}",
            remedy=f"'{where}={{r: 64, alpha: 128}}'",
        )
    try:
        return _typed(AdapterConfig, content, f"{where}.")
    except OmegaConfBaseException as fault:
        raise explain_key(fault, f"{where}.{fault.full_key}", kind=AdapterConfig) from fault


def _sources(key: str, entries: list[Any]) -> list[SourceConfig]:
    contents = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
    return _entries(key, contents, SourceConfig, f"a path, a hub name or {in_words(SourceConfig)}")


def _terms(entries: list[Any]) -> list[LossTermConfig]:
    contents = [{"kind": entry} if isinstance(entry, str) else entry for entry in entries]
    return _entries("loss.terms", contents, LossTermConfig, in_words(LossTermConfig))


def _entries(key: str, contents: list[Any], kind: type[_Typed], expected: str) -> list[_Typed]:
    """Typed one by one, so that an error tells which one it is in."""
    typed = []
    for index, content in enumerate(contents):
        where = f"{key}[{index}]"
        if not isinstance(content, dict):
            what = f"{where} is not a {'source' if kind is SourceConfig else 'term'}"
            remedy = f"write {key}=[ENTRY,ENTRY]"
            raise ConfigError(what, where=where, got=str(content), expected=expected, remedy=remedy)
        try:
            typed.append(_typed(kind, content, f"{where}."))
        except OmegaConfBaseException as fault:
            raise explain_key(fault, f"{where}.{fault.full_key}", kind=kind) from fault
    return typed


def _defining(value: Any) -> Any:
    if is_dataclass(value):
        return {
            field.name: _defining(getattr(value, field.name))
            for field in fields(value)
            if declaration(field).defines_result
        }
    return [_defining(item) for item in value] if isinstance(value, list) else value


ConfigStore.instance().store(name="schema", node=_schema(RunConfig))
