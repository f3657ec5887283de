"""Compose, type and check the configuration of a run: overrides to one frozen `RunConfig`, to YAML and back.

Hydra composes `conf/` onto the schema. The result is merged into the schema once more, because Hydra lets
`+loss.gamma=1` add a key that no code reads.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.identity import differing_keys, run_dir
from dpo_dist.config.keys import check, describe_type
from dpo_dist.config.losses import LossTermConfig
from dpo_dist.config.overrides import (
    check_overrides,
    composition_error,
    content_error,
    given_keys,
    is_within,
    missing_value,
    parse_overrides,
    with_quoted_names,
)
from dpo_dist.config.rules import RULES
from dpo_dist.config.rules_model import resolve_reference
from dpo_dist.config.schema import NO_MODEL, AdapterConfig, RunConfig
from dpo_dist.config.user_code import find_function, read_config, written_values
from dpo_dist.config.verbs import NEEDS_MODEL, TRAIN, VERBS, check_read, keys_of
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import without_secrets

_Typed = TypeVar("_Typed")
HYDRA_VERSION = "1.3"
# ValueError: Hydra's own, for example for a group chosen by a number.
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError)
# An option that an experiment sets for its own loss has no meaning for another loss.
_WHOLE_SECTIONS = ("loss",)


def config_dir() -> Path:
    """Return the folder of config.yaml and the groups, of an installed package or a source checkout."""
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
    """Compose, type and check one run; what a verb needs of it, such as `data.train`, that verb checks.

    Args:
        overrides: as on the command line of a verb: `["+experiment=qwen7b", "loss.beta=0.2"]`.
        own_folder: a folder of further configuration groups, as of `--config-dir`.

    Returns:
        The configuration with every value resolved and `run.dir` filled in.

    Raises:
        ConfigError: a key, value or preset does not exist, or values contradict each other.
    """
    lines = list(map(with_quoted_names, overrides))
    return resolve(compose(lines, own_folder), lines, own_folder)


def compose(overrides: Sequence[str], own_folder: Path | None = None, verb: str | None = None) -> DictConfig:
    """Return Hydra's composition of `overrides`, not yet typed or checked; errors suggest keys of `verb`.

    Raises:
        ConfigError: it cannot be composed.
    """
    find_function.cache_clear()
    parsed = parse_overrides(overrides)
    folders = group_folders(own_folder)
    trains = not given_keys(parsed).isdisjoint({"pairs.rounds", "experiment"})  # `resolve` knows for sure
    if verb:
        check_read(parsed, verb, trains=trains)
    check_overrides(parsed, folders, keys_of(verb or TRAIN, trains=trains), verb or "")

    def compose_lines(lines: Sequence[str]) -> DictConfig:
        with _hydra():
            return hydra.compose("config", overrides=[*_search_path(own_folder), *lines])

    try:
        composed = compose_lines(overrides)
        _apply_chosen_presets(composed, parsed, folders, compose_lines)
    except _COMPOSITION_ERRORS as error:
        raise composition_error(error, parsed, folders) from error
    return composed


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Initialise Hydra with the groups of the package; on exit, restore the state of a caller with Hydra."""
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(config_dir())):
            yield
    finally:
        GlobalHydra.instance().hydra = callers


def group_folders(own_folder: Path | None = None) -> list[Path]:
    """Return the folders of configuration groups, in the order in which Hydra searches them."""
    return [config_dir(), *([own_folder] if own_folder is not None else [])]


