"""Compose a command: Hydra orders its files by their lists of `defaults`, then all layers are merged.

Mistakes are collected, so that all of a command's are said at once.
"""

import contextlib
import copy
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, get_origin

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_dist.config.fields import plain_values
from dpo_dist.config.keys import (
    config_dir,
    is_within,
    preset_names,
    readers,
    run_keys,
    verb_keys,
)
from dpo_dist.config.mistakes import (
    assignment,
    composition_error,
    likely,
    to_assign,
    unknown_key,
    unknown_preset,
    unreadable,
)
from dpo_dist.config.other_trainers import equivalents, foreign_file
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.remedies import COMMAND_LINE, InFile, Remedy, Typed

FAILURES = (
    *(ConfigError, HydraException, OmegaConfBaseException),
    *(yaml.YAMLError, ValueError, RecursionError, OSError),
)
"""Exceptions that composing a command can raise."""
_ROOT = "dpo_dist"
"""The group that holds the command's layers in Hydra's store."""
_RANKED: dict[str, Any] = {}  # the ranked layers of commands: Hydra takes a tenth of a second for each
_ONE_HYDRA = threading.Lock()  # Hydra has one store and one search path in a process


def parse_overrides(words: Iterable[str]) -> tuple[list[Override], list[str]]:
    """Divide the words of a command line into overrides and other words."""
    parsed, unread = [], []
    for word in words:
        key, equals, value = word.partition("=")
        hint, override = run_keys().get(key.lstrip("+")), _parsed(word)
        kinds = {hint, *get_args(hint)}
        takes_text = str in kinds and kinds.isdisjoint({int, float})  # `run.name=1e3` is a text
        if equals and (override is None or (takes_text and type(override.value()) in (int, float))):
            # Hydra's grammar refuses `~/m`, `é` and `NAME=PATH` without quotes.
            if re.fullmatch(r"\[[^\[\]{}\"']*\]", value):
                value = "[" + ",".join(f'"{entry.strip()}"' for entry in value[1:-1].split(",")) + "]"
            elif not set(value) & set("[]{}\"',\\") and value == value.strip():
                value = f'"{value}"'
            override = _parsed(f"{key}={value}")
        # `loss@x=ipo` puts the preset into a package of Hydra, x, and would change nothing in `loss`.
        if override is None or not override.key_or_group or override.package is not None:
            unread.append(word)
        else:
            parsed.append(override)
    return parsed, unread


