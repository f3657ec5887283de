"""The overrides of a command line, checked one by one before anything is composed."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_origin

from hydra.core.override_parser.types import Override

from dpo_dist.config.aliases import VALUE_NAMES
from dpo_dist.config.keys import in_words, run_keys
from dpo_dist.config.suggest import likely, nearest, unknown_key, written
from dpo_dist.errors import ConfigError

_COMMAND_LINE = "command line"


def given_keys(overrides: Iterable[Override]) -> frozenset[str]:
    """The keys that a command line gives, those inside of mappings included."""
    keys = set()
    for override in overrides:
        keys.add(override.key_or_group)
        value = override.value()
        if isinstance(value, dict):
            keys |= {f"{override.key_or_group}.{name}" for name in value}
    return frozenset(keys)


def check_overrides(overrides: Sequence[Override], folders: Sequence[Path]) -> None:
    """Accept each override by its form: an existing key or group, one value, a list where one belongs.

    Args:
        overrides: of the command line.
        folders: the folders of configuration groups.

    Raises:
        ConfigError: the first one that cannot be meant.
    """
    experiments = [override for override in overrides if override.key_or_group == "experiment"]
    if len(experiments) > 1:
        lines = " ".join(str(override.input_line) for override in experiments)
        names = ",".join(name for override in experiments for name in _names(override.value()))
        raise ConfigError(
            "experiments are given in one list, in the order in which they apply",
            where=_COMMAND_LINE,
            got=lines,
            remedy=f"write '+experiment=[{names}]'",
        )
    for override in overrides:
        if any((folder / override.key_or_group).is_dir() for folder in folders):
            _check_choice(override, folders)
        else:
            _check_key(override)


def presets(group: str, folders: Iterable[Path]) -> list[str]:
    """The presets of a configuration group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def unknown_preset(group: str, choice: str, folders: Sequence[Path]) -> ConfigError:
    """The error for a preset that does not exist."""
    if not group:
        return ConfigError(
            "there is no such configuration",
            where="--config-name",
            got=choice,
            remedy="remove it; +experiment=NAME chooses what to run, --config-dir DIR adds your own",
        )
    known = presets(group, folders)
    if not known:
        return ConfigError("a configuration file does not exist", got=f"{group}/{choice}.yaml")
    plus = "+" if group == "experiment" else ""
    found = likely(Path(choice).stem if choice.endswith((".yaml", ".yml")) else choice, known)
    remedies = [f"did you mean {plus}{group}={found[0]}?"] if found else []
    key = {"model": "model.path", "data": "data.train", "reference": "reference.path"}.get(group)
    if key is not None and not found:
        line = written(key, choice, run_keys()[key])
        remedies.append(f"a {'file or dataset' if group == 'data' else 'model'} is named by {line}")
    if group == "experiment":
        remedies.append("an experiment of yours: --config-dir DIR with DIR/experiment/NAME.yaml")
    return ConfigError(
        f"there is no {group} named {choice!r}",
        where=group,
        got=choice,
        expected="one of " + ", ".join(nearest(choice, known)),
        remedy="; ".join(remedies) or f"write {plus}{group}={known[0] if len(known) == 1 else 'NAME'}",
    )


def _check_choice(override: Override, folders: Sequence[Path]) -> None:
    """A preset of a group, or its section as a mapping."""
    group, value, line = override.key_or_group, override.value(), str(override.input_line)
    known = presets(group, folders)
    if override.is_sweep_override():
        raise _several_values(override)
    if override.is_delete() or isinstance(value, dict):
        return
    if group == "experiment":
        if not override.is_add():
            raise ConfigError(
                f"no {group} is chosen by default, so it has to be added",
                where=_COMMAND_LINE,
                got=line,
                remedy=f"write +{line}",
            )
    elif isinstance(value, list):
        raise ConfigError(
            f"{group} is one preset, and this is a list: only its last entry would count",
            where=_COMMAND_LINE,
            got=line,
            remedy=_instead_of_list(group, _names(value), known),
        )
    elif override.is_add():
        raise ConfigError(
            f"{group} exists already", where=_COMMAND_LINE, got=line, remedy=f"write {line[1:]}"
        )
    elif not isinstance(value, str):
        raise ConfigError(
            f"{group} is chosen by name",
            where=_COMMAND_LINE,
            got=line,
            remedy=f"choose one of {', '.join(known)}, or remove {group}",
        )
    for name in _names(value):
        if name not in known:
            raise unknown_preset(group, name, folders)


