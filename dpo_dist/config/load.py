"""Compose, type and check the configuration of a run: a command to one frozen `RunConfig`, to YAML and back.

Hydra composes defaults, presets, experiments and the command line; pydantic types the result.
"""

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast, get_origin

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dpo_dist.config.identity import differing_keys, run_dir
from dpo_dist.config.keys import COMMAND_LINE, Rule, check, raise_all, run_keys
from dpo_dist.config.mistakes import (
    SCHEMA,
    assignment,
    composition_error,
    preset_names,
    unknown_key,
    unknown_preset,
    unreadable,
    with_quoted_names,
    wrong_values,
)
from dpo_dist.config.names import values_of
from dpo_dist.config.reference import resolve_reference
from dpo_dist.config.rules import RULES
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.user_code import find_function, read_config, written_values
from dpo_dist.config.verbs import TRAIN, VERBS, keys_of, not_read
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.text import without_secrets

# ValueError: Hydra's own, for example for a group chosen by a number.
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
_EXPERIMENT = "experiment"
_OWN_FILES = "files_of_the_command"
_FORMER = "run_of_the_command"


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


def group_folders(own_folder: Path | None = None) -> list[Path]:
    """Return the folders of configuration groups, in the order in which Hydra searches them."""
    return [config_dir(), *([own_folder] if own_folder is not None else [])]


def load_run_config(
    words: Sequence[str],
    own_folder: Path | None = None,
    *,
    verb: str = "",
    former: Mapping[str, Any] | None = None,
    mistakes: Iterable[ConfigError] = (),
) -> RunConfig:
    """Compose, type and check one run; what a verb needs of it, such as `data.train`, only with `verb`.

    Args:
        words: as on the command line of a verb: `["my.yaml", "+experiment=qwen7b", "loss.beta=0.2"]`.
        own_folder: a folder of further configuration groups, as of `--config-dir`.
        verb: it reads all keys of the command, and has the keys that it needs.
        former: values of a run's config.yaml, which the command changes.
        mistakes: that were found in the command before.

    Returns:
        The configuration with every value resolved, and `reference.mode` and `run.dir` filled in.

    Raises:
        ConfigError: a key, value or preset does not exist, or values contradict each other; all mistakes.
    """
    find_function.cache_clear()
    command = _Command(words, own_folder, verb, mistakes)
    values = command.composed(former)
    config = None
    try:
        config = SCHEMA.validate_python(values)
    except ValidationError as error:
        command.mistakes += wrong_values(error, command.origin)
    raise_all(command.mistakes)
    assert config is not None
    return checked(config, given_keys(command.overrides), VERBS[verb].needs if verb else ())


def checked(config: RunConfig, given: Collection[str] = (), needs: Iterable[Rule] = ()) -> RunConfig:
    """Check the rules of a typed configuration, and fill in `reference.mode` and `run.dir`.

    Args:
        config: with values that fit the schema.
        given: the keys on the command line.
        needs: further rules.
    """
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


def parse_overrides(lines: Iterable[str]) -> tuple[list[Override], list[str]]:
    """Return the overrides of a command line, and the words that are none."""
    parser, parsed, unread = OverridesParser.create(), [], []
    for line in lines:
        try:
            override = parser.parse_override(with_quoted_names(line))
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            unread.append(line)
        else:
            parsed.append(override)
    return parsed, unread


