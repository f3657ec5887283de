"""Parse and check the overrides of a command line, one by one, before anything is composed."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.keys import all_keys, choices, describe_type, key_types, path_key, read_by, run_keys
from dpo_dist.config.losses import LossKind
from dpo_dist.config.names import (
    KEY_ALIASES,
    REMEDIES,
    SOURCE_ALIASES,
    VALUE_ALIASES,
    alias_of,
    likely,
    nearest,
)
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError

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


COMMAND_LINE = "command line"
# The characters that Hydra reads without quotes.
_PLAIN = re.compile(r"[\w\s/\-\\+.$%*@?|:,\[\]{}()\"'=]", re.ASCII)
_CLOSING = {"[": "]", "{": "}", "(": ")"}


def parse_overrides(lines: Sequence[str]) -> list[Override]:
    """Return the overrides of a command line, parsed.

    Raises:
        ConfigError: one cannot be read; the remedy shows the correct quoting.
    """
    parser = OverridesParser.create()
    parsed = []
    for number, line in enumerate(lines):
        before, following = lines[:number], lines[number + 1 :]
        try:
            parsed.append(parser.parse_override(line))
        except HydraException:
            raise _unreadable(line, before, following) from None
        if not parsed[-1].key_or_group:
            raise _unreadable(line, before, following)
    return parsed


def _unreadable(line: str, before: Sequence[str], following: Sequence[str]) -> ConfigError:
    """Return the error for an override that Hydra cannot parse, with the correct spelling if it is clear."""
    message, got = "an override cannot be read", line
    key, equals, value = line.partition("=")
    if parts := _around_equals(line, before, following):
        got, remedy = " ".join(parts), f"write {shlex.quote(''.join(parts))}, without spaces around ="
    elif whole := _rejoined(line, following):
        message, remedy = "the shell split an override at a space", f"put it in quotes: {shlex.quote(whole)}"
    elif not equals:
        message, remedy = "an argument is not key=value", _add_value(line)
    elif key.endswith("+"):
        remedy = f"write the whole list: {shlex.quote(f'{key[:-1]}=[FIRST,SECOND]')}"
    elif _is_open(value):
        message += ": a bracket is not closed"
        remedy = f"close it; text with brackets needs quotes: {shlex.quote(f'{key}={_quoted(value)}')}"
    else:
        special = [character for character in value if not _PLAIN.match(character)] or re.findall("=", value)
        message += f": {special[0]!r} needs quotes" if special else ""
        remedy = _corrected(line, key, value)
    expected = "key=value, for example loss.beta=0.2"
    return ConfigError(message, where=COMMAND_LINE, got=got, expected=expected, remedy=remedy)


def _corrected(line: str, key: str, value: str) -> str:
    """Return the remedy with the likely spelling of a `line` that Hydra cannot read."""
    quoted, punctuated = f"{key}={_quoted(value)}", f"{key}={_with_yaml_punctuation(value)}"
    if _is_readable(punctuated) and punctuated != line:
        return f"write {shlex.quote(punctuated)}"
    if value.startswith(("[", "{")) and not quoted.startswith(f"{key}=["):
        return "a list is [a, b], a mapping {name: value}; text with other characters needs its own quotes"
    if _is_readable(quoted) and quoted != line:
        return f"write {shlex.quote(quoted)}: the inner quotes are read by Hydra, the outer ones by the shell"
    return "a value with spaces, commas, brackets or = needs its own quotes: 'key=\"a, b\"'"


def _around_equals(line: str, before: Sequence[str], following: Sequence[str]) -> list[str]:
    """Return the arguments into which spaces around `=` split one override; empty if none did."""
    key = [argument for argument in before[-1:] if "=" not in argument]
    if line.startswith("="):
        return [*key, line, *(following[:1] if line == "=" else [])] if key else []
    if "=" not in line and following and following[0].startswith("="):
        return [line, *following[: 1 if len(following[0]) > 1 else 2]]
    if "=" not in line and before and before[-1].endswith("="):
        return [before[-1], line]
    return []


def _add_value(line: str) -> str:
    key, _, value = line.partition(":")
    if line.endswith((".yaml", ".yml", ".json")):
        return "--config-dir DIR +experiment=NAME reads DIR/experiment/NAME.yaml"
    if Path(line).expanduser().exists():
        keys = f"run.dir={line}, model.path={line}, 'compare.models=[{line},...]' or 'data.train=[{line}]'"
        return f"write its key: {keys}"
    if key not in run_keys() and not likely(key, run_keys()):
        return "every argument is key=value; one with spaces, commas or brackets needs quotes: 'key=[a, b]'"
    return f"write {key}={value or 'VALUE'}; a value with spaces, commas or brackets needs quotes"


def _rejoined(line: str, following: Sequence[str]) -> str | None:
    """Return `line` with the arguments up to the one that closes its brackets; None without such a one."""
    whole = line
    for more in following if _is_open(line) else ():
        whole += f" {more}"
        if _is_readable(whole):
            return whole
    return None


def _is_open(text: str) -> bool:
    return any(text.count(opening) > text.count(closing) for opening, closing in _CLOSING.items())


def _is_readable(line: str) -> bool:
    try:
        OverridesParser.create().parse_override(line)
    except HydraException:
        return False
    return True


def _with_yaml_punctuation(value: str) -> str:
    """Return `value` with Python's or a shell's punctuation of lists and mappings replaced by YAML's."""
    value = re.sub(r"([{,]\s*\w+)=", r"\1: ", value.rstrip(","))
    if value.startswith("(") and value.endswith(")"):
        value = f"[{value[1:-1].rstrip(',')}]"
    return re.sub(r"""(["'])\s+(["'])""", r"\1,\2", value)


