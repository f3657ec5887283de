"""Compose, type and check the configuration of a run: a command to one frozen `RunConfig`, and YAML.

Hydra composes presets, experiments, files and words of the command; pydantic types the result.
"""

import contextlib
import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from itertools import chain, islice, product
from math import prod
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast, get_args, get_origin

import hydra
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dpo_dist.config.identity import RunIdentity, default_dir, differing_keys
from dpo_dist.config.keys import COMMAND_LINE, group_folders, is_within, preset_names, readers, run_keys
from dpo_dist.config.mistakes import (
    SCHEMA,
    assignment,
    composition_error,
    fits,
    foreign_file,
    likely,
    meant,
    raise_all,
    unknown_key,
    unknown_preset,
    unreadable,
    wrong_values,
)
from dpo_dist.config.rules import check, keys_of, resolve_reference, rules_of, without_unused
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.config.user_code import find_function, written_values
from dpo_dist.foundation.errors import ConfigError, DpoDistError
from dpo_dist.foundation.text import first_few, without_secrets

FAILURES = (
    *(ConfigError, HydraException, OmegaConfBaseException),
    *(yaml.YAMLError, ValueError, RecursionError, OSError),
)
Points: TypeAlias = dict[tuple[str, ...], RunConfig]
"""The runs of a sweep by the overrides in which they differ: `("loss.beta=0.1", "loss.kind=ipo")`."""
_MOST_POINTS = 1000
_ROOT = "dpo_dist"
"""The primary configuration of Hydra; the parts of the command are stored in the group of this name."""


def load_run_config(
    words: Sequence[str],
    own_folder: Path | None = None,
    *,
    verb: str = "",
    former: Mapping[str, Any] | None = None,
    mistakes: Iterable[ConfigError] = (),
) -> RunConfig:
    """Compose, type and check one run; with `verb`, also what this verb needs, such as `data.train`.

    `words` are those of a command: `["my.yaml", "+experiment=qwen7b", "loss.beta=0.2"]`; `own_folder` has
    further groups, as `--config-dir`. A `verb` must read all keys of the command.
    `former` are values of a run's config.yaml, which the command changes; `mistakes` were found before.

    Raises:
        ConfigError: a key, value or preset does not exist, or values contradict each other; all mistakes.
    """
    find_function.cache_clear()
    return _load(_Command(words, group_folders(own_folder), former, mistakes, verb=verb), verb)


def load_points(
    words: Sequence[str], own_folder: Path | None = None, *, mistakes: Iterable[ConfigError] = ()
) -> Points:
    """Compose, type and check each point of the verb `sweep`: all combinations of the swept overrides.

    `loss.beta=0.1,0.2`, `trainer.seed=range(3)` and `loss=choice(ipo,simpo)` are swept: the grammar of Hydra.

    Raises:
        ConfigError: all mistakes of all points, as of `load_run_config`; or two points are the same run.
    """
    find_function.cache_clear()
    bases, all_mistakes, folders = dict[str, Any](), list[DpoDistError](mistakes), group_folders(own_folder)
    choices = _choices(words, folders)
    points: Points = {}
    refused = dict[tuple[str, ...], ConfigError]()
    names = dict[str | None, tuple[str, ...]]()
    for point in product(*choices):
        swept_words = tuple(word for word in point if word not in words)
        try:
            config = _load(_Command(point, folders, None, (), bases, "sweep"), "sweep")
        except ConfigError as error:
            refused[swept_words] = error
            continue
        if (same := names.setdefault(config.run.dir, swept_words)) != swept_words or swept_words in points:
            if config.run.dir != str(default_dir(config.run, config.identity.digest)):
                remedy = "add run.dir=null: each point has a folder of its own below run.root"
                message = "run.dir is given, so all points would be one run"
                all_mistakes.append(ConfigError(message, where="run.dir", remedy=remedy))
                break
            all_mistakes.append(
                ConfigError(
                    f"it is the same run as {' '.join(same)}",
                    where=" ".join(swept_words),
                    remedy="sweep only keys that define the result of a run",
                )
            )
        points[swept_words] = config
    all_mistakes += _at_some_points(refused, points)
    if () in points:
        remedy = "write several values, such as loss.beta=0.05,0.1, or train this one: dpo-dist train"
        all_mistakes.append(ConfigError("no key has several values", where=COMMAND_LINE, remedy=remedy))
    raise_all(all_mistakes)
    return points


