"""Mistakes in a command or a file of keys, each with its answer; all of one command are one error.

Names that users meant are those of other trainers (names.yaml), and names that are nearly right.
"""

import difflib
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

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
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError

SCHEMA = TypeAdapter(RunConfig)
_PRESET_PATHS = {
    "": {"model": "model.path", "data": "data.train", "reference": "reference.path"},
    "evaluate": {"model": "evaluation.model", "data": "evaluation.data"},
    "compare": {"model": "compare.models", "data": "data.eval"},
}
"""The keys by which verbs take the path of what a group of presets names."""


@cache
def _table(section: str) -> dict[str, tuple[str, ...]]:
    """Return, for each name of a section of names.yaml, what it stands for."""
    content = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
    found: dict[str, tuple[str, ...]] = {}
    for meant, names in content[section].items():
        for name in names.split():
            found[name] = (*found.get(name, ()), meant)
    return found


def meant(name: str, table: str) -> tuple[str, ...]:
    """Return what a name of another trainer, or its last part, stands for in a table of names.yaml.

    `keys`: keys of the same meaning; `answers`: what to write in place of it, with `{value}` for its value;
    `sources`: keys of an entry of `data.train`; `values`: words for values.
    """
    plain = name.lower().replace("-", "_")
    return _table(table).get(plain) or _table(table).get(plain.rpartition(".")[2], ())


# A guess of lower similarity misleads more people than it helps.
_SIMILAR, _NEARLY_EQUAL = 0.75, 0.9
# A wrong guess at one of these would end the run early, or late, without a message.
_NOT_GUESSED = frozenset({"trainer.max_steps", "trainer.stop_after_steps", "trainer.max_seconds"})


