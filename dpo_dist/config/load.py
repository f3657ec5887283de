"""Compose, type and check the configuration of a run: a command to one frozen `RunConfig`, and YAML.

Hydra composes conf/config.yaml, presets and experiments. YAML files and words of the command are layers above
it, in which presets come before keys. Pydantic types the result.
"""

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import getitem, or_
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dpo_dist.config.identity import differing_keys, run_dir
from dpo_dist.config.keys import COMMAND_LINE, is_within, readers, run_keys
from dpo_dist.config.mistakes import (
    SCHEMA,
    assignment,
    composition_error,
    likely,
    preset_names,
    raise_all,
    unknown_key,
    unknown_preset,
    unreadable,
    wrong_values,
)
from dpo_dist.config.rules import NEEDS, RULES, Rule, check, keys_of, resolve_reference
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.user_code import find_function, written_values
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import without_secrets

_COMPOSITION_ERRORS = (
    ConfigError,
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    RecursionError,
)
_ROOT = "dpo_dist"
"""The primary configuration: config.yaml, with the folders in which Hydra searches."""


def config_dir() -> Path:
    """Return the folder of config.yaml and the groups, of an installed package or a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def group_folders(own_folder: Path | None = None) -> list[Path]:
    """Return the folders of configuration groups, in the order in which they are searched."""
    return [config_dir()] if own_folder is None else [own_folder.resolve(), config_dir()]


def load_run_config(
    words: Sequence[str],
    own_folder: Path | None = None,
    *,
    verb: str = "",
    former: Mapping[str, Any] | None = None,
    mistakes: Iterable[ConfigError] = (),
) -> RunConfig:
    """Compose, type and check one run; what a verb needs of it, such as `data.train`, only with `verb`.

    `words` are those of a command: `["my.yaml", "+experiment=qwen7b", "loss.beta=0.2"]`; `own_folder` has
    further groups, as `--config-dir`. A `verb` reads all keys of the command, and has the keys that it needs.
    `former` are values of a run's config.yaml, which the command changes; `mistakes` were found before.

    Raises:
        ConfigError: a key, value or preset does not exist, or values contradict each other; all mistakes.
    """
    find_function.cache_clear()
    command = _Command(words, own_folder, verb, former, mistakes)
    values = command.composed()
    try:
        config = SCHEMA.validate_python(values)
    except ValidationError as error:
        raise_all([*command.mistakes, *wrong_values(error, command.origin)])
        raise
    raise_all(command.mistakes)
    return checked(config, given_keys(command.overrides), NEEDS.get(verb, ()))


def checked(config: RunConfig, given: Collection[str] = (), needs: Iterable[Rule] = ()) -> RunConfig:
    """Check all rules, and fill in `reference.mode` and `run.dir`; `given`: the keys of the command."""
    config = resolve_reference(config, given)
    check(config, (*needs, *RULES))
    return replace(config, run=replace(config.run, dir=str(run_dir(config))))


def given_keys(overrides: Iterable[Override]) -> frozenset[str]:
    """Return the keys that a command line gives, with those inside of mappings."""
    keys = set()
    for override in overrides:
        keys.add(override.key_or_group)
        if isinstance(value := override.value(), dict):
            keys |= {f"{override.key_or_group}.{name}" for name in value}
    return frozenset(keys)


def parse_overrides(words: Iterable[str]) -> tuple[list[Override], list[str]]:
    """Return the overrides of a command line, and the words that are none."""
    parsed, unread = [], []
    for word in words:
        key, equals, value = word.partition("=")
        hint, override = run_keys().get(key.lstrip("+")), _parsed(word)
        kinds = {hint, *get_args(hint)}
        takes_text = str in kinds and kinds.isdisjoint({int, float})  # `run.name=1e3` is that text
        if equals and (override is None or (takes_text and type(override.value()) in (int, float))):
            # Hydra's grammar has no `~/m`, `é` or `NAME=PATH` without quotes.
            if re.fullmatch(r"\[[^\[\]{}\"']*\]", value):
                value = "[" + ",".join(f'"{entry.strip()}"' for entry in value[1:-1].split(",")) + "]"
            elif not set(value) & set("[]{}\"',\\") and value == value.strip():
                value = f'"{value}"'
            override = _parsed(f"{key}={value}")
        if override is None or not override.key_or_group:
            unread.append(word)
        else:
            parsed.append(override)
    return parsed, unread


def _parsed(line: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException:
        return None


@dataclass(frozen=True)
class _Layer:
    """The keys of a file, and the presets that it chooses, which come below its keys."""

    name: str
    values: Mapping[str, Any]
    presets: Mapping[str, str]


class _Command:
    """A command line: its layers, its overrides, and the mistakes in both."""

    def __init__(
        self,
        words: Sequence[str],
        own_folder: Path | None,
        verb: str,
        former: Mapping[str, Any] | None,
        mistakes: Iterable[ConfigError],
    ) -> None:
        files = [word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]
        parsed, unread = parse_overrides(word for word in words if word not in files)
        self.mistakes = list(mistakes) + ([unreadable(unread)] if unread else [])
        self.folders, self.verb = group_folders(own_folder), verb
        found = [(override, self._mistake(override)) for override in parsed]
        self.mistakes += [mistake for _, mistake in found if mistake is not None]
        self.overrides = [override for override, mistake in found if mistake is None]
        self.added: dict[str, list[str]] = {}
        """Choices of experiments and other groups that are no section."""
        typed = {}
        for override in filter(self._is_choice, self.overrides):
            group = override.key_or_group
            if group in run_keys():
                typed[group] = str(override.value())
            else:
                self.added.setdefault(group, []).extend(_names(override))
        self.layers = [layer for file in files if (layer := self._layer(file)) is not None]
        if former is not None:
            self.layers.append(_Layer("config.yaml", former, {}))
        self.layers.append(_Layer(COMMAND_LINE, {}, typed))
        self.chosen = {group: name for layer in self.layers for group, name in layer.presets.items()}
        self._of_groups: list[tuple[str, _Layer]] = []

    def composed(self) -> dict[str, Any]:
        """Return the values of the command; without overrides and files that are mistakes."""
        defaults = _plain(RunConfig())
        config = OmegaConf.create(defaults)
        try:
            self._of_groups = self._composed_files()
            config.merge_with(*(file.values for group, file in self._of_groups if group not in self.chosen))
            for layer in self.layers:
                for group in [group for group, name in layer.presets.items() if name == self.chosen[group]]:
                    preset = OmegaConf.merge(
                        {}, *(file.values for one, file in self._of_groups if one == group)
                    )
                    if group == "loss" or preset in ({}, {group: {}}):
                        config[group] = defaults[group]
                    config.merge_with(preset)
                config.merge_with(layer.values)
            for override in self.overrides:
                if not self._is_choice(override):
                    key, value = override.key_or_group, override.value()
                    merges = get_origin(run_keys().get(key)) is not list
                    OmegaConf.update(config, key, value, merge=merges, force_add=True)
            whole = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        except _COMPOSITION_ERRORS as error:
            self.mistakes.append(composition_error(error, self.folders))
            raise_all(self.mistakes)
        if self.verb:
            trains = bool(OmegaConf.select(config, "pairs.rounds"))
            self.mistakes += _not_read(self.overrides, self.verb, trains=trains)
        return whole

    def _composed_files(self) -> list[tuple[str, _Layer]]:
        """Return the files that Hydra composes, the lowest first, each with the group that it belongs to."""
        experiments = [self._file(f"{group}/{name}") for group, names in self.added.items() for name in names]
        presets = [self._keys(file)[1] for file in experiments]  # of one written like a file of the command
        choices = _words("", {**reduce(or_, presets, {}), **self.chosen}) + _words("+", self.added)
        with _hydra(self.folders):
            loader = GlobalHydra.instance().config_loader()
            entries = loader.compute_defaults_list(_ROOT, choices, RunMode.RUN).defaults
        above = {entry.config_path: entry.parent for entry in entries}
        files = []
        for entry in entries:
            name = top = str(entry.config_path)
            if name.startswith("hydra/") or not (file := self._file(name)).is_file():
                continue
            while "/" in (above.get(top) or ""):  # a preset may be composed of others
                top = above[top]
            values, package = self._keys(file)[2], (entry.package or "").split(".")
            for section in reversed(package) if package[0] in run_keys() else ():
                values = {section: values}
            files.append((top.rpartition("/")[0], _Layer(f"{name}.yaml", values, {})))
        return files

    def origin(self, key: str) -> str:
        """Return the override, file or experiment that gives a key; the last one counts."""
        for override in reversed(self.overrides):
            given = override.key_or_group
            if is_within(key, given) or is_within(given, key):
                return key if len(key) > len(given) else f"{COMMAND_LINE}: {override.input_line}"
        for layer in reversed([*(file for _, file in self._of_groups), *self.layers]):
            with contextlib.suppress(KeyError, TypeError):
                reduce(getitem, key.partition("[")[0].split("."), layer.values)
                return f"{key} in {layer.name}"
        return key

    def _file(self, name: str) -> Path:
        """Return the file of a preset or experiment: `loss/simpo`."""
        files = [folder / f"{name}.yaml" for folder in self.folders]
        return next(filter(Path.is_file, files), files[-1])

    def _is_choice(self, override: Override) -> bool:
        is_group = any((folder / override.key_or_group).is_dir() for folder in self.folders)
        return is_group and not isinstance(override.value(), dict)

    def _mistake(self, override: Override) -> ConfigError | None:
        """Return the error of an override whose key, preset or form does not exist."""
        key, line = override.key_or_group, str(override.input_line)
        is_choice = self._is_choice(override)
        if not is_choice and key.partition("[")[0] not in run_keys():
            return unknown_key(key, line.partition("=")[2], where=f"{COMMAND_LINE}: {line}")
        if override.is_delete() or override.is_sweep_override():
            message, remedy = f"{key} has one value", f"write {key}=VALUE, a list in brackets, {key}=[a,b]"
        elif is_choice:
            known = preset_names(key, self.folders)
            if unknown := [name for name in _names(override) if name not in known]:
                return unknown_preset(key, unknown[0], self.folders)
            if key not in run_keys() or isinstance(override.value(), str):
                return None
            sum_of_losses = f" or write {assignment(key, line.partition('=')[2])}" if key == "loss" else ""
            message, remedy = f"{key} is one preset", f"choose {key}={_names(override)[0]}{sum_of_losses}"
        else:
            return None
        return ConfigError(message, where=COMMAND_LINE, got=line, remedy=remedy)

    def _layer(self, file: str) -> _Layer | None:
        """Return the layer of a file of the command; its list of `defaults` names presets."""
        try:
            entries, presets, values = self._keys(Path(file))
        except _COMPOSITION_ERRORS as error:
            self.mistakes.append(composition_error(error, self.folders))
            return None
        for entry in entries:
            if isinstance(entry, dict):
                for written, name in entry.items():
                    group = written.split()[-1].lstrip("/")
                    presets[group] = str(self._named(group, name))
            elif entry != "_self_":
                values["defaults"] = entry  # an unknown key
        for group, preset in list(presets.items()):
            if preset not in preset_names(group, self.folders):
                self.mistakes.append(unknown_preset(group, presets.pop(group), self.folders))
        return _Layer(file, values, presets)

    def _keys(self, file: Path) -> tuple[list[Any], dict[str, str], dict[str, Any]]:
        """Return the list of `defaults` of a file, the sections that are names of presets, and the keys."""
        try:
            content = OmegaConf.to_container(OmegaConf.load(file))
        except OSError as error:
            remedy = "check the path; it is relative to the working directory"
            raise ConfigError(
                "this file of keys cannot be read", where=str(file), got=str(error.strerror), remedy=remedy
            ) from error
        if not isinstance(content, dict):
            remedy = "write keys: 'loss: {beta: 0.2}'"
            raise ConfigError("this file has no keys", where=str(file), remedy=remedy)
        entries, presets = content.pop("defaults", []), {}
        values = OmegaConf.create()
        for key, given in content.items():
            value = self._named(str(key), given)
            if isinstance(value, str) and key in run_keys() and preset_names(str(key), self.folders):
                presets[str(key)] = value
            elif value not in (None, "", [], {}) or "." in str(key) or key in run_keys():
                # An empty key of another trainer's file says nothing.
                OmegaConf.update(values, str(key), value, force_add=True)  # `loss.beta: 0.2` too
        whole = cast(dict[str, Any], OmegaConf.to_container(values))
        return entries if isinstance(entries, list) else [entries], presets, whole

    def _named(self, group: str, value: Any) -> Any:
        """Return a value of a group; for false, as YAML reads a bare `off`, its preset `off` or `none`."""
        found = likely("false", preset_names(group, self.folders)) if value is False else []
        return found[0] if found else value


@contextlib.contextmanager
def _hydra(folders: Sequence[Path]) -> Iterator[None]:
    """Initialise Hydra with groups of folders, the first one first; on exit, restore that of the caller."""
    search = {"hydra": {"searchpath": [f"file://{folder}" for folder in folders[1:]]}}
    ConfigStore.instance().store(_ROOT, {"defaults": ["config", "_self_"], **search})
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folders[0])):
            yield
    finally:
        GlobalHydra.instance().hydra = callers


def _words(sign: str, choices: Mapping[str, str | list[str]]) -> list[str]:
    """Return choices of groups as overrides; JSON quotes a name as Hydra does."""
    return [f"{sign}{group}={json.dumps(names, ensure_ascii=False)}" for group, names in choices.items()]


def _names(override: Override) -> list[str]:
    value = override.value()
    return [str(name) for name in value] if isinstance(value, list) else [str(value)]


def _not_read(overrides: Iterable[Override], verb: str, *, trains: bool) -> list[ConfigError]:
    """Return an error for each override whose key a verb does not read; files may serve several verbs."""
    own, mistakes = keys_of(verb, trains=trains), []
    for override in overrides:
        group, value = override.key_or_group, override.value()
        for name in [f"{group}.{name}" for name in value] if isinstance(value, dict) else [group]:
            key = "reference.mode" if name == "reference" else name.partition("[")[0]
            if key in own or key not in run_keys():
                continue
            where = f"{COMMAND_LINE}: {override.input_line}"
            remedy = f"remove it: it is read by {' and '.join(readers(key))}"
            mistakes.append(ConfigError(f"{verb} does not read {key}", where=where, remedy=remedy))
    return mistakes


def to_yaml(config: RunConfig) -> str:
    """Return `config` as YAML without secrets, for `from_yaml` or as an experiment."""
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(_plain(config))))


def from_yaml(text: str) -> RunConfig:
    """Return the configuration that `to_yaml` wrote."""
    try:
        return checked(SCHEMA.validate_python(written_values(text)))
    except ValidationError as error:
        raise_all(wrong_values(error, lambda key: key))
        raise


def changed_keys(file: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys by which `config` is another run than the config.yaml `file`: `{KEY: (OLD, NEW)}`.

    Empty if this version cannot read the file, which has no secrets.
    """
    try:
        found = differing_keys(from_yaml(file.read_text(encoding="utf-8")), config)
    except (OSError, ValueError, ConfigError):
        return {}
    return {key: (old, new) for key, (old, new) in found.items() if old != without_secrets(new)}


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the values of a configuration without enums."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values