def _choices(words: Sequence[str], folders: Sequence[Path]) -> list[list[str]]:
    """Return the values of each word of a sweep, as words; raise if they cannot be listed."""
    choices, mistakes = list[list[str]](), list[ConfigError]()
    for word in words:
        override = next(iter(parse_overrides([word])[0]), None)
        values, message, remedy = [word], "", ""
        if override is not None and override.is_discrete_sweep():
            remedy = "write a range with values, such as range(3) or range(0,9,3)"
            try:  # not all of them: there may be too many
                few = islice(override.sweep_string_iterator(), _MOST_POINTS + 1)
                values = [f"{override.get_key_element()}={string}" for string in few]
            except (ValueError, HydraException):
                values = []
            message = "" if values else "this range has no values"
        elif override is not None and _is_in_brackets(override, folders):
            message = "several values of a sweep have no brackets"
            remedy = f"write {override.key_or_group}={','.join(_names(override))}"
        if message:
            mistakes.append(ConfigError(message, where=f"{COMMAND_LINE}: {word}", remedy=remedy))
        choices.append(values)
    raise_all(mistakes)
    if prod(map(len, choices)) > _MOST_POINTS:
        raise ConfigError(
            f"a sweep has at most {_MOST_POINTS:,} points",
            where=COMMAND_LINE,
            got=" ".join(word for word, values in zip(words, choices, strict=True) if len(values) > 1),
            remedy="sweep fewer values, or divide them among several sweeps",
        )
    return choices


def _is_in_brackets(override: Override, folders: Sequence[Path]) -> bool:
    """Return whether the values of a key that has no list are written as a list."""
    key, values, known = override.key_or_group, override.value(), preset_names(override.key_or_group, folders)
    if key not in run_keys() or not isinstance(values, list) or not values or fits(key, values):
        return False
    return all(str(value) in known if known else fits(key, value) for value in values)


def _at_some_points(refused: Mapping[tuple[str, ...], ConfigError], points: Points) -> list[DpoDistError]:
    """Return the mistakes of points, each once; one of rules that not all points break names the values."""
    found = dict[tuple[str, str], dict[tuple[str, ...], DpoDistError]]()
    for words, error in refused.items():
        for part in error.parts or (error,):
            found.setdefault((part.message, part.where), {})[words] = part
    mistakes = list[DpoDistError]()
    for (message, where), broken in found.items():
        mistake = next(iter(broken.values()))
        kept = {word for words in (*points, *refused) if words not in broken for word in words}
        if kept and not where.startswith(COMMAND_LINE):
            alone = [word for word in dict.fromkeys(chain.from_iterable(broken)) if word not in kept]
            values = first_few(alone or [" ".join(words) for words in broken])
            what = values if alone else "one of these values"
            remedy = f"take {what} out of this sweep; in a command of its own {mistake.remedy}"
            mistake = ConfigError(message, where=values, got=mistake.got, remedy=remedy)
        mistakes.append(mistake)
    return mistakes


def _load(command: "_Command", verb: str) -> RunConfig:
    try:
        values = command.composed()
        if verb:
            trains = bool((values.get("pairs") or {}).get("rounds"))
            command.mistakes += command.not_read(verb, trains=trains)
        config = SCHEMA.validate_python(values)
    except ValidationError as error:
        raise_all([*command.mistakes, *wrong_values(error, command.origin)])
        raise
    except FAILURES as error:
        raise_all([*command.mistakes, composition_error(error, command.folders)])
        raise
    raise_all(command.mistakes)
    given = [key for override in command.overrides for key in _keys_of(override)]
    return checked(config, given, verb)