def with_quoted_names(line: str) -> str:
    """Return an override with quotes around entries NAME=VALUE of a list, as Hydra needs them."""
    key, _, value = line.partition("=")
    if not re.fullmatch(r"\[[^\[\]{}\"']*=[^\[\]{}\"']*\]", value) or _is_readable(line):
        return line
    quoted = f"{key}={_quoted(value)}"
    return quoted if _is_readable(quoted) else line


def _quoted(value: str) -> str:
    """Return `value` in quotes; for a flat list, with quotes around the entries that need them."""
    if value.startswith("[") and value.endswith("]") and not set(value[1:-1]) & set("[]{}\"'"):
        entries = [entry.strip() for entry in value[1:-1].split(",")]
        return f"[{','.join(entry if _is_readable(f'key={entry}') else _quoted(entry) for entry in entries)}]"
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


def given_keys(overrides: Iterable[Override]) -> frozenset[str]:
    """Return the keys that a command line gives, with those inside of mappings."""
    keys = set()
    for override in overrides:
        keys.add(override.key_or_group)
        value = override.value()
        if isinstance(value, dict):
            keys |= {f"{override.key_or_group}.{name}" for name in value}
    return frozenset(keys)


def check_overrides(
    overrides: Sequence[Override], folders: Sequence[Path], own: Collection[str] = (), verb: str = ""
) -> None:
    """Check the form of each override: an existing key or group, one value, a list where the type is one.

    Args:
        overrides: of the command line.
        folders: the folders of configuration groups.
        own: keys that are suggested first.
        verb: it reads no keys but `own`; empty if any may be suggested.

    Raises:
        ConfigError: for the first wrong one.
    """
    experiments = [override for override in overrides if override.key_or_group == "experiment"]
    if len(experiments) > 1:
        names = ",".join(name for override in experiments for name in _names(override.value()))
        raise ConfigError(
            "experiments are given in one list, in the order in which they apply",
            where=COMMAND_LINE,
            got=" ".join(str(override.input_line) for override in experiments),
            remedy=f"write '+experiment=[{names}]'",
        )
    for override in overrides:
        is_group = any((folder / override.key_or_group).is_dir() for folder in folders)
        if override.is_sweep_override() and (is_group or _type_of(override) is not None):
            raise _wrong(override, f"{override.key_or_group} has several values", _one_value(override))
        if is_group:
            _check_choice(override, folders, verb)
        else:
            _check_key(override, own, is_strict=bool(verb))
    _check_warmup({override.key_or_group: override.value() for override in overrides})


def _check_warmup(given: Mapping[str, Any]) -> None:
    """Check that the warm-up is given once, also if one value is the default, which no rule can see."""
    if given.get("optim.warmup_ratio") and given.get("optim.warmup_steps") is not None:
        raise ConfigError(
            "the length of the warm-up is given twice",
            where=COMMAND_LINE,
            got="optim.warmup_ratio and optim.warmup_steps",
            expected="one of them",
            remedy="remove one of them",
        )