class _Command:
    """A command line: its overrides, the files that it names, and the mistakes in both."""

    def __init__(
        self, words: Sequence[str], own_folder: Path | None, verb: str, mistakes: Iterable[ConfigError]
    ) -> None:
        files = [word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]
        parsed, unread = parse_overrides(word for word in words if word not in files)
        self.mistakes = [*mistakes, *([unreadable(unread)] if unread else [])]
        self.folders = group_folders(own_folder)
        self.verb = verb
        self.sources: list[tuple[str, dict[str, Any]]] = []
        """Names and contents of experiments and of own files."""
        trains = not given_keys(parsed).isdisjoint({"pairs.rounds", _EXPERIMENT})  # `composed` knows for sure
        self._own = keys_of(verb or TRAIN, trains=trains)
        self.overrides = []
        for override in parsed:
            if (mistake := self._mistake(override)) is None:
                self.overrides.append(override)
            else:
                self.mistakes.append(mistake)
        self._file_values = self._read_files(files)

    def composed(self, former: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the values of the command; without overrides and files that are mistakes."""
        lines = [_line(override) for override in self.overrides if override.key_or_group != _EXPERIMENT]
        try:
            experiments = self._experiments()
            for name, values in ((_FORMER, former), (_OWN_FILES, self._file_values)):
                if values:
                    _store(name, values)
                    experiments.append(name)
            found = self._compose(
                [f"+{_EXPERIMENT}=[{','.join(experiments)}]", *lines] if experiments else lines
            )
            if experiments:
                self._apply_chosen_presets(found, lines)
            whole = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(found), resolve=True))
        except _COMPOSITION_ERRORS as error:
            self.mistakes.append(composition_error(error, self.folders))
            raise_all(self.mistakes)
        if self.verb:
            self.mistakes += not_read(self.overrides, self.verb, trains=bool(whole["pairs"]["rounds"]))
        return whole

    def origin(self, key: str) -> str:
        """Return the override, file or experiment that gives a key; the last one counts."""
        for override in reversed(self.overrides):
            given = override.key_or_group
            if is_within(key, given) or is_within(given, key):
                return key if len(key) > len(given) else f"{COMMAND_LINE}: {override.input_line}"
        for name, values in reversed(self.sources):
            inner: Any = values
            for part in key.partition("[")[0].split("."):
                inner = inner.get(part) if isinstance(inner, dict) and part in inner else _ABSENT
            if inner is not _ABSENT:
                return f"{key} in {name}"
        return key

    def _mistake(self, override: Override) -> ConfigError | None:
        """Return the error of an override whose key, group or form does not exist."""
        key, line = override.key_or_group, str(override.input_line)
        is_group = any((folder / key).is_dir() for folder in self.folders)
        if is_group and not override.is_sweep_override() and not isinstance(override.value(), dict):
            return self._wrong_choice(override)
        if not is_group and key.partition("[")[0] not in run_keys():
            text = line.partition("=")[2]
            where = f"{COMMAND_LINE}: {line}"
            return unknown_key(key, text, where=where, own=self._own, is_strict=bool(self.verb))
        message = remedy = ""
        if isinstance(override.value(), dict) and get_origin(run_keys().get(key)) is list:
            message = f"{key} has the wrong type"
            remedy = f"write {assignment(key, line.partition('=')[2])}"
        elif override.is_delete():
            message, remedy = f"{key} cannot be removed", f"set {key} to another value, or remove {line}"
        elif override.is_sweep_override():
            message = f"{key} has several values"
            remedy = "a list is written in brackets, KEY=[a,b]; to sweep, start one job for each value"
        return ConfigError(message, where=COMMAND_LINE, got=line, remedy=remedy) if message else None

    def _wrong_choice(self, override: Override) -> ConfigError | None:
        group, value, line = override.key_or_group, override.value(), str(override.input_line)
        known = preset_names(group, self.folders)
        names = value if isinstance(value, list) else [value]
        if group != _EXPERIMENT and not isinstance(value, str):
            remedy = f"choose one of {', '.join(known)}, or remove {group}"
            if isinstance(value, list) and group == "loss":
                terms = ", ".join(f"{{kind: {(*values_of(name), name)[0]}, weight: 1}}" for name in value)
                remedy = f"weigh them: 'loss.terms=[{terms}]'"
            elif isinstance(value, list) and group == "data":
                remedy = f"name the sources: 'data.train=[{', '.join(map(str, value))}]'"
            return ConfigError(f"{group} is chosen by name", where=COMMAND_LINE, got=line, remedy=remedy)
        return next(
            (
                unknown_preset(group, str(name), self.folders, self.verb)
                for name in names
                if name not in known
            ),
            None,
        )

    def _experiments(self) -> list[str]:
        """Return the chosen experiments; one without `# @package` is read as if it had that line."""
        names: list[str] = []
        for override in self.overrides:
            if override.key_or_group == _EXPERIMENT:
                value = override.value()
                names += value if isinstance(value, list) else [str(value)]
        for index, name in enumerate(names):
            file = next(
                file for folder in self.folders if (file := folder / _EXPERIMENT / f"{name}.yaml").is_file()
            )
            values = _read_keys(file)
            self.sources.append((f"{_EXPERIMENT}/{name}.yaml", values))
            if not re.search(r"^#\s*@package", file.read_text(encoding="utf-8"), re.MULTILINE):
                names[index] = f"{name}_without_package"
                _store(names[index], values)
        return names

    def _read_files(self, files: Iterable[str]) -> dict[str, Any]:
        """Return the merged values of the YAML files of the command.

        A section that is a text is a preset: it replaces the section of the files before, and the file's own
        keys apply to it.
        """
        merged: dict[str, Any] = {}
        chosen: dict[str, str] = {}
        for file in files:
            try:
                content = _read(Path(file))
                presets = {
                    group: content.pop(group)
                    for group, name in [*content.items()]
                    if isinstance(name, str) and group != _EXPERIMENT and preset_names(group, self.folders)
                }
                if "defaults" in content:
                    raise ConfigError(
                        "a file of keys has no list of defaults",
                        where=file,
                        remedy="name a preset by its group, such as 'loss: ipo', and remove the list",
                    )
                values = _nested(content, file)
            except _COMPOSITION_ERRORS as error:
                self.mistakes.append(composition_error(error, self.folders))
                continue
            except ConfigError as error:
                self.mistakes.append(error)
                continue
            self.sources.append((file, values))
            for group, name in presets.items():
                merged.pop(group, None)
                if name in preset_names(group, self.folders):
                    chosen[group] = name
                else:
                    self.mistakes.append(unknown_preset(group, name, self.folders, self.verb))
            merged = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(merged, values)))
        return merged | {"defaults": [{f"override /{group}": name} for group, name in chosen.items()]}

    def _compose(self, lines: Sequence[str]) -> dict[str, Any]:
        """Return Hydra's composition, with its interpolations."""
        searched = []
        if self.folders[1:]:
            quoted = str(self.folders[1].resolve()).replace("\\", "\\\\").replace('"', '\\"')
            searched = [f'hydra.searchpath=["file://{quoted}"]']
        with _hydra():
            composed = hydra.compose("config", overrides=[*searched, *lines])
        return cast(dict[str, Any], OmegaConf.to_container(composed))

    def _apply_chosen_presets(self, composed: dict[str, Any], lines: Sequence[str]) -> None:
        """Restore in `composed` the values of presets of the command line that an experiment replaced.

        Hydra applies groups before experiments: with `+experiment=qwen7b_lora loss=simpo` alone, the options
        that the experiment sets for its own loss would replace those of `simpo`. Values on the command line
        still win. A preset without values restores the defaults of its section.
        """
        values = {override.key_or_group: override.value() for override in self.overrides}
        values.pop(_EXPERIMENT, None)
        chosen = {
            group: file
            for group, name in values.items()
            for folder in self.folders
            if isinstance(name, str) and (file := folder / group / f"{name}.yaml").is_file()
        }
        alone = self._compose(lines) if chosen else {}
        for group, file in chosen.items():
            keys = [key for key in _read_keys(file) if key != "defaults"]
            # An option that an experiment sets for its own loss has no meaning for another loss.
            for key in alone[group] if group == "loss" or not keys else keys:
                composed[group][key] = alone[group][key]


_ABSENT = object()


def is_within(key: str, above: str) -> bool:
    """Return whether `key` is `above` or below it."""
    return key == above or key.startswith((f"{above}.", f"{above}["))


def _line(override: Override) -> str:
    """Return an override for Hydra; a key may be one that the defaults leave out, as of an adapter."""
    line = str(override.input_line)
    is_key = "." in override.key_or_group or isinstance(override.value(), dict)
    return f"++{line.lstrip('+')}" if is_key else line.lstrip("+")


def _store(name: str, values: Mapping[str, Any]) -> None:
    """Make values an experiment for Hydra."""
    ConfigStore.instance().store(name, dict(values), group=_EXPERIMENT, package="_global_")


def _read_keys(file: Path) -> dict[str, Any]:
    return _nested(_read(file), str(file))


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file of keys."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except OSError as error:
        remedy = "check the path; it is relative to the working directory"
        raise ConfigError(
            "this file of keys cannot be read", where=str(file), got=str(error.strerror), remedy=remedy
        ) from error
    if not isinstance(content, dict):
        raise ConfigError("this file has no keys", where=str(file), remedy="write keys: 'loss: {beta: 0.2}'")
    return {str(key): value for key, value in content.items()}


def _nested(content: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return the keys of a file, `loss.beta: 0.2` as if it were nested."""
    nested = OmegaConf.create()
    for key, value in content.items():
        section = key.partition(".")[0]
        if section != key and isinstance(content.get(section), str):
            fault = f"{section} is the name of a preset here, and cannot have keys beside it"
            remedy = f"choose the preset by 'defaults: [override /{section}: {content[section]}]'"
            raise ConfigError(fault, where=file, got=f"{section}: {content[section]}; {key}", remedy=remedy)
        OmegaConf.update(nested, key, value, force_add=True)
    return cast(dict[str, Any], OmegaConf.to_container(nested))


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Initialise Hydra with the groups of the package; on exit, restore the state of a caller with Hydra."""
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            yield
    finally:
        GlobalHydra.instance().hydra = callers


def to_yaml(config: RunConfig) -> str:
    """Return `config` as YAML without secrets, for `from_yaml` or as an experiment."""
    return "# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(without_secrets(_plain(config))))


def from_yaml(text: str) -> RunConfig:
    """Return the configuration that `to_yaml` wrote.

    Raises:
        ConfigError: as `load_run_config`.
    """
    try:
        return checked(SCHEMA.validate_python(written_values(text)))
    except ValidationError as error:
        raise_all(wrong_values(error, lambda key: key))
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise composition_error(error, group_folders()) from error


def changed_keys(file: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys by which `config` is another run than the config.yaml `file`: `{KEY: (OLD, NEW)}`.

    Empty if this version cannot read the file, which has no secrets.
    """
    try:
        found = differing_keys(from_yaml(read_config(file)), config)
    except (OSError, ValueError, ConfigError):
        return {}
    return {key: (old, new) for key, (old, new) in found.items() if old != without_secrets(new)}


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the values of a configuration without enums."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


ConfigStore.instance().store("schema", _plain(RunConfig()))