def checked(config: RunConfig, given: Collection[str] = (), verb: str = "") -> RunConfig:
    """Check all rules, and fill in `reference.mode` and `run.dir`; `given`: the keys of the command."""
    if config.reference.mode is ReferenceMode.auto:  # it follows what the command gives
        given = {*given, "reference.mode"}
    rules = rules_of(verb)
    config = without_unused(resolve_reference(config), given, rules)
    check(config, rules)
    given_dir = config.run.dir
    folder = default_dir(config.run, config.identity.digest) if given_dir is None else Path(given_dir)
    return replace(config, run=replace(config.run, dir=str(folder)))


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
        # A package of Hydra, `loss@x=ipo`, would change nothing.
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


def _keys_of(override: Override) -> list[str]:
    """Return the keys that an override gives; of a mapping those inside."""
    key, value = override.key_or_group, override.value()
    if key == "reference" and not isinstance(value, dict):
        return ["reference.mode"]
    return [key, *(f"{key}.{name}" for name in value)] if isinstance(value, dict) else [key]


def _names(override: Override) -> list[str]:
    value = override.value()
    return ["null" if name is None else str(name) for name in (value if isinstance(value, list) else [value])]


class _Layer(NamedTuple):
    """Keys of a file or experiment, above the presets that it chooses."""

    name: str
    presets: dict[str, str | None]
    values: Mapping[str, Any]


def read_keys(file: Path) -> dict[str, Any]:
    """Return the keys of a YAML or JSON file; raise one of `FAILURES` if it has none."""
    with file.open(encoding="utf-8") as stream:
        content = OmegaConf.to_container(OmegaConf.load(stream))
    if not isinstance(content, dict):
        raise ConfigError("this file has no keys", where=str(file), remedy="write keys: 'loss: {beta: 0.2}'")
    if "hydra" in content:
        raise unknown_key("hydra", where=f"hydra in {file}")
    return cast(dict[str, Any], content)


