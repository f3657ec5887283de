"""Compose a command: Hydra composes presets and experiments; above them come files and the command's words.

`dpo-dist train +experiment=qwen7b my.yaml loss=ipo loss.beta=0.2`, with `model: qwen2_5_0_5b` in my.yaml, is

    the defaults of the schema
    config.yaml, presets and experiment/qwen7b.yaml, as Hydra composes them with model=qwen2_5_0_5b loss=ipo
    model/qwen2_5_0_5b.yaml again, and the keys of my.yaml
    the defaults of the loss, loss/ipo.yaml again, and loss.beta=0.2

A file is written like a command, `loss: ipo` and `loss.beta: 0.2`; config.yaml, presets and experiments are
Hydra's. A preset that a file or the command chooses is read again: Hydra puts presets below experiments.
Mistakes in words, files and values are collected, and said at once.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast, get_args, get_origin

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dpo_dist.config.extensions import ask
from dpo_dist.config.keys import is_within, preset_names, readers, run_keys, verb_keys
from dpo_dist.config.mistakes import FAILURES, explained, not_a_word, unknown_key
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written, plain_values
from dpo_dist.foundation.remedies import Typed
from dpo_dist.foundation.types import dotted_items

Places: TypeAlias = Mapping[str, str]
"""The place of each key: the word of the command, or `FILE:LINE`."""
_RUN, _PRESET = "run of dpo_dist", "preset of dpo_dist"
"""Names in Hydra's store: config.yaml with all folders, and these folders alone."""
_ONE_HYDRA = threading.Lock()  # Hydra has one store and one search path in a process


def parse_overrides(words: Iterable[str]) -> tuple[list[Override], list[str]]:
    """Divide the words of a command line into overrides and other words."""
    overrides = []
    unread = []
    for word in words:
        key, equals, text = word.partition("=")
        hint = run_keys().get(key.lstrip("+"))
        kinds = {hint, *get_args(hint)}
        takes_text = get_origin(hint) is not list and str in kinds and kinds.isdisjoint({int, float})
        override = _parsed(word)
        is_other = override is not None and isinstance(override.value(), int | float)
        if equals and (override is None or (takes_text and is_other)):
            # Hydra's grammar refuses `~/m`, `é` and `NAME=PATH` without quotes; `run.name=1e3` is a text.
            with contextlib.suppress(yaml.YAMLError):
                value = text if takes_text else yaml.safe_load(text)
                override = _parsed(f"{key}={as_written([value])[1:-1]}")
        # `loss@x=ipo` puts the preset into a package of Hydra, x, and would change nothing in `loss`.
        if override is None or not override.key_or_group or override.package is not None:
            unread.append(word)
        else:
            override.input_line = word
            overrides.append(override)
    return overrides, unread


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def names_chosen(override: Override) -> list[str]:
    """Return the presets or experiments that an override names: `loss=ipo`, `+experiment=[a,b]`."""
    value = override.value()
    names = value if isinstance(value, list) else [value]
    return ["null" if name is None else str(name) for name in names]


def set_by(override: Override) -> list[str]:
    """Return the keys that an override sets; a mapping sets the keys inside it."""
    key = override.key_or_group
    value = override.value()
    if key == "reference" and not isinstance(value, dict):
        return ["reference.mode"]
    return [key, *(f"{key}.{name}" for name in value)] if isinstance(value, dict) else [key]


class _Layer(NamedTuple):
    """A file, or the words of the command: presets by section, keys that win over them, and their places."""

    presets: dict[str, str]
    keys: list[tuple[str, Any]]
    places: dict[str, str]


def read_keys(file: Path) -> dict[str, Any]:
    """Return the keys of a YAML or JSON file; raise one of `FAILURES` if it has none."""
    with file.open(encoding="utf-8") as stream:
        content = OmegaConf.to_container(OmegaConf.load(stream))
    if not isinstance(content, dict):
        raise ConfigError("this file has no keys", where=str(file), remedy="write keys: 'loss: {beta: 0.2}'")
    return cast(dict[str, Any], content)


