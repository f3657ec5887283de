"""Mistakes in a command or a file of keys, each with its answer; all of one command are one error."""

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from yaml import MarkedYAMLError

from dpo_dist.config.fields import fields_of
from dpo_dist.config.keys import (
    COMMAND_LINE,
    all_keys,
    as_written,
    choices,
    describe_type,
    entry_of,
    nested,
    read_by,
    run_keys,
)
from dpo_dist.config.names import answer_to, key_of, likely, nearest, source_key_of, values_of
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError

SCHEMA = TypeAdapter(RunConfig)
_PRESET_PATHS = {
    "": {"model": "model.path", "data": "data.train", "reference": "reference.path"},
    "evaluate": {"model": "evaluation.model", "data": "evaluation.data"},
    "compare": {"model": "compare.models", "data": "data.eval"},
}
"""The keys by which verbs take the path of what a group of presets names."""


def unreadable(words: Sequence[str]) -> ConfigError:
    """Return the error for the words of a command line that are no overrides."""
    whole = " ".join(words)
    key, equals, value = whole.partition("=")
    quoted = _quoted(value.strip())
    is_text = quoted[0] == value[:1] or value[:1] not in ("[", "{", "(")
    readable = (f"{key.strip()}={text}" for text in (value.strip(), *([quoted] if is_text else [])))
    remedy = (
        "no space is around =, and a value with spaces, commas, brackets or = needs quotes: 'KEY=\"a, b\"'"
    )
    if not equals and Path(whole).expanduser().exists():
        remedy = f"write its key: run.dir={whole}, model.path={whole} or 'data.train=[{whole}]'"
    elif key and value and (corrected := next(filter(is_readable, readable), "")):
        remedy = f"write {shlex.quote(corrected)}; {remedy}"
    return ConfigError(
        "the command has words that are not KEY=VALUE",
        where=COMMAND_LINE,
        got=whole,
        expected="KEY=VALUE, for example loss.beta=0.2",
        remedy=remedy,
    )


def is_readable(line: str) -> bool:
    """Return whether Hydra can parse an override."""
    try:
        OverridesParser.create().parse_override(line)
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    """Return `value` in quotes; for a flat list, with quotes around the entries that need them."""
    if value.startswith("[") and value.endswith("]") and not set(value[1:-1]) & set("[]{}\"'"):
        entries = [entry.strip() for entry in value[1:-1].split(",")]
        return f"[{','.join(entry if is_readable(f'key={entry}') else _quoted(entry) for entry in entries)}]"
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


def with_quoted_names(line: str) -> str:
    """Return an override with quotes around entries NAME=VALUE of a list, as Hydra needs them."""
    key, _, value = line.partition("=")
    quoted = f"{key}={_quoted(value)}"
    is_list = re.fullmatch(r"\[[^\[\]{}\"']*=[^\[\]{}\"']*\]", value)
    return quoted if is_list and not is_readable(line) and is_readable(quoted) else line


def assignment(key: str, value: str) -> str:
    """Return `key=value`, quoted for a shell, with `...` in place of a value that the key does not accept."""
    for text in (value, *values_of(value), f"[{value}]"):
        if text and _is_accepted(key, text):
            return shlex.quote(f"{key}={text}")
    return f"{key}=..."


def _is_accepted(key: str, text: str) -> bool:
    if key == "model.adapter.target_modules" and text == "all":  # the name of no layer
        return False
    if key == "loss":
        return text in [*choices(run_keys()["loss.kind"]), "sigmoid_sft"]
    try:
        value = OverridesParser.create().parse_override(f"{key}={text}").value()
        for part in reversed(key.split(".")):
            value = {part: value}
        SCHEMA.validate_python(value)
    except HydraException:
        return False
    except ValidationError as error:
        return not any(_key_at(found["loc"]).startswith(key) for found in error.errors())
    return True