class _Command:
    """A command: its layers, which Hydra composes, its overrides, and the mistakes in both.

    Layers are for what Hydra cannot do: files and experiments are written as a command, `loss: ipo` and
    `loss.beta: 0.2`; and `loss=ipo` of a file or command replaces all that comes before it, where Hydra puts
    presets below every experiment.
    """

    def __init__(
        self,
        words: Sequence[str],
        folders: Sequence[Path],
        former: Mapping[str, Any] | None,
        mistakes: Iterable[ConfigError],
        bases: dict[str, Any] | None = None,
        verb: str = "",
    ) -> None:
        # What Hydra has composed, by what it was composed of, and the keys of files that it has read.
        self._bases = {} if bases is None else bases
        files = [word for word in words if "=" not in word and word.endswith((".yaml", ".yml"))]
        parsed, unread = parse_overrides(word for word in words if word not in files)
        self.folders, self.overrides = folders, list[Override]()
        self.mistakes = [*mistakes, *([unreadable(unread, verb)] if unread else [])]
        self._experiments, typed = list[_Layer](), dict[str, str | None]()
        for override in parsed:
            if (mistake := self._mistake(override)) is not None:
                self.mistakes.append(mistake)
            elif self._is_choice(override):
                self._experiments += self._choose(override.key_or_group, _names(override), typed)
            if mistake is None:
                self.overrides.append(override)
        self._files = [layer for file in files for layer in self._read(Path(file), file)]
        self._files += [] if former is None else [_Layer("config.yaml", {}, former)]
        self._files.append(_Layer(COMMAND_LINE, typed, {}))

    def _list_defaults(self) -> None:
        """Write Hydra's list of defaults: config.yaml, experiments, and files, each above its presets."""
        parts: list[str | _Layer] = ["config", *self._experiments]
        chosen = {group: layer for layer in self._files for group in layer.presets}
        for layer in self._files:
            for group, name in layer.presets.items():
                if name is not None and chosen[group] is layer:
                    if not read_keys(self._file(f"{group}/{name}")) or group == "loss":
                        # It stands for all options of its group.
                        parts.append(_Layer("", {}, {group: _plain(getattr(RunConfig(), group))}))
                    parts.append(f"{group}/{name}")
            parts.append(layer)
        stored = {f"{_ROOT}/{number}": part for number, part in enumerate(parts)}
        self._entries = {part if isinstance(part, str) else name: part for name, part in stored.items()}
        presets = {group: name for layer in self._experiments for group, name in layer.presets.items()}
        self._defaults = [
            *self._entries,
            "_self_",
            # Not at two places: Hydra changes what it merges twice.
            *({f"override {group}": name} for group, name in (presets | dict.fromkeys(chosen)).items()),
        ]

    def _choose(self, group: str, names: Iterable[Any], presets: dict[str, str | None]) -> list[_Layer]:
        """Return the layers of experiments; add the choice of a section to `presets`."""
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
        """Return the layers of a file of a group; none, and a mistake, if it cannot be read."""
        try:
            if (known := f"keys of {file}") not in self._bases:
                self._bases[known] = read_keys(file)
            content = copy.deepcopy(self._bases[known])
            if error := foreign_file(content, file):
                raise error
            return self._layers(content, name, group)
        except FAILURES as error:
            self.mistakes.append(composition_error(error, self.folders))
            return []

    def _layers(self, content: dict[str, Any], name: str, group: str) -> list[_Layer]:
        """Return the files in the list of `defaults` of a file as layers, and its keys as one."""
        entries, values = content.pop("defaults", []), OmegaConf.create()
        layers, presets = list[_Layer](), dict[str, str | None]()
        for key, value in content.items():
            if isinstance(value, (str, bool)) and key in run_keys() and preset_names(key, self.folders):
                self._choose(key, [value], presets)
            elif value not in (None, "", [], {}) or "." in str(key) or key in run_keys():
                # An empty key of another trainer's file says nothing.
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

    @contextlib.contextmanager
    def _hydra(self) -> Iterator[ConfigLoader]:
        """Initialise Hydra with the layers and the folders of groups; on exit, restore that of the caller."""
        store = ConfigStore.instance()
        for name, part in self._entries.items():
            if not isinstance(part, str):
                store.store(name.rpartition("/")[2], dict(part.values), _ROOT, "_global_")
        search = {"searchpath": [f"file://{folder}" for folder in self.folders[1:]]}
        store.store(COMMAND_LINE, {"defaults": self._defaults, "hydra": search})
        callers = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(self.folders[0])):
                yield GlobalHydra.instance().config_loader()
        finally:
            GlobalHydra.instance().hydra = callers

    def composed(self) -> dict[str, Any]:
        """Return the values of the command; without overrides and files that are mistakes."""
        self._list_defaults()
        if (parts := repr((self._entries, self._defaults))) not in self._bases:
            read_keys(self._file("config"))
            with self._hydra():
                self._bases[parts] = OmegaConf.merge(_plain(RunConfig()), hydra.compose(COMMAND_LINE))
        config = copy.deepcopy(self._bases[parts])
        for override in self.overrides:
            if not self._is_choice(override):
                key, value = override.key_or_group, override.value()
                # Hydra's own update cannot put a mapping in place of a list, for pydantic to refuse it.
                merges = get_origin(run_keys().get(key)) is not list
                OmegaConf.update(config, key, value, merge=merges, force_add=True)
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))

    def origin(self, key: str) -> str:
        """Return the override, file or experiment that gives a key; the last one counts."""
        for override in reversed(self.overrides):
            given = override.key_or_group
            if not self._is_choice(override) and (is_within(key, given) or is_within(given, key)):
                return key if len(key) > len(given) else f"{COMMAND_LINE}: {override.input_line}"
        with self._hydra() as loader:
            entries = loader.compute_defaults_list(COMMAND_LINE, [], RunMode.RUN).defaults
        for entry in reversed(entries):
            path, package = str(entry.config_path), f"{entry.package}." if entry.package else ""
            part, file = self._entries.get(path), self._file(path)
            if not isinstance(part, _Layer):
                part = _Layer(f"{path}.yaml", {}, read_keys(file) if file.is_file() else {})
            if part.name and key.startswith(package):
                with contextlib.suppress(KeyError, TypeError):
                    reduce(getitem, key.removeprefix(package).partition("[")[0].split("."), part.values)
                    return f"{key} in {part.name}"
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
        # Which options there are depends on the kind of loss.
        if not is_choice and key not in run_keys() and not key.startswith("loss.options."):
            return unknown_key(key, line.partition("=")[2], where=f"{COMMAND_LINE}: {line}")
        if override.is_delete() or override.is_sweep_override():
            message, remedy = f"{key} has one value", _in_place_of_several(override)
            if override.is_interval_sweep():
                message = "an interval has no points to train"
        elif is_choice and key in run_keys() and isinstance(override.value(), list):
            names, known = _names(override), preset_names(key, self.folders)
            if unknown := [name for name in names if {name, *meant(name, "values")}.isdisjoint(known)]:
                return unknown_preset(key, unknown[0], self.folders)
            sum_of_losses = f" or write {assignment(key, line.partition('=')[2])}" if key == "loss" else ""
            message, remedy = f"{key} is one preset", f"write {key}=NAME: {', '.join(known)}"
            if names:
                remedy = f"choose {key}={names[0]}{sum_of_losses}"
        elif not is_choice and "." not in key and not isinstance(override.value(), dict):
            message, remedy = f"{key} is a section", f"write {key}.KEY=VALUE; --help {key} lists its keys"
        else:
            return None
        return ConfigError(message, where=COMMAND_LINE, got=line, remedy=remedy)

    def not_read(self, verb: str, *, trains: bool) -> list[ConfigError]:
        """Return an error for each override whose key a verb does not read; files may serve several verbs."""
        read, mistakes = keys_of(verb, trains=trains), []
        for override in self.overrides:
            for key in _keys_of(override):
                if key in run_keys() and key not in read:
                    where = f"{COMMAND_LINE}: {override.input_line}"
                    remedy = f"remove it: it is read by {' and '.join(readers(key))}"
                    if (own := f"{verb}.{key.partition('.')[2]}") in read:
                        remedy = f"write {assignment(own, str(override.input_line).partition('=')[2])}"
                    mistakes.append(ConfigError(f"{verb} does not read {key}", where=where, remedy=remedy))
        return mistakes


