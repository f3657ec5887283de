"""Why a configuration could not be composed, told as one `ConfigError`.

Hydra and OmegaConf say what they stumbled over; what a user needs is the key, the value, what would have
been accepted and the nearest thing that exists. That is read from the schema and the parsed overrides.
"""

import re
from collections.abc import Sequence
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

from dpo_dist.config.keys import choices, in_words, key_types, run_keys
from dpo_dist.config.overrides import presets, unknown_preset
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.suggest import likely, nearest, unknown_key, unknown_name, written
from dpo_dist.errors import ConfigError


def explain(fault: Exception, overrides: Sequence[Override], folders: Sequence[Path]) -> ConfigError:
    """The `ConfigError` for a `fault` that composing `overrides` ended with.

    Args:
        fault: what Hydra, OmegaConf or the YAML parser raised.
        overrides: of the command line, parsed.
        folders: the folders of configuration groups.
    """
    if isinstance(fault, MissingConfigException) and fault.missing_cfg_file:
        group, _, choice = fault.missing_cfg_file.rpartition("/")
        return unknown_preset(group, choice, folders)
    if isinstance(fault, MarkedYAMLError):
        place = str(fault.problem_mark).strip()
        return ConfigError(f"a configuration file is not valid YAML: {fault.problem}", where=place)
    chain = (fault, fault.__cause__, fault.__context__)
    cause = next((link for link in chain if isinstance(link, OmegaConfBaseException)), None)
    if cause is not None:
        key, origin = _origin(cause.full_key or "", fault, overrides)
        return explain_key(cause, key, origin=origin)
    return ConfigError(
        "the configuration cannot be composed",
        where="command line or a file that it names",
        got=" ".join(str(fault).split()),
        remedy="--info defaults-tree shows which files are composed",
    )


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
        if kind is not RunConfig:
            holder, _, name = key.rpartition(".")
            return unknown_name(name, holder, kind, where=origin or key)
        if key in run_keys():
            above = key.rpartition(".")[0]
            return ConfigError(
                f"{above} is null, so it has no {key.rpartition('.')[2]}",
                where=origin or key,
                remedy=f"add it: +{key}=..., or set {above} as a whole",
            )
        return unknown_key(key, where=origin)
    if isinstance(cause, ValidationError):
        return _wrong_value(key, cause, kind, origin)
    if isinstance(cause, InterpolationResolutionError):
        return ConfigError(
            "an interpolation cannot be resolved",
            where=origin or key,
            got=(cause.msg or str(cause)).splitlines()[0],
            expected="${SECTION.KEY} of a key that has a value, such as ${run.root}",
            remedy="correct the name, or write the value itself",
        )
    return ConfigError(
        (cause.msg or str(cause)).splitlines()[0],
        where=origin or key,
        remedy=f"correct {key or 'it'}; --cfg job shows what is composed",
    )


def unset(key: str, folders: Sequence[Path]) -> ConfigError:
    """The error for a mandatory `key` without a value."""
    section = key.partition(".")[0]
    remedy = f"set {key}=..."
    if "[" not in key:
        remedy += f" or choose a preset: {section}=" + "|".join(presets(section, folders))
    return ConfigError(f"{key} is not set", where=key, remedy=remedy)


def _wrong_value(key: str, cause: ValidationError, kind: type, origin: str) -> ConfigError:
    declared, _, index = (cause.full_key or "").partition("[")
    hint = key_types(kind).get(declared)
    where, got = origin or key, _as_written(cause.value)
    if choices(hint):
        return _no_such_choice(key, cause.value, hint, where)
    if index and get_origin(hint) is list:
        hint = get_args(hint)[0]
    remedy = f"set {key} to {in_words(hint)}"
    if get_origin(hint) is list:
        remedy = f"write {written(key, got, hint)}"
    if isinstance(cause.value, float) and cause.value.is_integer():
        remedy = f"write {key}={int(cause.value)}"
    return ConfigError(
        f"{key} has the wrong type", where=where, got=got, expected=in_words(hint), remedy=remedy
    )


def _no_such_choice(key: str, value: Any, hint: Any, where: str) -> ConfigError:
    got = _as_written(value)
    best_first = nearest(got, choices(hint))
    null = " or null" if type(None) in get_args(hint) else ""
    found = likely(got, best_first)
    remedy = f"did you mean {key}={found[0]}?" if found else f"set {key} to one of these"
    if isinstance(value, bool) and not where.startswith("command line"):
        remedy = "in YAML a bare on, off, yes or no is true or false: put the word in quotes"
    expected = "one of " + ", ".join(best_first) + null
    return ConfigError(f"{key} has no such value", where=where, got=got, expected=expected, remedy=remedy)


def _as_written(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _origin(key: str, fault: Exception, overrides: Sequence[Override]) -> tuple[str, str]:
    """The whole key at fault, and what brought it in."""
    # Hydra tells which file it was merging in its message only: In 'experiment/mine': ...
    file = re.match(r"In '(.+?)':", str(fault))
    if file:
        return key, f"{key} in {file[1]}.yaml"
    # Of an option that is given twice the last one counts.
    for override in reversed(overrides):
        given = override.key_or_group
        if _lies_in(key, given) or _lies_in(given, key):
            return max(key, given, key=len), f"command line: {override.input_line}"
    return key, ""


def _lies_in(key: str, above: str) -> bool:
    return key == above or key.startswith((f"{above}.", f"{above}["))