def _places(file: Path, name: str, package: str = "") -> dict[str, str]:
    """Return the line of every key of a YAML file, `data.train[0].path`; `package`: the section above."""
    places = {package: f"{name}:1"} if package else {}

    def walk(node: Any, above: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                full = f"{above}.{key.value}".lstrip(".")
                places[full] = f"{name}:{key.start_mark.line + 1}"
                walk(value, full)
        elif isinstance(node, yaml.SequenceNode):
            for index, entry in enumerate(node.value):
                walk(entry, f"{above}[{index}]")

    walk(yaml.compose(file.read_text(encoding="utf-8")), package)
    return places


_Stamps: TypeAlias = tuple[tuple[Path, int], ...]
_Composed: TypeAlias = tuple[DictConfig, tuple[Places, ...]]


@cache
def _composed(root: str, words: tuple[str, ...], folders: tuple[Path, ...], _: _Stamps) -> _Composed:
    """Return what Hydra composes of a file of its store with these words, and the places of its keys."""
    search = {"hydra": {"searchpath": [f"file://{folder}" for folder in folders[1:]]}}
    with _ONE_HYDRA:
        ConfigStore.instance().store(_PRESET, search)
        ConfigStore.instance().store(_RUN, {"defaults": ["config", "_self_"], **search})
        callers = GlobalHydra.instance().hydra  # of a program that calls this one
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folders[0])):
                config = hydra.compose(root, list(words))
                loader = GlobalHydra.instance().config_loader()
                entries = loader.compute_defaults_list(root, list(words), RunMode.RUN).defaults
        finally:
            GlobalHydra.instance().hydra = callers
    every = list[Places]()
    for entry in entries:
        name = f"{entry.config_path}.yaml"
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is not None:
            places = _places(file, name, entry.package or "")
            for key, place in places.items():
                if is_within(key, "hydra") or "/hydra/" in key:  # Hydra's compose ignores both without a word
                    raise unknown_key("hydra", place)
            every.append(places)
    return config, tuple(every)