def _in_place_of_several(override: Override) -> str:
    """Return what to write in place of several values of a key, or of its removal."""
    key, value = override.key_or_group, str(override.input_line).partition("=")[2]
    if override.is_delete():
        return f"write {key}=VALUE, or leave the word out"
    if override.is_interval_sweep():
        return f"name them for the verb sweep: {key}=0.1,0.2 or '{key}=range(1,4)'"
    remedy = f"write {key}=VALUE with one of them"
    if not (listed := assignment(key, f"[{value}]")).endswith("=..."):
        remedy = f"write {listed}"
    elif re.fullmatch(r"\d+,\d+", value):
        remedy = f"write {key}={value.replace(',', '.')}: a number has a point, no comma"
    return f"{remedy}; the verb sweep runs each of several values" if override.is_discrete_sweep() else remedy


def to_yaml(config: RunConfig) -> str:
    """Return `config` as YAML without secrets, for `from_yaml` or as an experiment."""
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(_plain(config))))


def from_yaml(text: str, where: str | Path = "config.yaml") -> RunConfig:
    """Return the configuration that `to_yaml` wrote, to the file `where`."""
    try:
        return checked(SCHEMA.validate_python(written_values(text, str(where))))
    except ValidationError as error:
        raise_all(wrong_values(error, lambda key: f"{key} in {where}"))
        raise


def changed_keys(file: Path, identity: RunIdentity) -> dict[str, tuple[Any, Any]]:
    """Return the keys by which a run is another one than the config.yaml `file`: `{KEY: (OLD, NEW)}`.

    Empty if this version cannot read the file, which has no secrets.
    """
    try:
        changed = differing_keys(from_yaml(file.read_text(encoding="utf-8")).identity, identity)
    except (OSError, ValueError, ConfigError):
        return {}
    return {key: (old, new) for key, (old, new) in changed.items() if old != without_secrets(new)}


def _plain(section: Any) -> dict[str, Any]:
    """Return the values of a section, or of a whole configuration, without enums."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(section)))
    return values
