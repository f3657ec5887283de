"""One form for all mistakes in a command or a file: the key, its place, what is allowed, the nearest name.

Similarity only names what may be meant: no word is repaired and read.
"""

import shlex
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dpo_dist.config.extensions import ask, meanings_of
from dpo_dist.config.keys import (
    all_keys,
    group_folders,
    preset_names,
    run_keys,
    strip_indices,
    to_choose,
)
from dpo_dist.config.losses import NO_OPTION, kinds_using
from dpo_dist.config.schema import SCHEMA
from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written, choices, describe_type, nested, validated
from dpo_dist.foundation.files import similar_path
from dpo_dist.foundation.remedies import Typed
from dpo_dist.foundation.types import as_tree

FAILURES = (
    *(ConfigError, HydraException, OmegaConfBaseException),
    *(yaml.YAMLError, ValueError, RecursionError, OSError),
)
"""Exceptions that composing a command can raise."""
_SIMILAR = 0.75
"""Least similarity of a name that is proposed: a less similar one misleads more often than it helps."""
_PATHS = {"model": "model.path", "data": "data.train", "reference": "reference.path"}
"""The key for a path that is written in place of a preset, by group."""


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def nearest(name: str, names: Iterable[str], table: str = "keys") -> list[str]:
    """Return the names that may be meant by one that does not exist: `loss.beta` by `loss.betta` or `beta`.

    First by the last part, in the same section before others. `table`: other programs' names that count.
    """
    names = list(names)
    section = name.rpartition(".")[0]
    found = [each for each in names if each in meanings_of(name, table)]
    for candidates, least in (
        ([each for each in names if each.startswith(section)], 1),
        ([each for each in names if each.rpartition(".")[0] == section], _SIMILAR),
        (names, _SIMILAR),
    ):
        near = get_close_matches(_last(name).lower(), map(_last, candidates), 1, least)
        same = [each for each in candidates if [_last(each)] == near]
        found = found or get_close_matches(name, same, 1 if section else 3, 0)
    return found


def did_you_mean(words: Iterable[str]) -> str:
    """Return the question `did you mean loss.beta or optim.betas?`."""
    return f"did you mean {' or '.join(words)}?"


def assigned(keys: Iterable[str], value: Any) -> list[str]:
    """Return KEY=VALUE for keys that take the value, or what may be meant by it; else the keys' types."""
    words = []
    types = []
    for each in keys:
        text = as_written(value)
        presets = preset_names(each, group_folders())
        key = each if not presets or text in presets else _PATHS.get(each, each)
        meanings = [value]
        if not isinstance(value, list):
            meanings += nearest(text, [*choices(run_keys().get(each)), *presets], "values")
        word = next((f"{key}={as_written(it)}" for it in meanings if it in presets or fits(key, it)), "")
        words += [shlex.quote(word)] * bool(word)
        row = all_keys().get(key)
        types.append(f"{key}, {row.type_words}" if row else f"{key}=...")
    return words or types


def not_a_word(words: Sequence[str], verb: str = "") -> ConfigError:
    """Return the error for words of a verb's command that are not KEY=VALUE."""
    return ConfigError(
        "these words are not KEY=VALUE",
        where=Typed(*words),
        expected=f"KEY=VALUE, such as {VERBS[verb or 'train'].takes_word}=...",
        remedy="write the key too, no space around =, and quotes around spaces and brackets: 'KEY=[a, b]'",
    )


def instead_of_key(key: str, value: Any = None) -> str:
    """Return what to write in place of a key that does not exist."""
    section, _, name = strip_indices(key).rpartition(".")
    of_list = section.removesuffix("[]")
    if any(each.startswith(f"{of_list}[].") for each in all_keys()):
        section = f"{of_list}[]"
    beside = [_last(each) for each in all_keys() if each.rpartition(".")[0] == section]
    if key == "experiment":
        return "begin the file of an experiment with the line '# @package _global_'"
    if key in run_keys():
        return f"write {key} as keys inside of keys, '{of_list}: {{{name}: ...}}', as Hydra reads them"
    if f"{of_list}[].{name}" in all_keys():
        return f"write it inside an entry: '{of_list}=[{{{name}: ...}}]'"
    if of_list != section:
        near = nearest(name, beside, "sources")
    else:
        near = nearest(key, ["experiment", *run_keys()])
    remedy: str = ask("advice", key, as_written(value))
    if near and not remedy:
        kinds = [kind for each in near for kind in kinds_using(each.removeprefix("loss."))]
        of_loss = f" It is an option of {', '.join(kinds)}" * near[0].startswith("loss.options.")
        remedy = did_you_mean(near if of_list != section else assigned(near, value)) + of_loss
    if not remedy and beside:
        remedy = f"the keys of {section} are {', '.join(beside)}"
    sections = [each for each in run_keys() if "." not in each]
    return remedy or f"a key has a section, such as loss.beta; the sections are {', '.join(sections)}"


def unknown_key(key: str, where: str = "", value: Any = None) -> ConfigError:
    """Return the error for a key that does not exist."""
    return ConfigError(f"there is no key {key!r}", where=where or key, remedy=instead_of_key(key, value))


def unknown_preset(group: str, name: str, presets: Sequence[str], where: str = "") -> ConfigError:
    """Return the error for a preset that does not exist."""
    near = [to_choose(group, each) for each in nearest(name, presets, "values")]
    if not near and group in _PATHS:
        near = [shlex.quote(f"{_PATHS[group]}={name}")]
    remedy = ask("advice", group, name)
    if near and not remedy:
        remedy = did_you_mean(near)
    return ConfigError(
        f"there is no {group} named {name!r}",
        where=where or group,
        expected=f"one of {', '.join(presets)}",
        remedy=remedy or f"choose one with {to_choose(group, 'NAME')}, or name a file of your own",
    )


