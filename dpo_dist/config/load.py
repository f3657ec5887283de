"""From overrides to one frozen `RunConfig`, and from a verb's command line to its exit code.

Hydra composes `conf/` onto the schema. What it composed is merged into the schema once more, because Hydra
lets `+loss.gamma=1` add a key that nobody reads.
"""

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_dist.config.check import check
from dpo_dist.config.explain import explain, explain_key, in_words, unset
from dpo_dist.config.presets import demand_presets_kept
from dpo_dist.config.schema import AdapterConfig, RunConfig, SourceConfig
from dpo_dist.errors import ConfigError, DpoDistError, disk_error

_Typed = TypeVar("_Typed")
_HYDRA_VERSION = "1.3"
_RANK_0_SECONDS = 60
_DEFINING_SECTIONS = ("model", "data", "loss", "reference", "optim", "trainer")
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


def load_run_config(overrides: Sequence[str]) -> RunConfig:
    """Compose, type and check one run.

    Args:
        overrides: as on the command line of a verb: `["+experiment=qwen7b", "loss.beta=0.2"]`.

    Returns:
        The configuration with every value resolved and `run.dir` filled in.

    Raises:
        ConfigError: a key, value or choice that does not exist, or options that do not go together.
    """
    try:
        with hydra.initialize_config_dir(version_base=_HYDRA_VERSION, config_dir=str(config_dir())):
            composed = hydra.compose("config", overrides=list(overrides))
    except _COMPOSITION_FAULTS as fault:
        raise explain(fault, overrides, config_dir()) from fault
    demand_presets_kept(composed, overrides, [config_dir()])
    return resolve(composed, overrides)


def resolve(composed: DictConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """Type and check what Hydra composed from `overrides`, and fill in `run.dir`.

    Raises:
        ConfigError: as `load_run_config`.
    """
    try:
        config = _typed(RunConfig, OmegaConf.to_container(composed, resolve=True), "")
    except OmegaConfBaseException as fault:
        raise explain(fault, overrides, config_dir()) from fault
    data = replace(
        config.data,
        train=_sources("data.train", config.data.train),
        eval=_sources("data.eval", config.data.eval),
    )
    model = replace(config.model, adapter=_adapter(config.model.adapter))
    config = replace(config, data=data, model=model)
    check(config)
    return replace(config, run=replace(config.run, dir=str(run_dir(config))))


def run_verb(main: Callable[[RunConfig], int]) -> NoReturn:
    """Run `main` with the configuration that the command line describes, and end with its exit code.

    The command line is Hydra's (overrides, `--config-dir`, `--cfg job`, `--help`, `--info`). A
    `DpoDistError` is printed as one block, by the first rank only; other exceptions keep their traceback.
    """
    try:
        config = _from_command_line()
        exit_code = 0 if config is None else main(config)
    except DpoDistError as error:
        _print(error)
        exit_code = error.exit_code
    except Exception as fault:
        told = disk_error(fault)
        if told is not None:
            _print(told)
        else:
            traceback.print_exc()
        exit_code = 1 if told is None else told.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written, and at interpreter exit threads of communication libraries may still abort the process.
    os._exit(exit_code)


def _print(error: DpoDistError) -> None:
    """Print `error` if this process is the one that does.

    Before the processes have joined, all have most errors alike. The launcher ends the others once rank 0 has
    printed its own and left; a rank that it does not end is alone with its error.
    """
    rank = int(os.environ.get("RANK", "0"))
    if error.speaker is None and rank > 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(error.exit_code))
        time.sleep(_RANK_0_SECONDS)
    if error.speaker in (None, rank):
        sys.stderr.write(error.block() + "\n")


def run_dir(config: RunConfig) -> Path:
    """`run.dir`, by default `<run.root>/<run.name>-<digest>`: the same on every rank and in every start."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    return Path(config.run.root) / f"{config.run.name}-{run_digest(config)}"


def run_digest(config: RunConfig) -> str:
    """8 hex digits of SHA-256 over what defines the run's result; paths count as they are written."""
    defining = {name: _defining(getattr(config, name)) for name in _DEFINING_SECTIONS}
    canonical = json.dumps(defining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


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
        raise explain(fault, (), config_dir()) from fault
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


def _typed(kind: type[_Typed], content: Any, prefix: str) -> _Typed:
    """`content` as a `kind`, strictly: no key beyond its own, every mandatory one set."""
    node = OmegaConf.merge(_schema(kind), content)
    for key in sorted(OmegaConf.missing_keys(node)):
        raise unset(prefix + key, config_dir())
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
    sources = []
    for index, entry in enumerate(entries):
        where = f"{key}[{index}]"
        if not isinstance(entry, str | dict):
            raise ConfigError(
                f"{where} is not a source",
                where=where,
                got=str(entry),
                expected=f"a path, a hub name or {in_words(SourceConfig)}",
            )
        content = {"path": entry} if isinstance(entry, str) else entry
        try:
            sources.append(_typed(SourceConfig, content, f"{where}."))
        except OmegaConfBaseException as fault:
            raise explain_key(fault, f"{where}.{fault.full_key}", kind=SourceConfig) from fault
    return sources


def _defining(value: Any) -> Any:
    if is_dataclass(value):
        return {
            field.name: _defining(getattr(value, field.name))
            for field in fields(value)
            if field.metadata.get("defines_result", True)
        }
    return [_defining(item) for item in value] if isinstance(value, list) else value


def _from_command_line() -> RunConfig | None:
    """The configuration of `sys.argv`, or None where Hydra was only asked to show something."""
    arguments = get_args_parser().parse_args()
    if arguments.multirun or any("hydra.mode=" in override for override in arguments.overrides):
        raise ConfigError(
            "one command is one run",
            where="command line",
            got="--multirun or hydra.mode",
            remedy="to sweep, launch one process group (one job) for each value",
        )
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        composed.append(config)

    # Otherwise Hydra prints what went wrong in its own way and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base=_HYDRA_VERSION, config_path=str(config_dir()), config_name="config")(keep)()
    except _COMPOSITION_FAULTS as fault:
        raise explain(fault, arguments.overrides, config_dir()) from fault
    if not composed:
        return None
    own = [Path(arguments.config_dir)] if arguments.config_dir else []
    demand_presets_kept(composed[0], arguments.overrides, [config_dir(), *own])
    return resolve(composed[0], arguments.overrides)


ConfigStore.instance().store(name="schema", node=_schema(RunConfig))