def unknown_key(
    key: str, value: str = "", *, where: str = "", own: Collection[str] = (), is_strict: bool = False
) -> ConfigError:
    """Return the error for a key that does not exist, with what to write in its place.

    Args:
        key: the whole key.
        value: as it was written; empty if unknown.
        where: the file or override with the key.
        own: keys that are suggested before all others.
        is_strict: whether all other keys are refused, so that none of them is suggested.
    """
    mapping, _, name = key.rpartition(".")
    if f"{mapping}[].{name}" in all_keys() and (not is_strict or mapping in own):
        return _key_of_an_entry(mapping, name, value, where or key)
    above = all_keys().get(entry_of(mapping).removesuffix("[]"))
    kind = nested(above.type) if above else None
    known = [f"{mapping}.{option}" for option in fields_of(kind)] if kind else list(run_keys())
    is_source = kind is not None and mapping != "model.adapter" and "terms" not in mapping
    source_key = source_key_of(name) if is_source else None
    same = f"{mapping}.{source_key}" if source_key else None if is_source else key_of(key)
    answer, expected = None if is_source else answer_to(key), ""
    if key.startswith("hydra."):
        answer = "remove it: run.dir sets the run directory, and a sweep is one job for each value"
    of_verb = [option for option in own if option.partition(".")[2] == key]
    if same and len(of_verb) == 1:
        same = of_verb[0]  # `output` of export is no other name of run.dir
    found = [same] if same else [] if answer else likely(key, own) or likely(key, known)
    if is_strict and found and set(own).isdisjoint(found) and found[0] != "loss":
        remedy = f"remove it: {read_by(found[0])}"
    elif same:
        row = all_keys().get(entry_of(same))
        expected = f"{same}, {row.type_words}" if row else same
        remedy = f"did you mean {source_key}?" if source_key else f"write {assignment(same, value)}"
    elif answer:
        remedy = answer.replace("{value}", value or "...")
    elif found:
        expected = " or ".join(found)
        remedy = f"did you mean {expected}?"
    else:
        remedy = _keys_beside(key, known if kind else own if is_strict else known)
    return ConfigError(f"there is no key {key!r}", where=where or key, expected=expected, remedy=remedy)


def _key_of_an_entry(mapping: str, name: str, value: str, where: str) -> ConfigError:
    """Return the error for a key of an entry of a list, written as if it were one of the list."""
    first = next(option for option in all_keys() if option.startswith(f"{mapping}[].")).rpartition(".")[2]
    before = "" if name == first else f"{first}: {first.upper()}, "
    remedy = f"write '{mapping}=[{{{before}{name}: {value or '...'}}}]'; it is a key of an entry"
    return ConfigError(f"there is no key '{mapping}.{name}'", where=where, expected=mapping, remedy=remedy)


def _keys_beside(key: str, known: Iterable[str]) -> str:
    section = key.rpartition(".")[0]
    if names := [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section and section]:
        return f"the keys of {section} are {', '.join(names)}"
    sections = [name for name in known if "." not in name]
    return f"a key has a section, such as loss.beta; the sections are {', '.join(sections)}"


def preset_names(group: str, folders: Iterable[Path]) -> list[str]:
    """Return the presets of a configuration group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def unknown_preset(group: str, choice: str, folders: Sequence[Path], verb: str = "") -> ConfigError:
    """Return the error for a preset that does not exist, with the key of `verb` for a path."""
    known, plus = preset_names(group, folders), "+" if group == "experiment" else ""
    found = likely(Path(choice).stem if choice.endswith((".yaml", ".yml")) else choice, known)
    key = _PRESET_PATHS.get(verb, _PRESET_PATHS[""]).get(group)
    remedy = f"write {plus}{group}={known[0] if len(known) == 1 else 'NAME'}"
    if found:
        remedy = f"did you mean {plus}{group}={found[0]}?"
    elif key is not None:
        remedy = (
            f"a {'file or dataset' if group == 'data' else 'model'} is named by {assignment(key, choice)}"
        )
    if group == "experiment":
        remedy += "; your own: name the file, my.yaml, or --config-dir DIR with DIR/experiment/NAME.yaml"
    return ConfigError(
        f"there is no {group} named {choice!r}",
        where=group,
        got=choice,
        expected="one of " + ", ".join(nearest(choice, known)),
        remedy=remedy,
    )


def composition_error(error: Exception, folders: Sequence[Path]) -> ConfigError:
    """Return the `ConfigError` for an exception of Hydra, OmegaConf or the YAML parser."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return unknown_preset(group, choice, folders)
    if isinstance(error, MarkedYAMLError):
        message = f"a configuration file is not valid YAML: {error.problem}"
        return ConfigError(message, where=str(error.problem_mark).strip(), remedy="correct the file")
    if isinstance(error, InterpolationResolutionError):
        return ConfigError(
            "an interpolation cannot be resolved",
            where=error.full_key or COMMAND_LINE,
            got=(error.msg or str(error)).splitlines()[0],
            expected="${SECTION.KEY} of a key with a value, such as ${run.root}",
            remedy="correct the name, or write the value itself",
        )
    cause = error.msg if isinstance(error, OmegaConfBaseException) else None
    return ConfigError(
        "the configuration cannot be composed",
        where="command line, or a file that it names",
        got=" ".join(str(cause or error).split()),
        remedy="correct the key or the file; without a file of your own, --cfg job prints the composition",
    )


