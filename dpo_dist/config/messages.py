"""Error messages for mistakes in a configuration: the wrong key, preset or value, and its correction."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from dpo_dist.config.aliases import KEY_ALIASES, REMEDIES, SOURCE_ALIASES, VALUE_ALIASES, alias_of
from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.config.keys import all_keys, choices, describe_type, key_types, path_key, read_by, run_keys
from dpo_dist.config.loss_kinds import LossKind
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.spelling import likely, nearest
from dpo_dist.errors import ConfigError

_BESIDE = dict.fromkeys(
    ("cosine_with_min_lr", "cosine_warmup_with_min_lr"), " with optim.min_lr_ratio=0.1 for a floor"
)
"""What else to set for a value of another trainer."""


def assignment(key: str, value: str, hint: Any) -> str:
    """Return `key=value`, quoted for a shell, with `...` in place of a value of another type than `hint`."""
    if get_origin(hint) is list and value and not value.startswith("["):
        value = f"[{value}]"
    if choices(hint) and VALUE_ALIASES.get(value.lower()) in choices(hint):
        value = VALUE_ALIASES[value.lower()]
    if value in ("", "null", "[null]") or (choices(hint) and value not in choices(hint)):
        return f"{key}=..."
    return shlex.quote(f"{key}={value}")


def unknown_key(
    key: str, value: str = "", *, where: str = "", own: Collection[str] = (), is_strict: bool = False
) -> ConfigError:
    """Return the error for a key that does not exist, with the likely key if there is one.

    Args:
        key: the whole key.
        value: the text after `=`; empty if unknown.
        where: the file or override with the key.
        own: keys that are suggested before all others.
        is_strict: whether all other keys are refused, so that none of them is suggested.
    """
    if key.startswith("hydra."):
        return ConfigError(
            f"{key} has no effect: Hydra only composes the configuration",
            where=where or key,
            remedy="remove it; run.dir sets the run directory, and a sweep is one job for each value",
        )
    known, expected = run_keys(), ""
    same, words = alias_of(key, KEY_ALIASES), alias_of(key, REMEDIES)
    of_verb = [name for name in own if name.partition(".")[2] == key]
    if same is not None and len(of_verb) == 1:
        same = of_verb[0]  # `output` of export is no other name of run.dir
    whole, _, name = key.rpartition(".")
    is_of_entry = f"{whole}[].{name}" in all_keys()
    found = [same] if same else [] if words else likely(key, own) or likely(key, known)
    found = [whole] if is_of_entry else found
    if is_strict and found and set(own).isdisjoint(found):
        remedy = f"remove it: {read_by(found[0])}"
    elif is_of_entry:
        first = next(iter(key_types(all_keys()[whole].of)))
        before = "" if name == first else f"{first}: {first.upper()}, "
        remedy = f"write '{whole}=[{{{before}{name}: {value or '...'}}}]'; it is a key of an entry"
    elif same is not None:
        type_words = _accepted(same, known[same])
        expected = f"{same}, {type_words}" if type_words else same
        remedy = f"write {assignment(same, value, known[same])}"
        if same.startswith("model.adapter."):
            remedy = f"write 'model.adapter={{{same.rpartition('.')[2]}: {value or '...'}}}'"
    elif words is not None:
        kind = VALUE_ALIASES.get(value, value)
        is_kind = "loss=NAME" in words and kind in [*LossKind, "sigmoid_sft"]
        remedy = f"write loss={kind}" if is_kind else words
    elif found:
        expected = " or ".join(found)
        remedy = f"did you mean {expected}?"
    else:
        remedy = _keys_beside(key, own if is_strict else known)
    return ConfigError(f"there is no key {key!r}", where=where or key, expected=expected, remedy=remedy)


def _accepted(key: str, hint: Any) -> str:
    """Return the values that a key accepts in words: as declared, else by its type."""
    declared = all_keys().get(key)
    return (declared.accepts if declared is not None else "") or describe_type(hint)


def _keys_beside(key: str, known: Iterable[str]) -> str:
    section = key.rpartition(".")[0]
    while section:
        names = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
        if names:
            return f"the keys of {section} are {', '.join(names)}"
        section = section.rpartition(".")[0]
    sections = [name for name in known if "." not in name]
    return f"a key has a section, such as loss.beta; the sections are {', '.join(sections)}"


def unknown_name(name: str, mapping: str, kind: type, *, where: str = "") -> ConfigError:
    """Return the error for an unknown name in a source, an adapter or a term of a loss.

    Args:
        name: the unknown name.
        mapping: the key of the mapping: `data.train[0]`.
        kind: the dataclass of the mapping.
        where: the file or override with the name.
    """
    known, key = list(key_types(kind)), f"{mapping}.{name}"
    alias = SOURCE_ALIASES.get(name) if kind is SourceConfig else KEY_ALIASES.get(key, "").rpartition(".")[2]
    words = None if alias or kind is SourceConfig else REMEDIES.get(key)
    found = [alias] if alias else [] if words else likely(name, known)
    guess = f"did you mean {' or '.join(found)}?" if found else f"the keys here are {', '.join(known)}"
    return ConfigError(
        f"there is no key {key!r}",
        where=where or key,
        expected=f"{mapping}.{found[0]}" if found else "",
        remedy=words or guess,
    )


def preset_names(group: str, folders: Iterable[Path]) -> list[str]:
    """Return the presets of a configuration group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def unknown_preset(group: str, choice: str, folders: Sequence[Path], verb: str = "") -> ConfigError:
    """Return the error for a preset that does not exist, with the key of `verb` for a path."""
    known = preset_names(group, folders)
    if not known:
        return ConfigError(
            "a configuration file does not exist",
            got=f"{group}/{choice}.yaml",
            remedy=f"write it, or name its folder: --config-dir DIR with DIR/{group}/NAME.yaml",
        )
    plus = "+" if group == "experiment" else ""
    found = likely(Path(choice).stem if choice.endswith((".yaml", ".yml")) else choice, known)
    remedies = [f"did you mean {plus}{group}={found[0]}?"] if found else []
    key = path_key(group, verb)
    if key is not None and not found:
        line = assignment(key, choice, run_keys()[key])
        remedies.append(f"a {'file or dataset' if group == 'data' else 'model'} is named by {line}")
    if group == "experiment":
        remedies.append("your own experiments: --config-dir DIR with DIR/experiment/NAME.yaml")
    return ConfigError(
        f"there is no {group} named {choice!r}",
        where=group,
        got=choice,
        expected="one of " + ", ".join(nearest(choice, known)),
        remedy="; ".join(remedies) or f"write {plus}{group}={known[0] if len(known) == 1 else 'NAME'}",
    )