def _wrong(override: Override, message: str, remedy: str, expected: str = "") -> ConfigError:
    return ConfigError(
        message, where=COMMAND_LINE, got=str(override.input_line), expected=expected, remedy=remedy
    )


def _check_choice(override: Override, folders: Sequence[Path], verb: str) -> None:
    """Check the choice of a preset, or of several experiments; a mapping is a section's content."""
    group, value, line = override.key_or_group, override.value(), str(override.input_line)
    known = preset_names(group, folders)
    if override.is_delete() or isinstance(value, dict):
        return
    if group == "experiment":
        if not override.is_add():
            raise _wrong(override, f"{group} has no default, so it must be added", f"write +{line}")
    elif isinstance(value, list):
        message = f"{group} is one preset, and this is a list: only its last entry would count"
        raise _wrong(override, message, _instead_of_list(group, _names(value), known))
    elif override.is_add():
        raise _wrong(override, f"{group} exists already", f"write {line[1:]}")
    elif not isinstance(value, str):
        remedy = f"choose one of {', '.join(known)}, or remove {group}"
        raise _wrong(override, f"{group} is chosen by name", remedy)
    for name in _names(value):
        if name not in known:
            raise unknown_preset(group, name, folders, verb)


def _type_of(override: Override) -> Any:
    return run_keys().get(override.key_or_group.partition("[")[0])


def _check_key(override: Override, own: Collection[str], *, is_strict: bool) -> None:
    """Check that a key exists, is neither added nor removed, and has a value of the right form."""
    key, line, hint = override.key_or_group, str(override.input_line), _type_of(override)
    text, value = line.partition("=")[2], override.value()
    if hint is None:
        raise unknown_key(key, text, where=f"{COMMAND_LINE}: {line}", own=own, is_strict=is_strict)
    if override.is_add() and not key.startswith("model.adapter."):
        raise _wrong(override, f"{key} exists already", f"write {line.lstrip('+')}")
    if override.is_delete():
        remedy = f"set {key} to another value, or remove {line}"
        raise _wrong(override, f"{key} cannot be removed", remedy)
    remedy = ""
    if get_origin(hint) is list and not isinstance(value, list):
        remedy = _list_to_write(key, text, hint)
    elif isinstance(hint, type) and issubclass(hint, int | float | str) and isinstance(value, list | dict):
        is_kind = key == "loss.kind"
        remedy = (
            _instead_of_list("loss", _names(value), []) if is_kind else f"set {key} to {describe_type(hint)}"
        )
    if remedy:
        raise _wrong(override, f"{key} has the wrong type", remedy, describe_type(hint))


def _list_to_write(key: str, text: str, hint: Any) -> str:
    if key == "optim.betas":
        return "write 'optim.betas=[0.9,0.999]'"
    if text == "null" and key != "data.train":
        return f"write {key}=[]"
    return f"write {assignment(key, text, hint)}"


def _names(value: object) -> list[str]:
    if isinstance(value, list):
        return [str(entry) for entry in value]
    return [] if value is None else [str(value)]


def _instead_of_list(group: str, names: list[str], known: Sequence[str]) -> str:
    if len(names) == 1 and names[0] in known:
        return f"write {group}={names[0]}"
    if group == "loss":
        kinds = [VALUE_ALIASES.get(name, name) for name in names]
        return f"weigh them: 'loss.terms=[{', '.join(f'{{kind: {kind}, weight: 1}}' for kind in kinds)}]'"
    if group == "data":
        files = [name for name in names if name not in known]
        sources = ", ".join(files) if files else "{path: org/name, split: train}, pairs.jsonl"
        return f"name the sources: 'data.train=[{sources}]'"
    return f"choose one of {', '.join(known)}"


def _one_value(override: Override) -> str:
    key, line, hint = override.key_or_group, str(override.input_line), _type_of(override)
    remedy = "choose one"
    if get_origin(hint) is list or hint is Any:
        remedy = f"a list is written in brackets, {key}=[a,b]"
    if hint is float and re.fullmatch(r"[^=]+=\d+,\d+", line):
        remedy = f"a decimal point is a dot: {line.replace(',', '.')}"
    return f"{remedy}; to sweep, start one job for each value"