def _check_key(override: Override) -> None:
    """A key of the schema, with the form of value that it can have."""
    key, line = override.key_or_group, str(override.input_line)
    _, _, text = line.partition("=")
    where = f"{_COMMAND_LINE}: {line}"
    hint = run_keys().get(key.partition("[")[0])
    if hint is None:
        raise unknown_key(key, text, where=where)
    if override.is_sweep_override():
        raise _several_values(override)
    if override.is_add() and not key.startswith("model.adapter."):
        remedy = f"write {line.lstrip('+')}"
        raise ConfigError(f"{key} exists already", where=_COMMAND_LINE, got=line, remedy=remedy)
    if override.is_delete():
        remedy = f"set {key} to another value, or remove {line}"
        raise ConfigError(f"{key} cannot be removed", where=_COMMAND_LINE, got=line, remedy=remedy)
    is_list = get_origin(hint) is list
    if is_list and not isinstance(override.value(), list):
        raise ConfigError(
            f"{key} has the wrong type",
            where=where,
            got=text,
            expected=in_words(hint),
            remedy=_list_to_write(key, text, hint),
        )
    if (
        isinstance(hint, type)
        and issubclass(hint, int | float | str)
        and isinstance(override.value(), list | dict)
    ):
        remedy = f"set {key} to {in_words(hint)}"
        if key == "loss.kind":
            remedy = _instead_of_list("loss", _names(override.value()), [])
        raise ConfigError(
            f"{key} has the wrong type", where=where, got=text, expected=in_words(hint), remedy=remedy
        )


def _list_to_write(key: str, text: str, hint: Any) -> str:
    if key == "optim.betas":
        return "write 'optim.betas=[0.9,0.999]'"
    if text == "null" and key != "data.train":
        return f"write {key}=[]"
    return f"write {written(key, text, hint)}"


def _names(value: object) -> list[str]:
    if isinstance(value, list):
        return [str(entry) for entry in value]
    return [] if value is None else [str(value)]


def _instead_of_list(group: str, names: list[str], known: Sequence[str]) -> str:
    if len(names) == 1 and names[0] in known:
        return f"write {group}={names[0]}"
    if group == "loss":
        kinds = [VALUE_NAMES.get(name, name) for name in names]
        return f"weigh them: 'loss.terms=[{', '.join(f'{{kind: {kind}, weight: 1}}' for kind in kinds)}]'"
    if group == "data":
        files = [name for name in names if name not in known]
        sources = ", ".join(files) if files else "{path: org/name, split: train}, pairs.jsonl"
        return f"name the sources: 'data.train=[{sources}]'"
    return f"choose one of {', '.join(known)}"


def _several_values(override: Override) -> ConfigError:
    key, line = override.key_or_group, str(override.input_line)
    hint = run_keys().get(key)
    remedy = "choose one; to sweep, start one job for each value"
    if get_origin(hint) is list or hint is Any:
        remedy = f"a list is written in brackets, {key}=[a,b]; to sweep, start one job for each value"
    if hint is float and re.fullmatch(r"[^=]+=\d+,\d+", line):
        remedy = f"a decimal point is a dot: {line.replace(',', '.')}; to sweep, start one job for each value"
    return ConfigError(f"{key} is given several values", where=_COMMAND_LINE, got=line, remedy=remedy)