def _quoted(name: str) -> str:
    """Return a name between quotes for Hydra's grammar: it may be a number, or have other letters and =."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Composition:
    """A command's configuration: what Hydra composes, the layers above it, and the mistakes in both."""

    def __init__(
        self,
        words: Sequence[str],
        folders: Sequence[Path],
        saved: Mapping[str, Any] | None = None,
        mistakes: Iterable[ConfigError] = (),
        verb: str = "",
    ) -> None:
        self.folders = folders
        self.is_saved = saved is not None
        self.mistakes = list(mistakes)
        self.overrides = list[Override]()
        self.set_keys = list[str]()
        """The keys that words of the command set."""
        self.set_by_presets = list[str]()
        """The keys that the presets of the command set: `reference.mode` for `reference=live`."""
        self._further = dict[str, list[str]]()  # experiments, and files of other groups without a section
        self._unknown = dict[str, Any]()  # keys with their values, for pydantic to refuse
        self.unknown_presets = list[tuple[str, str, list[str], str]]()
        """Group, name, the names that there are, and the place."""
        self._layers = list[_Layer]()
        self._places = list[Places]()
        files = [word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]
        for file in files:
            try:
                self._layers.append(self._file(file))
            except (*FAILURES, AttributeError, TypeError) as error:  # `defaults: 5`
                self.mistakes += explained(error, file)
        saved_keys = [key for key, _ in dotted_items(saved or {})]
        places = dict.fromkeys(saved_keys, "the run's config.yaml")
        self._layers.append(_Layer({}, list((saved or {}).items()), places))
        overrides, unread = parse_overrides(word for word in words if word not in files)
        if unread:
            self.mistakes.append(not_a_word(unread, verb))
        command = _Layer({}, [], {})
        for override in overrides:
            self._set(command, override)
        self._layers.append(command)

    def _file(self, name: str) -> _Layer:
        """Return the layer of a user's file, which is written like a command; raise one of `FAILURES`."""
        file = Path(name)
        content = read_keys(file)
        foreign = ask("foreign_file", content, file)
        if foreign:
            raise foreign
        layer = _Layer({}, [], _places(file, name))
        listed = content.pop("defaults", [])
        for entry in [listed] if isinstance(listed, str) else listed:
            named = {"experiment": entry} if isinstance(entry, str) else entry
            for group, choice in named.items():
                for each in choice if isinstance(choice, list) else [choice]:
                    if each != "_self_":
                        self._choose(layer, group.split()[-1].lstrip("/"), each, layer.places["defaults"])
        for key, value in content.items():
            if isinstance(value, str | bool) and preset_names(key, self.folders):
                self._choose(layer, key, value, layer.places[key])
            elif value is not None or not is_dataclass(run_keys().get(key)):  # an empty section has no keys
                layer.keys.append((str(key), value))
        for key, times in Counter(key for key, _ in dotted_items(content)).items():
            if times > 1:  # `loss.beta: 1` and `loss: {beta: 2}`; YAML itself refuses `loss.beta` twice
                where = layer.places[key]
                mistake = ConfigError(f"{key} is given twice", where=where, remedy="remove one of them")
                self.mistakes.append(mistake)
        return layer

    def _choose(self, layer: _Layer, group: str, choice: Any, where: str) -> None:
        """Add a preset of a section to a layer, or an experiment to Hydra's."""
        name = {False: "off", None: "null"}.get(choice, choice)  # YAML reads a bare `off` as false
        presets = preset_names(group, self.folders)
        if name not in presets:
            self.unknown_presets.append((group, str(name), presets, where))
        elif group in run_keys():
            layer.presets[group] = name
        else:
            self._further.setdefault(group, []).append(name)

    def _set(self, layer: _Layer, override: Override) -> None:
        """Add a word of the command to a layer, or a mistake if it is not one value."""
        key = override.key_or_group
        value = override.value()
        where = Typed(str(override.input_line))
        is_group = any((folder / key).is_dir() for folder in self.folders)
        if override.is_delete() or override.is_sweep_override():
            remedy = (
                "write one value (a list has brackets: [a,b]); the verb sweep runs each of several values"
            )
            self.mistakes.append(ConfigError(f"{key} takes one value", where=where, remedy=remedy))
        elif is_group and isinstance(value, list) and key in run_keys():
            remedy = f"write {key}=NAME" + "; loss.terms has the kinds of a sum" * (key == "loss")
            self.mistakes.append(ConfigError(f"{key} takes one preset", where=where, remedy=remedy))
        else:
            self.overrides.append(override)
            self.set_keys += set_by(override)
            if is_group and not isinstance(value, dict):
                for name in names_chosen(override):
                    self._choose(layer, key, name, where)
            else:
                layer.keys.append((key, value))
                layer.places.update(dict.fromkeys(set_by(override), where))

    def compose(self) -> dict[str, Any]:
        """Return the values of the command, leaving out words and files with mistakes."""
        defaults = plain_values(RunConfig())
        chosen = dict[str, str]()
        for layer in self._layers:
            chosen |= layer.presets
        words = [f"+{group}=[{','.join(map(_quoted, names))}]" for group, names in self._further.items()]
        words += [f"{group}={name}" for group, name in chosen.items()]
        config = OmegaConf.create(defaults)
        config.merge_with(self._composed(_RUN, words))  # OmegaConf.merge copies, for half of the time
        for layer in self._layers:
            for group, name in layer.presets.items():
                if name != chosen[group]:
                    continue
                preset = self._composed(_PRESET, [f"+{group}={name}"])
                if layer is self._layers[-1]:
                    self.set_by_presets += [f"{group}.{key}" for key in preset.get(group) or ()]
                if group == "loss" or not preset.get(group):
                    config[group] = defaults[group]
                config.merge_with(preset)
            self._places.append(layer.places)
            for key, value in layer.keys:
                is_section = is_dataclass(run_keys().get(key))
                # The kind of loss decides which options exist: pydantic checks them.
                is_known = key in run_keys() or key.startswith("loss.options.")
                if not is_known or (is_section and "." not in key and not isinstance(value, dict)):
                    self._unknown[key] = value
                    continue
                # OmegaConf cannot merge a mapping into a list: it replaces the list, and pydantic refuses it.
                merges = get_origin(run_keys().get(key)) is not list
                OmegaConf.update(config, key, value, merge=merges, force_add=True)
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)) | self._unknown

    def _composed(self, root: str, words: Iterable[str]) -> DictConfig:
        """Return what Hydra composes; nothing if a file has a mistake, so that others are found, too."""
        files = sorted(file for folder in self.folders for file in folder.rglob("*.yaml"))
        stamps = tuple((file, file.stat().st_mtime_ns) for file in files)
        try:
            config, places = _composed(root, tuple(words), tuple(self.folders), stamps)
        except FAILURES as error:
            self.mistakes += explained(error, "config.yaml, a preset or an experiment")
            return OmegaConf.create()
        self._places += places
        return config

    def origin(self, key: str) -> str:
        """Return the word that sets a key, or the file with its line: the last one counts."""
        name = key
        while name:
            is_section = is_dataclass(run_keys().get(name))  # a file with the section may lack the key
            for places in reversed(self._places):
                if name in places and (name == key or not is_section):
                    return places[name]
            name = name[: max(name.rfind("."), name.rfind("["), 0)]
        return key

    def unread_keys(self, verb: str, *, trains: bool) -> list[ConfigError]:
        """Return an error for each override whose key a verb does not read; files may have such keys."""
        readable = verb_keys(verb, trains=trains)
        mistakes = []
        for override in self.overrides:
            for key in set_by(override):
                if key in run_keys() and key not in readable:
                    where = Typed(str(override.input_line))
                    remedy = f"remove {key}, a key of {', '.join(readers(key))}"
                    mistakes.append(ConfigError(f"{verb} does not read {key}", where=where, remedy=remedy))
        return mistakes