def _key_at(place: Sequence[int | str], *, is_unknown: bool = False) -> str:
    """Return the key at a place of pydantic, which goes on with the parts of types: `data.train[0].path`."""
    found = ""
    for index, part in enumerate(place):
        longer = f"{found}[{part}]" if isinstance(part, int) else f"{found}.{part}".lstrip(".")
        known = entry_of(longer)
        is_last = is_unknown and index == len(place) - 1
        if not is_last and isinstance(part, str) and known not in run_keys() and known not in all_keys():
            break
        found = longer
    return found


def wrong_values(error: ValidationError, origin: Callable[[str], str]) -> list[ConfigError]:
    """Return an error for each key whose value does not fit the schema.

    Args:
        error: of pydantic.
        origin: the override or file that gives a key.
    """
    found: dict[str, ConfigError] = {}
    missing: dict[str, ConfigError] = {}
    for one in error.errors():
        is_unknown = one["type"] == "unexpected_keyword_argument"
        key = _key_at(one["loc"], is_unknown=is_unknown)
        where = origin(key)
        if is_unknown:
            value = as_written(one["input"])
            found[key] = unknown_key(key, "" if isinstance(one["input"], dict) else value, where=where)
        elif one["type"] == "missing":
            missing[key] = ConfigError(
                f"{key} is not set", where=key, remedy=f"write {key.rpartition('.')[2]}: ..."
            )
        else:
            found.setdefault(key, _wrong_value(key, one, where))
    unknown = {key.rpartition(".")[0] for key in found}  # the missing key may be there under another name
    missing = {key: error for key, error in missing.items() if key.rpartition(".")[0] not in unknown}
    return list((found | missing).values())


_BOUNDS = {
    "greater_than": "> {gt:g}",
    "greater_than_equal": ">= {ge:g}",
    "less_than": "< {lt:g}",
    "less_than_equal": "<= {le:g}",
    "finite_number": "a finite number",
}


_TEXTS = {"empty": "write a value, or remove the key", "home": "write the whole path"}


def _wrong_value(key: str, error: ErrorDetails, where: str) -> ConfigError:
    row = all_keys().get(entry_of(key)) or all_keys().get(entry_of(key).removesuffix("[]"))
    hint, value, kind = row.type if row else run_keys().get(key), error["input"], error["type"]
    if row and key.endswith("]"):
        hint = nested(hint) or get_args(hint)[0]
    null = " or null" if type(None) in get_args(hint) else ""
    got, expected, names = (
        as_written(value),
        (row.accepts if row else "") or describe_type(hint),
        choices(hint),
    )
    if kind in _BOUNDS:
        expected = ((row.bounds if row else "") or _BOUNDS[kind].format(**error.get("ctx", {}))) + null
        message, remedy = "is out of range", f"choose {key} in that range" + (null and ", or null")
    elif kind in _TEXTS:
        message, expected, remedy = error["msg"], "", _TEXTS[kind]
    elif names or kind == "string_pattern_mismatch":
        words = [] if names or "[" in key else re.findall(r"[\w-]+", expected)
        known = names or [word for word in words if _is_accepted(key, word)]
        found = likely(got, known) or [name for name in [Path(got).name] if words and _is_accepted(key, name)]
        message, remedy = "has no such value", f"set {key} to one of these, or remove it"
        if isinstance(value, bool) and " in " in where:
            remedy = "in YAML a bare on, off, yes or no is true or false: put the word in quotes"
        elif found:
            remedy = f"did you mean {key}={found[0]}?"
        if len(names) > 2:
            expected = "one of " + ", ".join(nearest(got, names)) + null
    else:
        message, remedy = "has the wrong type", _typed(key, hint, value, expected)
    return ConfigError(f"{key} {message}", where=where, got=got, expected=expected, remedy=remedy)


def _typed(key: str, hint: Any, value: Any, expected: str) -> str:
    """Return how to write a value of the right type."""
    got, inner = as_written(value), nested(hint)
    if get_origin(hint) is list:
        return f"write {assignment(key, got)}"
    if key == "model.adapter":
        path = "/" in got
        return f"write model.adapter.path={got}" if path else "write 'model.adapter={r: 64, alpha: 128}'"
    if inner is not None and key.endswith("]"):
        return f"write a {next(iter(fields_of(inner)))}, or a mapping with it"
    if inner is not None:
        return f"write {key}.{next(iter(fields_of(inner)))}=...; or another of its keys"
    if isinstance(value, float) and value.is_integer():
        return f"write {key}={int(value)}"
    return f"set {key} to {expected}"