def explained(error: Exception, place: str) -> list[ConfigError]:
    """Return the mistake behind an exception of Hydra, OmegaConf, the YAML parser or the file system.

    `place`: the file that was read, the word or key.
    """
    got = str(error).partition("\n")[0]
    remedy = "correct the file"
    match error:
        case ConfigError():
            return [error]
        case MissingConfigException() if error.missing_cfg_file:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            return [unknown_preset(group, name, error.options or ())]
        case HydraException():
            remedy = "correct the file; to replace a group's preset, it lists 'override /GROUP: NAME'"
        case yaml.MarkedYAMLError() if error.problem_mark:
            place = f"{error.problem_mark.name}:{error.problem_mark.line + 1}"
            got = str(error.problem)
        case OSError():
            got = error.strerror or got
            similar = similar_path(Path(place))
            remedy = "check the path, which is relative to the working directory"
            if similar is not None and similar.suffix in (".yaml", ".yml"):
                remedy = did_you_mean([str(similar)])
    return [ConfigError("this cannot be read", where=place, got=got, remedy=remedy)]


def _key_at(place: Sequence[int | str]) -> str:
    """Return the key at a place in pydantic's error, `data.train[0].path`, without types at its end."""
    key = ""
    for part in place:
        longer = f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}".lstrip(".")
        option = strip_indices(longer)
        if option not in run_keys() and option not in all_keys() and not isinstance(part, int):
            break
        key = longer
    return key


def wrong_values(error: ValidationError, origin: Callable[[str], str]) -> list[ConfigError]:
    """Return an error for each key whose value does not fit; `origin` returns what sets a key."""
    mistakes = dict[str, ConfigError]()
    # Unknown keys first: one of them may be the missing key, mistyped.
    for detail in sorted(error.errors(), key=lambda detail: detail["type"] == "missing"):
        is_unknown = detail["type"] == "unexpected_keyword_argument"
        key = _key_at(detail["loc"])
        if is_unknown:
            key = f"{_key_at(detail['loc'][:-1])}.{detail['loc'][-1]}".lstrip(".")
        above, _, name = key.rpartition(".")
        if detail["type"] == NO_OPTION:
            for option in detail["ctx"]["names"]:
                place = f"{key}.{option}"
                mistakes[place] = _no_option(key, option, detail, origin(place))
        elif is_unknown:
            mistakes[key] = unknown_key(key, origin(key), detail["input"])
        elif detail["type"] != "missing":
            mistakes.setdefault(key, _wrong_value(key, detail, origin(key)))
        elif all(other.rpartition(".")[0] != above for other in mistakes):
            expected = all_keys()[strip_indices(key)].type_words
            remedy = f"write {name} into the entry: {{{name}: ..., ...}}"
            mistakes[key] = ConfigError(
                f"{key} is not set", where=origin(above), expected=expected, remedy=remedy
            )
    return list(mistakes.values())


def _wrong_value(key: str, error: ErrorDetails, where: str) -> ConfigError:
    """Return the error for a value that a key cannot have."""
    context = error.get("ctx", {})
    mistake: ConfigError | None = context.get("mistake")
    if mistake is not None:  # of a path or URL
        mistake.where = key if isinstance(where, Typed) else where  # a word may have a password
        return mistake
    plain = strip_indices(key)
    row = all_keys().get(plain) or all_keys().get(plain.removesuffix("[]"))
    hint = row.type if row else run_keys().get(key)
    expected = row.type_words if row else describe_type(hint)
    if key.endswith("]") and row:  # an entry of a list
        hint = nested(hint) or get_args(hint)[0]
        expected = row.facts.accepts.partition("a list of ")[2] or describe_type(hint)
    value = error["input"]
    text = as_written(value)
    expected += context.get("allowed", ", not empty" * (error["input"] == ""))
    near = nearest(text, choices(hint), "values")
    remedy = ask("advice", key, text)
    if value in preset_names(key, group_folders()):  # of an experiment; a file of the command may have it
        remedy = f"write 'override /{key}: {value}' into the list of defaults"
    elif near and not remedy:
        remedy = did_you_mean(near if "[" in key else (f"{key}={each}" for each in near))
    return ConfigError(
        f"{key} cannot have this value",
        where=where,
        got=repr(value) if isinstance(value, str) else text,  # '5' is no whole number
        expected=expected,
        remedy=remedy or f"set {key} to {expected}, or remove it",
    )


def _no_option(place: str, name: str, error: ErrorDetails, where: str) -> ConfigError:
    """Return the error for an option in the mapping `place` that a kind of loss does not have."""
    kind = error["ctx"]["kind"]
    options = error["ctx"]["known"]
    users = ", ".join(sorted(kinds_using(f"options.{name}"))) * bool(kind)
    near = nearest(f"{place}.{name}", [f"{place}.{each}" for each in options])
    remedy = f"remove it{', or choose a loss that has it: ' * bool(users)}{users}"
    remedy = did_you_mean(near) if near else f"{remedy}; loss=NAME replaces all options of the loss"
    message = f"{kind} has no option {name!r}" if kind else "each entry of loss.terms has its own options"
    return ConfigError(
        message,
        where=where,
        got=as_written(error["input"][name]),
        expected=f"one of {', '.join(options)}" if options else "no option",
        remedy=remedy,
    )


def fits(key: str, value: Any) -> bool:
    """Return whether a key accepts a value."""
    values = {key: value}
    kinds = kinds_using(key.removeprefix("loss."))
    if kinds:
        values["loss.kind"] = kinds[0]
    try:
        validated(SCHEMA, as_tree(values))
    except ValidationError as error:
        return not any(_key_at(detail["loc"]).startswith(key) for detail in error.errors())
    return True