def likely(word: str, known: Iterable[str]) -> list[str]:
    """Return those of `known` that the user probably meant by `word`, the most similar first."""
    candidates = list(known)
    if same := [name for name in (word.lower(), *meant(word, "values")) if name in candidates]:
        return same[:1]
    section, _, last_part = word.rpartition(".")
    # Keys of the same section with the word as a part of their name: loss.alpha, loss.ld_alpha.
    with_part = [
        candidate
        for candidate in candidates
        if candidate.rpartition(".")[0] == section
        and last_part in candidate.rpartition(".")[2].split("_")
        and candidate not in _NOT_GUESSED
    ]
    if with_part:
        return with_part

    def similarities(candidate: str) -> tuple[float, float]:
        last = difflib.SequenceMatcher(None, last_part, candidate.rpartition(".")[2]).ratio()
        return difflib.SequenceMatcher(None, word, candidate).ratio(), last

    for candidate in sorted(candidates, key=lambda candidate: sum(similarities(candidate)), reverse=True)[:3]:
        whole, last = similarities(candidate)
        similarity = last if section else max(whole, last)
        elsewhere = section in candidates and candidate.rpartition(".")[0] != section
        if similarity > (_NEARLY_EQUAL if elsewhere or candidate in _NOT_GUESSED else _SIMILAR):
            return [candidate]
    return []


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a question after the likely names of `known`, with a space after it; empty if there are none."""
    found = likely(word, known)
    return f"did you mean {' or '.join(found)}? " if found else ""


def unreadable(words: Sequence[str]) -> ConfigError:
    """Return the error for the words of a command line that are no overrides."""
    whole = " ".join(words)
    remedy = "no space is around =, and a value with spaces, commas or brackets needs quotes: 'KEY=\"a, b\"'"
    if "=" not in whole and Path(whole).expanduser().exists():
        remedy = f"write its key: run.dir={whole}, model.path={whole} or 'data.train=[{whole}]'"
    return ConfigError(
        "the command has words that are not KEY=VALUE",
        where=COMMAND_LINE,
        got=whole,
        expected="KEY=VALUE, for example loss.beta=0.2",
        remedy=remedy,
    )


def raise_all(mistakes: Sequence[ConfigError]) -> None:
    """Raise one error for all mistakes, of several with a line each; without any do nothing."""
    if len(mistakes) == 1:
        raise mistakes[0]
    lines = []
    for one in mistakes:
        where = one.where.removeprefix(COMMAND_LINE).removeprefix(": ")
        got = f" ({one.got})" if where and one.got and "=" not in where else ""
        is_said = one.expected in one.remedy or one.remedy.startswith(("did you mean", "write"))
        expected = "" if is_said else f", expected {one.expected}"
        lines.append(f"{where or one.got}{got}: {one.message}{expected}; {one.remedy}")
    if lines := list(dict.fromkeys(lines)):
        raise ConfigError(f"this command has {len(lines)} mistakes", remedy=f"\n{' ' * 12}".join(lines))


def assignment(key: str, value: str) -> str:
    """Return `key=value`, quoted for a shell, with `...` in place of a value that the key does not accept."""
    for text in (value, *meant(value, "values"), f"[{value}]"):
        if text and _is_accepted(key, text):
            return shlex.quote(f"{key}={text}")
    return f"{key}=..."


def _is_accepted(key: str, text: str) -> bool:
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


def unknown_key(key: str, value: str = "", *, where: str = "", own: Collection[str] = ()) -> ConfigError:
    """Return the error for a key that does not exist, with what to write in its place.

    `value` is as it was written, empty if unknown; `where` the file or override with the key; `own` the keys
    that are not refused, if others are.
    """
    mapping, _, name = key.rpartition(".")
    of_entries = [row.rpartition(".")[2] for row in all_keys() if row.rpartition(".")[0] == f"{mapping}[]"]
    if name in of_entries and (not own or mapping in own):
        before = "" if name == of_entries[0] else f"{of_entries[0]}: {of_entries[0].upper()}, "
        expected = mapping
        remedy = f"write '{mapping}=[{{{before}{name}: {value or '...'}}}]'; it is a key of an entry"
    else:
        expected, remedy = _meant_key(key, value, own)
    return ConfigError(f"there is no key {key!r}", where=where or key, expected=expected, remedy=remedy)


def _meant_key(key: str, value: str, own: Collection[str]) -> tuple[str, str]:
    """Return the key that was meant by one that does not exist, and what to write in its place."""
    mapping, _, name = key.rpartition(".")
    above = all_keys().get(entry_of(mapping).removesuffix("[]"))
    inner = nested(above.type) if above else None
    known = [f"{mapping}.{option}" for option in fields_of(inner)] if inner else list(run_keys())
    if mapping.endswith("]") and f"{mapping}.path" in known:  # an entry of a list of sources
        if same := meant(name, "sources"):
            return f"{mapping}.{same[0]}", f"did you mean {same[0]}?"
        answers: tuple[str, ...] = ()
    else:
        # Keys of another trainer, or the only one of this name in a section.
        foreign, answers = meant(key, "keys"), meant(key, "answers")
        named = [option for option in own or run_keys() if option.rpartition(".")[2] == key]
        if foreign:  # `output` of export is no other name of run.dir
            named = [option for option in named if option.partition(".")[2] == key]
        same = tuple(dict.fromkeys([*(named if len(named) == 1 else []), *foreign]))
    written = [line for one in same if not (line := assignment(one, value)).endswith("=...")]
    if answers and not written:
        same = ()  # `template: llama3` of LLaMA-Factory is no value of data.template
    found = same or (() if answers else likely(key, own) or likely(key, known))
    if found and own and set(own).isdisjoint(found) and found[0] != "loss":
        return "", f"remove it: {read_by(found[0])}"
    if same:
        row = all_keys().get(same[0])
        expected = f"{same[0]}, {row.type_words}" if row else same[0]
        return expected, f"write {(*written, f'{same[0]}=...')[0]}"
    if answers:
        return "", answers[0].replace("{value}", value or "...")
    if found:
        return " or ".join(found), f"did you mean {' or '.join(found)}?"
    beside = [one.rpartition(".")[2] for one in known if mapping and one.rpartition(".")[0] == mapping]
    if beside:
        return "", f"the keys of {mapping} are {', '.join(beside)}"
    sections = [one for one in own or known if "." not in one]
    return "", f"a key has a section, such as loss.beta; the sections are {', '.join(sections)}"


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
        expected=f"one of {', '.join(known)}",
        remedy=remedy,
    )


def composition_error(error: Exception, folders: Sequence[Path]) -> ConfigError:
    """Return the `ConfigError` for an exception of Hydra, OmegaConf or the YAML parser."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return unknown_preset(group, choice, folders)
    where, got = "command line, or a file that it names", str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        where, got = str(error.problem_mark).strip(), str(error.problem)
    elif isinstance(error, OmegaConfBaseException):
        where, got = error.full_key or where, error.msg or got
    return ConfigError(
        "the configuration cannot be composed",
        where=where,
        got=" ".join(got.split()),
        remedy="correct the key or the file",
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

    `origin` returns the override or file that gives a key.
    """
    found: dict[str, ConfigError] = {}
    # A name that is not known comes before one that is missing, which may be meant by it.
    for one in sorted(error.errors(), key=lambda one: one["type"] == "missing"):
        is_unknown = one["type"] == "unexpected_keyword_argument"
        key, value = _key_at(one["loc"], is_unknown=is_unknown), one["input"]
        above, _, name = key.rpartition(".")
        if is_unknown:
            text = "" if isinstance(value, dict) else as_written(value)
            found[key] = unknown_key(key, text, where=origin(key))
        elif one["type"] != "missing":
            found.setdefault(key, _wrong_value(key, one, origin(key)))
        elif all(other.rpartition(".")[0] != above for other in found):
            found[key] = ConfigError(f"{key} is not set", where=key, remedy=f"write {name}: ...")
    return list(found.values())


_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_TEXTS = {"empty": "write a value, or remove the key", "home": "write the whole path"}


def _wrong_value(key: str, error: ErrorDetails, where: str) -> ConfigError:
    row = all_keys().get(entry_of(key)) or all_keys().get(entry_of(key).removesuffix("[]"))
    hint, value, kind = row.type if row else run_keys().get(key), error["input"], error["type"]
    if row and key.endswith("]"):
        hint = nested(hint) or get_args(hint)[0]
    null = " or null" if type(None) in get_args(hint) else ""
    got, names = as_written(value), choices(hint)
    expected = (row.accepts if row else "") or describe_type(hint)
    if kind in _BOUNDS:
        expected = ((row.bounds if row else "") or error["msg"].removeprefix("Input should be ")) + null
        message, remedy = "is out of range", f"choose {key} in that range" + (null and ", or null")
    elif kind in _TEXTS:
        message, expected, remedy = error["msg"], "", _TEXTS[kind]
    elif names or kind == "string_pattern_mismatch":
        message, remedy = "has no such value", f"set {key} to one of these, or remove it"
        last = Path(got).name  # `export.checkpoint=out/checkpoints/step-000100`
        if isinstance(value, bool) and " in " in where:
            remedy = "in YAML a bare on, off, yes or no is true or false: put the word in quotes"
        elif found := likely(got, names) or ([last] if last != got and _is_accepted(key, last) else []):
            remedy = f"did you mean {key}={found[0]}?"
        if len(names) > 2:
            expected = f"one of {', '.join(names)}{null}"
    else:
        message, remedy = "has the wrong type", _typed(key, hint, value, expected)
    return ConfigError(f"{key} {message}", where=where, got=got, expected=expected, remedy=remedy)


def _typed(key: str, hint: Any, value: Any, expected: str) -> str:
    """Return how to write a value of the right type."""
    got, inner = as_written(value), nested(hint)
    if get_origin(hint) is list:
        return f"write {assignment(key, got)}"
    if key == "model.adapter":
        own = f"{key}.path={got}" if "/" in got else "'model.adapter={r: 64, alpha: 128}'"
        return f"write {own}"
    if inner is not None:
        first = next(iter(fields_of(inner)))
        return f"write a mapping with {first}" if key.endswith("]") else f"write {key}.{first}=..."
    if isinstance(value, float) and value.is_integer():
        return f"write {key}={int(value)}"
    return f"set {key} to {expected}"
