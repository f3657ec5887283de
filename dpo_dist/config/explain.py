"""Why a configuration could not be composed, told as one `ConfigError`.

Hydra and OmegaConf say what they stumbled over; what a user needs is the key, the value, what would have
been accepted and the nearest thing that exists. That is read from the schema and the parsed overrides.
"""

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError

from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError

_ALSO_CALLED = {"dpo": "sigmoid", "slic": "hinge"}


def explain(fault: Exception, overrides: Sequence[str], config_dir: Path) -> ConfigError:
    """The `ConfigError` for a `fault` that composing `overrides` ended with.

    Args:
        fault: what Hydra, OmegaConf or the YAML parser raised.
        overrides: the overrides as written on the command line.
        config_dir: the folder of the configuration groups.
    """
    if isinstance(fault, OverrideParseException):
        return _malformed(fault.override)
    if isinstance(fault, MissingConfigException) and fault.missing_cfg_file:
        return _unknown_choice(fault.missing_cfg_file, fault.options, config_dir)
    if isinstance(fault, MarkedYAMLError):
        place = str(fault.problem_mark).strip()
        return ConfigError(f"a configuration file is not valid YAML: {fault.problem}", where=place)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    chain = (fault, fault.__cause__, fault.__context__)
    cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), None)
    if cause is not None:
        key, origin = _origin(cause.full_key or "", fault, parsed)
        return explain_key(cause, key, origin=origin)
    for override in parsed:
        misused = _misused(override, config_dir)
        if misused is not None:
            return misused
    return ConfigError("the configuration cannot be composed", got=" ".join(str(fault).split()))


def explain_key(
    cause: OmegaConfBaseException, key: str, *, kind: type = RunConfig, origin: str = ""
) -> ConfigError:
    """The `ConfigError` for content that is no `kind`.

    Args:
        cause: what OmegaConf raised; its own key is relative to `kind`.
        key: the whole key.
        kind: the dataclass that the content was merged into.
        origin: the file or override that gave the value.
    """
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(key, cause, kind, origin)
    if isinstance(cause, ValidationError):
        return _wrong_value(key, cause, kind, origin)
    return ConfigError((cause.msg or str(cause)).splitlines()[0], where=origin or key)


def unset(key: str, config_dir: Path) -> ConfigError:
    """The error for a mandatory `key` without a value."""
    section = key.partition(".")[0]
    remedy = f"set {key}=..."
    if "[" not in key:
        remedy += f" or choose a preset: {section}=" + "|".join(_presets(section, config_dir))
    return ConfigError(f"{key} is not set", where=key, remedy=remedy)


def key_types(kind: type) -> dict[str, Any]:
    """Every key below a dataclass with its declared type, sections included: `{"loss.beta": float, ...}`."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[name] = hint
        if isinstance(hint, type) and is_dataclass(hint):
            found |= {f"{name}.{below}": inner for below, inner in key_types(hint).items()}
    return found


def in_words(hint: Any) -> str:
    """A declared type as a user would say it."""
    if get_origin(hint) is types.UnionType:
        return " or ".join(in_words(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return "a list in brackets: [a,b]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in fields(hint))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "")


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """`known`, the most similar to `word` first; of dotted keys the last part counts by itself as well."""
    word = _ALSO_CALLED.get(word, word)

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word, candidate).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    return sorted(known, key=similarity, reverse=True)


def _presets(group: str, config_dir: Path) -> list[str]:
    return sorted(path.stem for path in (config_dir / group).glob("*.yaml"))


def _malformed(override: str) -> ConfigError:
    return ConfigError(
        "an override cannot be read",
        where="command line",
        got=override,
        expected="key=value, for example loss.beta=0.2",
        remedy="a value with spaces, commas, brackets or = needs quotes of its own: 'key=\"a, b\"'",
    )


def _unknown_choice(missing: str, options: Sequence[str] | None, config_dir: Path) -> ConfigError:
    group, _, choice = missing.rpartition("/")
    best_first = nearest(choice, options or _presets(group, config_dir))
    if not best_first:
        return ConfigError("a configuration file does not exist", got=missing)
    plus = "+" if group == "experiment" else ""
    return ConfigError(
        f"there is no {group} named {choice!r}",
        where=group,
        got=choice,
        expected="one of " + ", ".join(best_first),
        remedy=f"did you mean {plus}{group}={best_first[0]}?",
    )


def _unknown_key(key: str, cause: OmegaConfBaseException, kind: type, origin: str) -> ConfigError:
    known = list(key_types(kind))
    for holder, hint in key_types(kind).items():
        # OmegaConf names only the last part of a key inside a list's entry.
        if get_args(hint) == (cause.object_type,):
            key, known = f"{holder}[].{key}", [f"{holder}[].{name}" for name in key_types(get_args(hint)[0])]
    what, where = f"there is no key {key!r}", origin or key
    if key.startswith("hydra."):
        return ConfigError(what, where=where, remedy="see what Hydra knows with --cfg hydra")
    best = nearest(key, known)[0]
    if key.startswith(f"{best}."):
        return ConfigError(what, where=where, remedy=f"add it: +{key}=..., or set {best} as a whole")
    return ConfigError(what, where=where, expected=best, remedy=f"did you mean {best}?")


def _wrong_value(key: str, cause: ValidationError, kind: type, origin: str) -> ConfigError:
    declared, _, index = (cause.full_key or "").partition("[")
    hint = key_types(kind).get(declared)
    where, got = origin or key, str(cause.value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        best_first = nearest(got, [member.name for member in hint])
        remedy = f"did you mean {key}={best_first[0]}?"
        if isinstance(cause.value, bool):
            remedy = "in YAML a bare on, off, yes or no is true or false: put the word in quotes"
        expected = "one of " + ", ".join(best_first)
        return ConfigError(f"{key} has no such value", where=where, got=got, expected=expected, remedy=remedy)
    if index and get_origin(hint) is list:
        hint = get_args(hint)[0]
    return ConfigError(f"{key} has the wrong type", where=where, got=got, expected=in_words(hint))


def _origin(key: str, fault: Exception, overrides: Sequence[Override]) -> tuple[str, str]:
    """The whole key at fault, and what brought it in."""
    # Hydra tells which file it was merging in its message only: In 'experiment/mine': ...
    file = re.match(r"In '(.+?)':", str(fault))
    if file:
        return key, f"{key} in {file[1]}.yaml"
    for override in overrides:
        given = override.key_or_group
        if _lies_in(key, given) or _lies_in(given, key):
            return max(key, given, key=len), f"command line: {override.input_line}"
    return key, ""


def _lies_in(key: str, above: str) -> bool:
    return key == above or key.startswith((f"{above}.", f"{above}["))


def _misused(override: Override, config_dir: Path) -> ConfigError | None:
    """What is wrong with an override that Hydra refused for its form, not its value."""
    key, line = override.key_or_group, override.input_line or ""
    known, is_group = key in key_types(RunConfig), (config_dir / key).is_dir()
    if override.is_sweep_override():
        what = f"{key} is given several values"
        remedy = "one value or a list, key=[a,b]; to sweep, start one job for each value"
    elif override.is_add() and known:
        what, remedy = f"{key} exists already", f"write {line.removeprefix('+')}"
    elif is_group and not isinstance(override.value(), str | list | dict):
        what, remedy = f"{key} is chosen by name", f"choose one of {', '.join(_presets(key, config_dir))}"
    elif is_group and not known and not override.is_add():
        what, remedy = f"no {key} is chosen by default, so it has to be added", f"write +{line}"
    else:
        return None
    return ConfigError(what, where="command line", got=line, remedy=remedy)