def _parsed(line: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException:
        return None


def keys_given(override: Override) -> list[str]:
    """Return the keys that an override sets; a mapping sets the keys inside it."""
    key, value = override.key_or_group, override.value()
    if key == "reference" and not isinstance(value, dict):
        return ["reference.mode"]
    return [key, *(f"{key}.{name}" for name in value)] if isinstance(value, dict) else [key]


def names_chosen(override: Override) -> list[str]:
    """Return the presets or experiments that an override names: `loss=ipo`, `+experiment=[a,b]`."""
    value = override.value()
    return ["null" if name is None else str(name) for name in (value if isinstance(value, list) else [value])]


class _Layer(NamedTuple):
    """Keys of a file or experiment, which win over the presets that the file chooses."""

    name: str
    presets: dict[str, str | None]
    values: dict[str, Any]


def read_keys(file: Path) -> dict[str, Any]:
    """Return the keys of a YAML or JSON file; raise one of `FAILURES` if it has none."""
    with file.open(encoding="utf-8") as stream:
        content = OmegaConf.to_container(OmegaConf.load(stream))
    if not isinstance(content, dict):
        raise ConfigError("this file has no keys", where=str(file), remedy="write keys: 'loss: {beta: 0.2}'")
    if "hydra" in content:
        raise unknown_key("hydra", where=f"hydra in {file}")
    return cast(dict[str, Any], content)


class Command:
    """A command: its layers, which Hydra ranks, its overrides, and the mistakes in both.

    Layers add two things that Hydra lacks: files and experiments are written like a command, `loss: ipo` and
    `loss.beta: 0.2`; and `loss=ipo` in a file or command replaces everything before it, while Hydra puts
    presets below every experiment.
    """

    def __init__(
        self,
        words: Sequence[str],
        folders: Sequence[Path],
        saved: Mapping[str, Any] | None,
        mistakes: Iterable[ConfigError],
        cache: dict[str, Any] | None = None,
        verb: str = "",
    ) -> None:
        # A cache for a sweep's points: the ranked layers by their names; the keys of each file.
        self._cache = {} if cache is None else cache
        files = [word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]
        words = [word for word in words if word not in files]
        # `optim.lr= 1e-6`: the second word belongs to the first.
        pairs = [
            [*pair] for pair in pairwise(words) if re.fullmatch(r"[\w.]+=", pair[0]) and "=" not in pair[1]
        ]
        parsed, unread = parse_overrides(word for word in words if not any(word in pair for pair in pairs))
        self.folders, self.overrides = folders, list[Override]()
        self.mistakes = [*mistakes, *(unreadable(some, verb) for some in (*pairs, unread) if some)]
        self._experiments, typed = list[_Layer](), dict[str, str | None]()
        for override in parsed:
            if (mistake := self._mistake(override)) is not None:
                self.mistakes.append(mistake)
            elif self._is_choice(override):
                self._experiments += self._choose(override.key_or_group, names_chosen(override), typed)
            if mistake is None:
                self.overrides.append(override)
        self._files = [layer for file in files for layer in self._read(Path(file), file)]
        self._files += [] if saved is None else [_Layer("config.yaml", {}, dict(saved))]
        self._files.append(_Layer(COMMAND_LINE, typed, {}))

    def _choose(self, group: str, names: Iterable[Any], presets: dict[str, str | None]) -> list[_Layer]:
        """Return the layers of the named experiments; put the preset named for a section into `presets`."""
        layers, known = list[_Layer](), preset_names(group, self.folders)
        for name in names:
            # YAML reads a bare `off` as false.
            given = likely("false", known)[0] if name is False and likely("false", known) else name
            if given is not None and str(given) not in known:
                self.mistakes.append(unknown_preset(group, str(given), self.folders))
            elif group in run_keys():
                presets[group] = given
            elif given is not None:
                layers += self._read(self._file(f"{group}/{given}"), f"{group}/{given}.yaml", group)
        return layers

    def _read(self, file: Path, name: str, group: str = "experiment") -> list[_Layer]:
        """Return the layers of a group's file; note a mistake if it cannot be read."""
        try:
            if (known := f"keys of {file}") not in self._cache:
                self._cache[known] = read_keys(file)
            content = copy.deepcopy(self._cache[known])
            if error := foreign_file(content, file):
                raise error
            return self._layers(content, name, group)
        except FAILURES as error:
            self.mistakes.append(composition_error(error, self.folders, name))
            return []

    def _layers(self, content: dict[str, Any], name: str, group: str) -> list[_Layer]:
        """Return a layer for each file in the list `defaults` of a file, and one for its own keys."""
        entries, values = content.pop("defaults", []), OmegaConf.create()
        layers, presets = list[_Layer](), dict[str, str | None]()
        for key, value in content.items():
            if isinstance(value, (str, bool)) and key in run_keys() and preset_names(key, self.folders):
                self._choose(key, [value], presets)
            elif value not in (None, "", [], {}) or "." in str(key) or key in run_keys():
                # Another trainer's file may have empty keys: ignore them.
                OmegaConf.update(values, str(key), value, force_add=True)
        layer = _Layer(name, presets, cast(dict[str, Any], OmegaConf.to_container(values)))
        for entry in entries if isinstance(entries, list) else [entries]:
            if entry == "_self_":
                layers.append(layer)
                continue
            place, _, file = str(entry).rpartition("/")
            for written, names in entry.items() if isinstance(entry, dict) else [(place or group, file)]:
                chosen = names if isinstance(names, list) else [names]
                layers += self._choose(str(written).split()[-1].lstrip("/"), chosen, presets)
        return layers if layer in layers else [*layers, layer]

    def _ranked(self) -> list[_Layer]:
        """Return everything below the overrides, the lowest first: Hydra resolves the list of defaults."""
        # config.yaml, experiments, and files, each above the presets that it chooses.
        parts: list[str | _Layer] = ["config", *self._experiments]
        chosen = {group: layer for layer in self._files for group in layer.presets}
        for layer in self._files:
            for group, name in layer.presets.items():
                if name is not None and chosen[group] is layer:
                    if not read_keys(self._file(f"{group}/{name}")) or group == "loss":
                        # The preset resets its whole group: the group's defaults come first.
                        parts.append(_Layer("", {}, {group: plain_values(getattr(RunConfig(), group))}))
                    parts.append(f"{group}/{name}")
            parts.append(layer)
        presets = {group: name for layer in self._experiments for group, name in layer.presets.items()}
        presets |= dict.fromkeys(chosen)
        # Their order depends on names alone: layers of the command are numbers in it.
        names = [part if isinstance(part, str) else number for number, part in enumerate(parts)]
        known, cache = repr((names, presets)), self._cache
        if self.folders == [config_dir()]:  # few files, so that a look at all of them costs nothing
            stamps = sorted((str(file), file.stat().st_mtime_ns) for file in config_dir().rglob("*.yaml"))
            known, cache = f"{known} {stamps}", _RANKED
        if known not in cache:
            cache[known] = self._rank(parts, presets)
        defaults = _Layer("", {}, plain_values(RunConfig()))
        return [
            defaults,
            *(cast(_Layer, parts[part]) if isinstance(part, int) else part for part in cache[known]),
        ]

    def _rank(self, parts: Sequence[str | _Layer], presets: Mapping[str, Any]) -> list[int | _Layer]:
        """Return the layers of `parts` by their numbers, among those of the files that these name."""
        # Layers of a command are parts without a file: Hydra ranks them by an empty stand-in in its store.
        stored = {f"{_ROOT}/{number}": part for number, part in enumerate(parts)}
        entries = {part if isinstance(part, str) else name: part for name, part in stored.items()}
        # Each name once: Hydra changes a file that it merges twice.
        overridden = [{f"override {group}": name} for group, name in presets.items()]
        search = {"searchpath": [f"file://{folder}" for folder in self.folders[1:]]}
        read_keys(self._file("config"))  # Hydra's words about one that is no mapping are about something else
        with _ONE_HYDRA:
            store, callers = ConfigStore.instance(), GlobalHydra.instance().hydra
            for name, part in entries.items():
                if not isinstance(part, str):
                    store.store(name.rpartition("/")[2], {}, _ROOT, "_global_")
            store.store(COMMAND_LINE, {"defaults": [*entries, "_self_", *overridden], "hydra": search})
            GlobalHydra.instance().clear()
            try:
                with hydra.initialize_config_dir(version_base="1.3", config_dir=str(self.folders[0])):
                    loader = GlobalHydra.instance().config_loader()
                    defaults = loader.compute_defaults_list(COMMAND_LINE, [], RunMode.RUN).defaults
            finally:
                GlobalHydra.instance().hydra = callers

        # What Hydra's own configuration has is for programs that it starts.
        ranked = list[int | _Layer]()
        for entry in defaults:
            path = str(entry.config_path)
            if isinstance(entries.get(path), _Layer):
                ranked.append(int(path.rpartition("/")[2]))
            elif path != COMMAND_LINE and not path.startswith("hydra/"):
                if not (file := self._file(path)).is_file():  # another program's, in Hydra's store
                    group, _, name = path.rpartition("/")
                    raise unknown_preset(group, name, self.folders)
                values = {name: value for name, value in read_keys(file).items() if name != "defaults"}
                for package in reversed(entry.package.split(".") if entry.package else []):
                    values = {package: values}
                ranked.append(_Layer(f"{path}.yaml", {}, values))
        return ranked

    def compose(self) -> dict[str, Any]:
        """Return the values of the command, leaving out overrides and files with mistakes."""
        config = OmegaConf.create(reduce(_merged, [layer.values for layer in self._ranked()]))
        for override in self.overrides:
            if not self._is_choice(override):
                key, value = override.key_or_group, override.value()
                # OmegaConf cannot merge a mapping into a list: it replaces the list, and pydantic refuses it.
                merges = get_origin(run_keys().get(key)) is not list
                OmegaConf.update(config, key, value, merge=merges, force_add=True)
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))

    def origin(self, key: str) -> str:
        """Return the last override, file or experiment that sets a key."""
        for override in reversed(self.overrides):
            given = override.key_or_group
            if not self._is_choice(override) and (is_within(key, given) or is_within(given, key)):
                return key if len(key) > len(given) else Typed(str(override.input_line))
        for layer in reversed(self._ranked()):
            with contextlib.suppress(KeyError, TypeError):
                reduce(getitem, key.partition("[")[0].split("."), layer.values)
                return InFile(key, layer.name) if layer.name else key
        return key

    def _file(self, name: str) -> Path:
        """Return the file of a preset or experiment: `loss/simpo`."""
        files = [folder / f"{name}.yaml" for folder in self.folders]
        return next(filter(Path.is_file, files), files[-1])

    def _is_choice(self, override: Override) -> bool:
        is_group = any((folder / override.key_or_group).is_dir() for folder in self.folders)
        return is_group and not isinstance(override.value(), dict)

    def _mistake(self, override: Override) -> ConfigError | None:
        """Return the error of an override whose key or form does not exist."""
        key, line = override.key_or_group, str(override.input_line)
        is_choice = self._is_choice(override)
        # The kind of loss decides which options exist: pydantic checks them.
        if not is_choice and key not in run_keys() and not key.startswith("loss.options."):
            return unknown_key(key, line.partition("=")[2], where=Typed(line))
        if override.is_delete() or override.is_sweep_override():
            message, remedy = f"{key} takes one value", _remedy_for_several(override)
            if override.is_interval_sweep():
                message = "an interval has no points to train"
        elif is_choice and key in run_keys() and isinstance(override.value(), list):
            names, known = names_chosen(override), preset_names(key, self.folders)
            if unknown := [name for name in names if {name, *equivalents(name, "values")}.isdisjoint(known)]:
                return unknown_preset(key, unknown[0], self.folders)
            message, remedy = f"{key} takes one preset", Remedy(f"write {key}=NAME: {', '.join(known)}")
            if names:
                meant = next(name for name in (names[0], *equivalents(names[0], "values")) if name in known)
                remedy = Remedy.to_write(f"{key}={meant}", verb="choose")
                if key == "loss":
                    remedy += f" or {to_assign(key, line.partition('=')[2])}"
        elif not is_choice and "." not in key and not isinstance(override.value(), dict):
            message = f"{key} is a section"
            remedy = Remedy(f"write {key}.KEY=VALUE; --help {key} lists its keys")
        else:
            return None
        return ConfigError(message, where=Typed(line), remedy=remedy)

    def unread_keys(self, verb: str, *, trains: bool) -> list[ConfigError]:
        """Return an error for each override whose key a verb does not read; files may have such keys."""
        read, mistakes = verb_keys(verb, trains=trains), []
        for override in self.overrides:
            for key in keys_given(override):
                if key in run_keys() and key not in read:
                    where = Typed(str(override.input_line))
                    remedy = Remedy.to_remove(key) + f", a key of {', '.join(readers(key))}"
                    if (own := f"{verb}.{key.partition('.')[2]}") in read:
                        remedy = to_assign(own, str(override.input_line).partition("=")[2])
                    mistakes.append(ConfigError(f"{verb} does not read {key}", where=where, remedy=remedy))
        return mistakes


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the values of both as `OmegaConf.merge` does, in a tenth of its time."""
    merged = dict(below)
    for key, value in above.items():
        inside = merged.get(key)
        if isinstance(value, dict) and isinstance(inside, dict):
            merged[key] = _merged(inside, value)
        elif value != MISSING or key not in merged:
            merged[key] = value
    return merged


def _remedy_for_several(override: Override) -> Remedy:
    """Suggest an override in place of one that gives a key several values, or removes it."""
    key, value = override.key_or_group, str(override.input_line).partition("=")[2]
    if override.is_delete():
        return Remedy(f"write {key}=VALUE, or leave the word out")
    if override.is_interval_sweep():
        listed = f"list its values for the verb sweep: {key}=0.1,0.2 or '{key}=range(1,4)'"
        return Remedy(f"{listed}; or let it search: add sweep.trials=20 sweep.by=eval_rewards/accuracies")
    remedy = Remedy(f"write {key}=VALUE with one value")
    if word := assignment(key, f"[{value}]"):
        remedy = Remedy.to_write(word)
    elif re.fullmatch(r"\d+,\d+(e-?\d+)?", value):
        meant = [word for mark in (".", "") if (word := assignment(key, value.replace(",", mark)))]
        if meant:
            is_decimal = "." in meant[0].partition("=")[2]
            remedy = Remedy.to_write(meant[0]) + ": a decimal point, no comma" * is_decimal
    return remedy + "; the verb sweep runs each of several values" if override.is_discrete_sweep() else remedy