def _search_path(own_folder: Path | None) -> list[str]:
    if own_folder is None:
        return []
    quoted = str(own_folder.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    return [f'hydra.searchpath=["file://{quoted}"]']


def _apply_chosen_presets(
    composed: DictConfig,
    overrides: Sequence[Override],
    folders: Iterable[Path],
    compose_lines: Callable[[Sequence[str]], DictConfig],
) -> None:
    """Restore in `composed` the values of presets of the command line that an experiment replaced.

    Hydra applies groups before experiments: with `+experiment=qwen7b_lora loss=simpo` alone, the options that
    the experiment sets for its own loss would replace those of `simpo`. Values on the command line still win.
    A preset without values restores the defaults of its section.
    """
    if not any(override.key_or_group == "experiment" for override in overrides):
        return
    for group, choice in _chosen_presets(overrides).items():
        file = next(
            (file for folder in folders if (file := folder / group / f"{choice}.yaml").is_file()), None
        )
        if file is None or group not in composed:
            continue
        keys = [str(key) for key in OmegaConf.load(file) if key != "defaults"]
        is_whole = group in _WHOLE_SECTIONS or not keys
        changed = [group] if is_whole else [f"{group}.{key}" for key in keys]
        alone = compose_lines(
            [
                str(override.input_line)
                for override in overrides
                if override.key_or_group == group
                or any(is_within(override.key_or_group, key) for key in changed)
            ]
        )
        for key in alone[group] if is_whole else keys:
            composed[group][key] = alone[group][key]


def _chosen_presets(overrides: Iterable[Override]) -> dict[str, str]:
    """Return the last preset that the command line chooses of each group: `{"loss": "simpo"}`."""
    values = {override.key_or_group: override.value() for override in overrides}
    return {key: value for key, value in values.items() if isinstance(value, str) and "." not in key}


def resolve(
    composed: DictConfig,
    overrides: Sequence[str] = (),
    own_folder: Path | None = None,
    verb: str | None = None,
) -> RunConfig:
    """Type and check the composition of `overrides`, and fill in `reference.mode` and `run.dir`.

    A `verb` has this command line: it reads all of its keys, and has the keys that it needs.

    Raises:
        ConfigError: as `load_run_config`.
    """
    parsed, folders = parse_overrides(overrides), group_folders(own_folder)
    needs = VERBS[verb].needs if verb else ()
    policy = composed.get("model")
    if NEEDS_MODEL not in needs and policy is not None and OmegaConf.is_missing(policy, "path"):
        composed = cast(DictConfig, OmegaConf.merge(composed, {"model": {"path": NO_MODEL}}))
    try:
        config = _typed(RunConfig, OmegaConf.to_container(composed, resolve=True), "", folders)
    except OmegaConfBaseException as error:
        raise composition_error(error, parsed, folders) from error
    train = _entries("data.train", config.data.train, SourceConfig)
    held_out = _entries("data.eval", config.data.eval, SourceConfig)
    data = replace(config.data, train=train, eval=held_out)
    model = replace(config.model, adapter=_adapter(config.model.adapter))
    loss = replace(config.loss, terms=_entries("loss.terms", config.loss.terms, LossTermConfig))
    pairs = config.evaluation.data
    evaluation = replace(config.evaluation, data=_entries("evaluation.data", pairs, SourceConfig))
    config = replace(config, data=data, model=model, loss=loss, evaluation=evaluation)
    config = resolve_reference(config, given_keys(parsed))
    if verb:
        check_read(parsed, verb, trains=config.pairs.rounds > 0)
    check(config, (*needs, *RULES))
    return replace(config, run=replace(config.run, dir=str(run_dir(config))))


def to_yaml(config: RunConfig) -> str:
    """Return `config` as YAML without secrets, for `from_yaml` or as an experiment."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return "# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(without_secrets(values)))


def from_yaml(text: str) -> RunConfig:
    """Return the configuration that `to_yaml` wrote.

    Raises:
        ConfigError: as `load_run_config`.
    """
    try:
        written_values(text)
        loaded = cast(DictConfig, OmegaConf.create(text))
    except (YAMLError, ValueError) as error:
        raise composition_error(error, (), group_folders()) from error
    return resolve(loaded)


def changed_keys(file: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys by which `config` is another run than the config.yaml `file`: `{KEY: (OLD, NEW)}`.

    Empty if this version cannot read the file, which has no secrets.
    """
    try:
        found = differing_keys(from_yaml(read_config(file)), config)
    except (OSError, ValueError, ConfigError):
        return {}
    return {key: (old, new) for key, (old, new) in found.items() if old != without_secrets(new)}


def _schema(kind: type) -> DictConfig:
    """Return the typed node of a frozen dataclass; OmegaConf makes it read-only, which forbids composing."""
    node = cast(DictConfig, OmegaConf.structured(kind))
    _make_writable(node, kind)
    return node


def _make_writable(node: DictConfig, kind: type) -> None:
    OmegaConf.set_readonly(node, False)
    for field in fields(kind):
        if isinstance(field.type, type) and is_dataclass(field.type):
            _make_writable(node[field.name], field.type)


def _typed(kind: type[_Typed], content: Any, prefix: str, folders: Sequence[Path] = ()) -> _Typed:
    """Return `content` as a `kind`, strictly: without unknown keys, with all mandatory ones."""
    node = OmegaConf.merge(_schema(kind), content)
    for key in sorted(OmegaConf.missing_keys(node)):
        raise missing_value(prefix + key, folders)
    return cast(_Typed, OmegaConf.to_object(node))


def _mapping(kind: type[_Typed], content: Any, where: str) -> _Typed:
    """Return the mapping at the key `where` as a `kind`."""
    try:
        return _typed(kind, content, f"{where}.")
    except OmegaConfBaseException as error:
        raise content_error(error, f"{where}.{error.full_key}", kind=kind) from error


def _adapter(content: Any) -> AdapterConfig | None:
    """Return a typed adapter; the schema has `Any`, as a node that may be null cannot be made writable."""
    if content is not None and not isinstance(content, dict):
        meant = f"path: {content}" if "/" in str(content) else "r: 64, alpha: 128"
        raise ConfigError(
            "model.adapter is not an adapter",
            where="model.adapter",
            got=str(content),
            expected=f"null or {describe_type(AdapterConfig)}",
            remedy=f"write 'model.adapter={{{meant}}}'",
        )
    return None if content is None else _mapping(AdapterConfig, content, "model.adapter")


def _entries(key: str, entries: list[Any], kind: type[_Typed]) -> list[_Typed]:
    """Return the entries of a list, each typed by itself so that an error names its index."""
    main, name = ("path", "source") if kind is SourceConfig else ("kind", "term")
    typed = []
    for index, entry in enumerate(entries):
        content, where = {main: entry} if isinstance(entry, str) else entry, f"{key}[{index}]"
        if not isinstance(content, dict):
            raise ConfigError(
                f"{where} is not a {name}",
                where=where,
                got=str(content),
                expected=f"a {main}{', a hub name' if kind is SourceConfig else ''} or {describe_type(kind)}",
                remedy=f"write {key}=[ENTRY,ENTRY]",
            )
        typed.append(_mapping(kind, content, where))
    return typed


ConfigStore.instance().store(name="schema", node=_schema(RunConfig))