def missing_value(key: str, folders: Sequence[Path]) -> ConfigError:
    """Return the error for a mandatory `key` without a value."""
    section, remedy = key.partition(".")[0], f"set {key}=..."
    if "[" not in key:
        remedy += f" or choose a preset: {section}=" + "|".join(preset_names(section, folders))
    return ConfigError(f"{key} is not set", where=key, remedy=remedy)


def composition_error(
    error: Exception, overrides: Sequence[Override], folders: Sequence[Path]
) -> ConfigError:
    """Return the `ConfigError` for an exception raised while `overrides` were composed.

    Args:
        error: of Hydra, OmegaConf or the YAML parser.
        overrides: of the command line, parsed.
        folders: the folders of configuration groups.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return unknown_preset(group, choice, folders)
    if isinstance(error, MarkedYAMLError):
        message = f"a configuration file is not valid YAML: {error.problem}"
        return ConfigError(message, where=str(error.problem_mark).strip(), remedy="correct the file")
    chain = (error, error.__cause__, error.__context__)
    cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), None)
    if cause is not None:
        key, origin = _origin(cause.full_key or "", error, overrides)
        return content_error(cause, key, origin=origin)
    present = re.search(r"An item is already at '(.+?)'", str(error))
    typed = [
        override.input_line or "" for override in overrides if present and override.key_or_group == present[1]
    ]
    if present and typed:
        return ConfigError(
            f"{present[1]} exists already",
            where="command line",
            got=typed[-1],
            remedy=f"write {typed[-1].lstrip('+')}",
        )
    return ConfigError(
        "the configuration cannot be composed",
        where="command line, or a file that it names",
        got=" ".join(str(error).split()),
        remedy="--info defaults-tree prints the composed files",
    )


def content_error(
    error: OmegaConfBaseException, key: str, *, kind: type = RunConfig, origin: str = ""
) -> ConfigError:
    """Return the `ConfigError` for content that does not fit a dataclass.

    Args:
        error: of OmegaConf; its own key is relative to `kind`.
        key: the whole key.
        kind: the dataclass.
        origin: the file or override with the value.
    """
    where = origin or key
    above, _, name = key.rpartition(".")
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        if kind is not RunConfig:
            return unknown_name(name, above, kind, where=where)
        if key not in run_keys():
            return unknown_key(key, where=origin)
        line = origin.removeprefix("command line: ")
        added = shlex.quote(f"+{line}") if line.startswith(f"{key}=") else f"+{key}=..."
        remedy = f"add it: {added}, or set {above} as a whole"
        return ConfigError(f"{above} is null, or a mapping without {name}", where=where, remedy=remedy)
    if isinstance(error, ValidationError):
        return _wrong_value(key, error, kind, where)
    message = (error.msg or str(error)).splitlines()[0]
    if isinstance(error, InterpolationResolutionError):
        return ConfigError(
            "an interpolation cannot be resolved",
            where=where,
            got=message,
            expected="${SECTION.KEY} of a key with a value, such as ${run.root}",
            remedy="correct the name, or write the value itself",
        )
    return ConfigError(
        message, where=where, remedy=f"correct {key or 'it'}; --cfg job prints the composition"
    )


def _wrong_value(key: str, error: ValidationError, kind: type, where: str) -> ConfigError:
    declared, _, index = (error.full_key or "").partition("[")
    hint, value = key_types(kind).get(declared), error.value
    in_list = bool(index) and get_origin(hint) is list
    hint = get_args(hint)[0] if in_list else hint
    got = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    if choices(hint):
        best_first = nearest(got, choices(hint))
        found = likely(got, best_first)
        remedy = f"set {key} to one of these"
        if found:
            remedy = (
                f"did you mean {found[0]}?"
                if in_list
                else f"did you mean {key}={found[0]}?{_BESIDE.get(got, '')}"
            )
        if isinstance(value, bool) and not where.startswith("command line"):
            remedy = "in YAML a bare on, off, yes or no is true or false: put the word in quotes"
        expected = "one of " + ", ".join(best_first) + (" or null" if type(None) in get_args(hint) else "")
        return ConfigError(f"{key} has no such value", where=where, got=got, expected=expected, remedy=remedy)
    accepted = _accepted(key, hint)
    remedy = f"set {key} to {accepted}"
    if is_dataclass(hint):
        remedy = f"write {key}.{fields(hint)[0].name}=...; or another of its keys"
    if get_origin(hint) is list:
        remedy = f"write {assignment(key, got, hint)}"
    if isinstance(value, float) and value.is_integer():
        remedy = f"write {key}={int(value)}"
    message = f"{key} has the wrong type"
    return ConfigError(message, where=where, got=got, expected=accepted, remedy=remedy)


def _origin(key: str, error: Exception, overrides: Sequence[Override]) -> tuple[str, str]:
    """Return the whole key at fault, and the file or override that gives it."""
    # Hydra names the file in its message only: In 'experiment/mine': ...
    file = re.match(r"In '(.+?)':", str(error))
    if file:
        return key, f"{key} in {file[1]}.yaml"
    for override in reversed(overrides):  # the last one of a key counts
        given = override.key_or_group
        if is_within(key, given) or is_within(given, key):
            return max(key, given, key=len), f"command line: {override.input_line}"
    return key, ""


def is_within(key: str, above: str) -> bool:
    """Return whether `key` is `above` or below it."""
    return key == above or key.startswith((f"{above}.", f"{above}["))
