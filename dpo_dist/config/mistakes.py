"""Errors for mistakes in a command or a YAML file, with remedies.

Remedies translate the keys of other trainers and correct mistyped names.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dpo_dist.config.advice import OFF, ON, advice
from dpo_dist.config.keys import (
    all_keys,
    group_folders,
    preset_names,
    presets_of,
    run_keys,
    strip_indices,
    to_choose,
    verb_keys,
)
from dpo_dist.config.losses import NO_OPTION, kinds_using
from dpo_dist.config.schema import SCHEMA
from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written, choices, describe_type, nested, plain, schema_fields
from dpo_dist.foundation.files import similar_path
from dpo_dist.foundation.remedies import InFile, Typed, to_write, to_write_one_of

_PRESET_PATHS = {
    "model": ("model.path", "evaluation.model"),
    "data": ("data.train", "evaluation.data"),
    "reference": ("reference.path",),
}
"""The keys that take a path, by the group of presets for which a user may have written the path."""


_SIMILAR = 0.75
"""Least similarity of a guess: a less similar one misleads more often than it helps."""


def likely_name(word: str, names: Collection[str]) -> str | None:
    """Return the name in `names` that the user probably meant: `ipo` for `ipoo`; None if no name is near."""
    same: list[str] = [word.lower(), *advice().equivalents(word, "values")]
    for name in same:
        if name in names:
            return name
    # H100: h100-80g; 4090, rtx-4090 and 24GB: rtx4090-24g.
    part = re.sub(r"(?<=\d)gb$", "g", re.sub(r"[\s_-]", "", word.lower()))
    for name in names:
        has_parts = "-" in name and not name.startswith("-")
        if part and has_parts and any(longer.endswith(part) for longer in name.split("-")):
            return name
    section, _, last = word.rpartition(".")
    of_section = [name for name in names if section in ("", name.rpartition(".")[0])]
    last_parts = {name.rpartition(".")[2]: name for name in reversed(of_section)}
    guesses = [last_parts[name] for name in get_close_matches(last, last_parts, 1, _SIMILAR)]
    of_others = [name for name in names if name.endswith(f".{last}")]  # in another section
    guesses += get_close_matches(word, of_others, 1, 0.0)
    if not section or not of_section:  # in a known section the common beginning makes all names similar
        guesses += get_close_matches(word, names, 1, _SIMILAR)
    return next(iter(guesses), None)


def _likely_values(value: Any) -> list[str]:
    """Return what a value may mean: 1e3 -> 1000, 2k -> 2000, yes -> true, 20% -> 0.2, host:1 -> http://host:1/v1.

    A true that is refused may be a text: true -> "true".
    """
    if isinstance(value, bool):
        return [f'"{as_written(value)}"']
    if isinstance(value, float) and value.is_integer():
        return [str(int(value))]
    switch = str(value).lower()
    if switch in ON:
        return ["true"]
    if switch in OFF:
        return ["false"]
    if not isinstance(value, str):
        return []
    counted = re.fullmatch(r"(\d*\.?\d+) ?([kKmM])", value)
    if counted:
        return [f"{float(counted[1]) * {'k': 1e3, 'm': 1e6}[counted[2].lower()]:.0f}"]
    share = re.fullmatch(r"(\d*\.?\d+) ?%", value)
    if share:
        return [as_written(float(f"{share[1]}e-2"))]
    return [f"http://{value}/v1", f"{value}/v1"]


def _did_you_mean(word: str) -> str:
    return to_write(word, verb="did you mean") + "?"


_DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet)(\.gz|\.zst)?$")


def unreadable(words: Sequence[str], verb: str = "") -> ConfigError:
    """Return the error for words of a verb's command line that are not overrides."""
    return ConfigError(
        "the command has words that are not KEY=VALUE",
        where=Typed(*words),
        expected="KEY=VALUE, for example loss.beta=0.2",
        remedy=_instead_of_words(words, verb),
    )


def _instead_of_words(words: Sequence[str], verb: str) -> str:
    """Return what to write in place of words that are not overrides; the first case that fits counts."""
    text = " ".join(words)
    first = words[0]
    # A key without =: `loss.beta 0.2` -> loss.beta=0.2; `export.merge` -> export.merge=true.
    if first in run_keys() and "=" not in text:
        return to_assign(first, words[1] if len(words) > 1 else "true")
    remedy = _instead_of_form(text)
    if remedy:
        return remedy
    # Spaces, a colon or round brackets: `loss.beta: 0.2`, `optim.betas=(0.9,0.95)`.
    match = re.fullmatch(r"([\w.]+)(?: *[:=] *)\(?([^()]*)\)?", text)
    if match and match[1] in run_keys():
        key = match[1]
        value = match[2].strip(" ,;")
        if verb == "sweep" and "," in value and not assignment(key, value):  # several values
            return to_write(f"{key}={match[2]}")
        return to_assign(key, value)
    if all(re.fullmatch(r"[\w./~+-]+", word) for word in words):
        return _with_key(words, verb)
    if any(text.count(opened) != text.count(closed) for opened, closed in ("()", "[]", "{}")):
        return "close each bracket, and put the word between quotes: 'KEY=range(1,4)'"
    if "=" not in text:
        return "write each as KEY=VALUE, such as loss.beta=0.2"
    return "put no spaces around =, and a value with spaces or commas in quotes: 'KEY=\"a, b\"'"


def _instead_of_form(text: str) -> str | None:
    """Return what to write in place of a form of other programs; None for other words."""
    # A slice of `datasets`: `data.train=[org/name:train[:10%]]`.
    if re.search(r"\w\[\d*%?:\d*%?\]", text):
        part = "{path: NAME, split: train, limit: 1000}"
        return f"a part of a source is its first records: write {part}"
    # An entry of a list by its place: `tracking.to[0]=mlflow` -> 'tracking.to=[mlflow]'.
    entry = re.fullmatch(r"([\w.]+)\[\d*\]((?:\.\w+)*)=(.*)", text)
    if entry:
        list_key, inside, value = entry.groups()
        if inside:
            return unknown_key(f"{list_key}[0]{inside}", value).remedy
        if list_key in run_keys():
            return to_assign(list_key, value)
        return unknown_key(list_key, value).remedy
    # A package of Hydra: `loss@x=ipo`.
    is_package = "@" in text.partition("=")[0]
    return "remove @ and the word after it: write loss=ipo" if is_package else None


def _with_key(words: Sequence[str], verb: str) -> str:
    """Return the remedy that writes values with their key: `a.jsonl` -> 'data.train=[a.jsonl]'."""
    first = words[0]
    is_size = len(words) == 1 and re.fullmatch(r"[\d.]+[bB]", first) is not None
    if len(words) == 1 and not Path(first).exists():
        presets = _presets_named(first, verb, is_size)
        if presets:
            return to_write_one_of(presets)
    if is_size:
        return "a size is no model: write model.path=ORG/NAME"
    keys = VERBS[verb].takes_words if verb else ("run.dir", *VERBS["train"].takes_words)
    lists = {key for key in keys if get_origin(run_keys()[key]) is list}
    if lists and all(map(_DATA_FILE.search, words)):
        keys = tuple(key for key in keys if key in lists)
    lead = "write the key too:"
    accepted = list[str]()
    for key in keys:
        value = f"[{','.join(words)}]" if key in lists else first
        accepted += filter(None, [assignment(key, value)])
    if accepted:
        return to_write_one_of(accepted, lead=lead)
    return f"{lead} {' or '.join(f'{key}=...' for key in keys)}"


def _presets_named(name: str, verb: str, is_size: bool) -> list[str]:
    """Return the words that choose the presets of this name, or the models of this size: `simpo`, `7B`."""
    keys = verb_keys(verb or "train", trains=verb == "pairs")
    ending = f"_{name.lower().replace('.', '_')}"
    words = []
    for group, presets in presets_of(keys, group_folders()).items():
        for preset in presets:
            is_model_of_size = is_size and group == "model" and preset.endswith(ending)
            if is_model_of_size or preset == name:
                words.append(to_choose(group, preset))
    return words


def assignment(key: str, value: str) -> str | None:
    """Return the word `key=value` with the value in a form that the key accepts; None if it accepts none.

    `data.train`, `a.jsonl` -> `data.train=[a.jsonl]`; `model.adapter`, `{r=8` -> `model.adapter={r: 8}`;
    `loss`, `[dpo,sft]` -> `loss.terms=[{kind: sigmoid}, {kind: sft}]`.
    """
    if value.startswith("(") and value.endswith(")"):
        value = f"[{value[1:-1]}]"
    if key == "loss" and value.startswith("["):
        kinds = [kind.strip("[] '\"") for kind in value.split(",")]
        loss_kinds = choices(run_keys()["loss.kind"])
        terms = ", ".join(f"{{kind: {likely_name(kind, loss_kinds) or kind}}}" for kind in kinds)
        return assignment("loss.terms", f"[{terms}]")
    meanings = (
        word for word in advice().equivalents(value, "values") if word in choices(run_keys().get(key))
    )
    opened = re.sub(r"[^\[\]{}]", "", value)
    while "[]" in opened or "{}" in opened:  # brackets that are not closed are left
        opened = opened.replace("[]", "").replace("{}", "")
    closed = value + opened[::-1].translate(str.maketrans("[{", "]}"))
    closed = re.sub(r"(?<=[{,])(\s*\w+)=", r"\1: ", closed)  # {r=8}
    forms = (value, *meanings, closed, f"[{value}]")
    for text in filter(None, forms):
        if _is_accepted(key, text):
            return f"{key}={text}"
    return None


def to_assign(key: str, value: str) -> str:
    """Return the remedy that writes `key=value`, or says what the key accepts if it is not this value.

    `loss.beta`, `0.2` -> write loss.beta=0.2; `loss.beta`, `x` -> write loss.beta=..., a number;
    `model`, `a/b` -> write model.path=a/b; `sampling.endpoint`, `http://a/v1` -> its url.
    """
    word = assignment(key, value)
    if word:
        return to_write(word)
    if preset_names(key, group_folders()):
        return unknown_preset(key, value, group_folders()).remedy
    hint = run_keys().get(key)
    if get_origin(hint) is list:
        return f"write '{key}=[...]'"
    inner = nested(hint)
    if inner:
        if "." not in key:
            return f"write {key}.KEY=VALUE; --help {key} lists its keys"
        return to_assign(f"{key}.{next(iter(schema_fields(inner)))}", value)
    row = all_keys().get(key)
    return f"write {key}=..., {row.type_words}" if row else f"write {key}=..."


def _is_accepted(key: str, text: str) -> bool:
    if text in preset_names(key, group_folders()):
        return True
    if key == "loss":
        return False
    try:
        value = OverridesParser.create().parse_override(f"{key}={text}").value()
    except HydraException:
        return False
    return fits(key, value)


def as_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of keys as mappings in mappings: `{loss: {beta: 0.2}}`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        reduce(lambda at, section: at.setdefault(section, {}), sections, tree)[name] = value
    return tree


def fits(key: str, value: Any) -> bool:
    """Return whether a key accepts a value."""
    values = {key: value}
    kinds = kinds_using(key.removeprefix("loss."))
    if kinds:
        values["loss.kind"] = kinds[0]
    try:
        SCHEMA.validate_python(as_tree(values))
    except ValidationError as error:
        return not any(_key_at(detail["loc"]).startswith(key) for detail in error.errors())
    return True


def unknown_key(key: str, value: str = "", *, where: str = "") -> ConfigError:
    """Return the error for a key that does not exist; its remedy says what to write instead.

    `value`: as the user wrote it, "" if unknown; `where`: the file or override with the key.
    """
    remedy = advice().find_advice(key, value) or _instead_of_key(key, value)
    return ConfigError(f"there is no key {key!r}", where=where or key, remedy=remedy)


_NEEDS_LOSS = "; this option needs "
"""Between the word for an option of a loss and the losses that have it."""


def _instead_of_key(raw_key: str, value: str) -> str:
    """Return what to write in place of a key that does not exist, with this value."""
    key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", raw_key)  # `data.train.0.path`, as OmegaConf writes it
    mapping, _, name = key.rpartition(".")
    is_entry = mapping.endswith("]")
    list_key = strip_indices(mapping).removesuffix("[]")
    above = all_keys().get(list_key)
    inner = nested(above.type) if above else None
    valid_keys = [f"{mapping}.{option}" for option in schema_fields(inner)] if inner else list(run_keys())

    # A key of a list's entries: `data.train.path=a` -> 'data.train=[{path: a}]'; `{file: a}` -> path: a.
    if mapping and key in valid_keys:
        before = "" if key == valid_keys[0] else f"{valid_keys[0].rpartition('.')[2]}: ..., "
        if is_entry:  # the word would take the place of all entries
            value = ""
        word = f"{list_key}=[{{{before}{name}: {value or '...'}}}]"
        return f"write this key inside an entry: '{word}'"
    if is_entry:
        options = [
            option for option in advice().equivalents(name, "sources") if f"{mapping}.{option}" in valid_keys
        ]
        if options:
            return f"write {options[0]}: {value or '...'}"
        return _instead_of_mistyped(key, valid_keys, value)

    # Another trainer's name, or a key without its section: `learning_rate=1`, `max_steps=3`.
    same = advice().equivalents(key, "keys")
    remedy = advice().advice_on(key, value)
    if not same and not remedy:
        inside = [option for option in valid_keys if option.startswith(mapping)]
        same = tuple(option for option in inside if option.rpartition(".")[2] == name)
    assignments = list(filter(None, [assignment(other, value) for other in same]))
    if assignments:
        losses: list[str] = []
        for other in same:
            if other.startswith("loss.options."):
                losses += [f"loss={kind}" for kind in kinds_using(other.removeprefix("loss."))]
        words = to_write_one_of(assignments)
        return f"{words}{_NEEDS_LOSS}{' or '.join(losses)}" if losses else words
    if remedy:  # before `same`, or `template: llama3` of LLaMA-Factory would get the key data.template
        return remedy
    if same:  # it does not accept the value: `loss_type=sigmod` -> loss=sigmoid
        ours = same[0]
        row = all_keys().get(ours)
        choice = likely_name(value, choices(run_keys()["loss.kind" if ours == "loss" else ours]))
        if choice:
            return _did_you_mean(f"{ours}={choice}")
        words = row.type_words if row else "a preset; a sum of losses is loss.terms"
        return f"write {ours}=..., {words}"
    return _instead_of_mistyped(key, valid_keys, value)


def _instead_of_mistyped(key: str, valid_keys: Collection[str], value: str) -> str:
    """Return the remedy that writes the nearest key, `loss.betta` -> loss.beta, or lists those there are."""
    mapping = key.rpartition(".")[0]
    guess = likely_name(key, valid_keys)
    row = all_keys().get(guess or "")
    if guess and (not value or assignment(guess, value)):
        return f"did you mean {guess}?"
    if guess and row and mapping == guess.rpartition(".")[0]:  # which does not accept the value
        return f"did you mean {guess}, {row.type_words}?"
    if guess and "[" in guess:
        return f"did you mean {guess}?"
    beside = [option.rpartition(".")[2] for option in valid_keys if option.rpartition(".")[0] == mapping]
    if mapping and beside:
        return f"the keys of {mapping} are {', '.join(beside)}"
    sections = [option for option in valid_keys if "." not in option]
    return f"a key has a section, such as loss.beta; the sections are {', '.join(sections)}"


def unknown_preset(group: str, choice: str, folders: Sequence[Path]) -> ConfigError:
    """Return the error for a preset that does not exist."""
    presets = preset_names(group, folders)
    remedy = advice().find_advice(group, choice)
    name = choice
    if choice.endswith((".yaml", ".yml")):
        name = Path(choice).stem
    guess = likely_name(name, presets)
    if not remedy and guess:
        remedy = _did_you_mean(to_choose(group, guess))
    elif not remedy and group in _PRESET_PATHS:
        keys = filter(run_keys().__contains__, _PRESET_PATHS[group])
        words = filter(None, [assignment(key, choice) for key in keys])
        remedy = to_write_one_of(list(words), lead="a path is no preset: write")
    elif not remedy:
        only = presets[0] if len(presets) == 1 else "NAME"
        remedy = f"write {to_choose(group, only)}"
        if group == "experiment":
            remedy += "; your own: name the file, my.yaml, or --config-dir DIR with DIR/experiment/NAME.yaml"
    return ConfigError(
        f"there is no {group} named {choice!r}",
        where=group,
        got=choice,
        expected=f"one of {', '.join(presets)}",
        remedy=remedy,
    )


def composition_error(error: Exception, folders: Sequence[Path], word: str = "") -> ConfigError:
    """Return the `ConfigError` for an exception of Hydra, OmegaConf or the YAML parser.

    `word`: the word that names the file that was read.
    """
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return unknown_preset(group, choice, folders)
    if isinstance(error, OSError) and error.strerror:
        path = word or str(error.filename)
        similar = similar_path(Path(path))
        remedy = "check the path, which is relative to the working directory"
        if similar is not None and similar.suffix in (".yaml", ".yml"):
            remedy = f"did you mean {similar}?"
        return ConfigError("this file cannot be read", where=path, got=error.strerror, remedy=remedy)
    where = "command line, or a file that it names"
    got = str(error).partition("full_key:")[0]
    if isinstance(error, yaml.MarkedYAMLError):
        where = str(error.problem_mark).strip()
        got = str(error.problem)
    elif isinstance(error, OmegaConfBaseException):
        where = error.full_key or where
        got = (error.msg or got).partition("full_key:")[0]
    return ConfigError(
        "the configuration cannot be composed",
        where=where,
        got=" ".join(got.split()),
        remedy="correct the key or the file",
    )


def _key_at(place: Sequence[int | str], *, is_unknown: bool = False) -> str:
    """Return the key at a place in pydantic's error: `data.train[0].path`.

    Names of types at the end of a place are left out; `is_unknown`: its last part is a key that is unknown.
    """
    key = ""
    for index, part in enumerate(place):
        longer = f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}".lstrip(".")
        option = strip_indices(longer)
        is_key = option in run_keys() or option in all_keys()
        is_last = is_unknown and index == len(place) - 1
        if isinstance(part, str) and not is_key and not is_last:
            break
        key = longer
    return key


def wrong_values(
    error: ValidationError, values: Mapping[str, Any], origin: Callable[[str], str]
) -> list[ConfigError]:
    """Return an error for each key of `values` whose value does not fit the schema.

    `origin` returns the override or file that sets a key.
    """
    mistakes: dict[str, ConfigError] = {}
    # Unknown keys first: one of them may be the missing key, mistyped.
    for detail in sorted(error.errors(), key=lambda detail: detail["type"] == "missing"):
        is_unknown = detail["type"] == "unexpected_keyword_argument"
        key = _key_at(detail["loc"], is_unknown=is_unknown)
        value = detail["input"]
        above, _, name = key.rpartition(".")
        if detail["type"] == NO_OPTION:
            for option in detail["ctx"]["names"]:
                mistakes[f"{key}.{option}"] = _no_option(key, option, detail, origin)
        elif is_unknown:
            text = "" if isinstance(value, dict) else as_written(advice().as_sources(value))
            mistakes[key] = unknown_key(key, text, where=origin(key))
        elif detail["type"] != "missing":
            mistakes.setdefault(key, _wrong_value(key, detail, origin(key), values))
        elif all(other.rpartition(".")[0] != above for other in mistakes):
            remedy = f"write {name} with its value into the entry {above}: {{{name}: ..., ...}}"
            expected = all_keys()[strip_indices(key)].type_words
            mistakes[key] = ConfigError(f"{key} is not set", where=key, expected=expected, remedy=remedy)
    return list(mistakes.values())


def _no_option(place: str, name: str, detail: ErrorDetails, origin: Callable[[str], str]) -> ConfigError:
    """Return the error for an option in the mapping `place` that its kind of loss does not have."""
    key = f"{place}.{name}"
    kind = detail["ctx"]["kind"]
    options = detail["ctx"]["known"]
    got = as_written(detail["input"][name])
    users = kinds_using(f"options.{name}")
    kind_key = f"{place.removesuffix('options')}kind"
    if not kind:
        remedy = _in_a_term(name, got) + "; loss.options=null removes the options of a preset"
        return ConfigError(
            "each entry of loss.terms has its own options", where=f"{key}, loss.terms", got=got, remedy=remedy
        )
    expected = f"an option of {kind}: {', '.join(options)}" if options else f"none, as {kind} has no options"
    if users:
        remedy = f"remove {key}"
        if place == "loss.options" and isinstance(origin(key), InFile):
            remedy = "set loss.options=null"
        remedy += f", or choose a loss that uses it: {', '.join(sorted(users))}"
        if place == "loss.options":
            remedy += "; loss=NAME replaces all options of the loss"
        message = f"{key} has no effect with this {kind_key}"
        where = f"{key}, {kind_key}"
        return ConfigError(message, where=where, got=f"{got}, {kind}", expected=expected, remedy=remedy)
    remedy = "remove it"
    if options:
        remedy = f"write {' or '.join(f'{place}.{option}' for option in options)}"
    same = [option for option in options if f"loss.options.{option}" in advice().equivalents(name, "keys")]
    others = [option.rpartition(".")[2] for option in run_keys() if option.startswith("loss.options.")]
    guess = next(iter(same), likely_name(name, options) or likely_name(name, others))
    if guess:
        remedy = f"did you mean {place}.{guess}?"
        if guess not in options:
            remedy += f" It is an option of {', '.join(kinds_using(f'options.{guess}'))}"
    message = f"{kind} has no option {name!r}"
    return ConfigError(message, where=origin(key), got=got, expected=expected, remedy=remedy)


def _in_a_term(option: str, value: str, terms: Iterable[Any] = ()) -> str:
    """Return the remedy that gives an option of one loss to its entry of `loss.terms`."""
    users = kinds_using(f"options.{option}")
    kinds = [term.get("kind") if isinstance(term, dict) else term for term in terms]
    kind = [*filter(kinds.__contains__, users), *users, "..."][0]
    return f"write the entry {{kind: {kind}, options: {{{option}: {value}}}}}"


def keep_terms(mistakes: Iterable[ConfigError], values: Mapping[str, Any]) -> None:
    """Correct remedies that choose the loss of an option, and so would remove the terms in these values."""
    loss = values.get("loss")
    terms = loss.get("terms") if isinstance(loss, dict) else None
    if not terms or not isinstance(terms, list):
        return
    for mistake in mistakes:
        word, needs_loss, _ = mistake.remedy.partition(_NEEDS_LOSS)
        option = re.search(r"loss\.options\.(\w+)=([^\s']+)", word)
        if needs_loss and option:
            mistake.remedy = _in_a_term(option[1], option[2], terms) + " in loss.terms"


def _wrong_value(key: str, error: ErrorDetails, where: str, values: Mapping[str, Any]) -> ConfigError:
    row = all_keys().get(strip_indices(key)) or all_keys().get(strip_indices(key).removesuffix("[]"))
    hint = row.type if row else run_keys().get(key)
    expected = row.type_words if row else ""
    if key.endswith("]"):  # an entry of a list
        hint = nested(hint) or get_args(hint)[0]
        expected = row.facts.accepts.removeprefix("a list of ") if row else ""
    value = error["input"]
    got = repr(value) if isinstance(value, float) else as_written(value)  # 1000.0 is no whole number
    expected = expected or describe_type(hint)
    if error["type"] == "less_than_equal" and "<=" not in expected:
        expected += f", <= {error['ctx']['le']:,}"
    is_empty_text = error["type"] == "string_pattern_mismatch" and not got.strip("' ")
    if is_empty_text:
        expected = "text that is not empty"
        remedy = "remove the key, or write a value"
    else:
        default = f"; remove it for the default, {row.default_words}" if row and row.default_words else ""
        remedy = (
            _without_quotes(key, value)
            or _instead_of_value(key, hint, value, where, values)
            or f"set {key} to {expected}{default}"
        )
    return ConfigError(
        f"{key} cannot have this value", where=where, got=got, expected=expected, remedy=remedy
    )


_UNQUOTED = re.compile(r"true|false|-?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)
"""What YAML reads as a number or a switch, if it has no quotes."""


def _without_quotes(key: str, value: Any) -> str | None:
    """Return the remedy for a text in a file that would fit without its quotes: `lr: '1e-6'`."""
    if isinstance(value, str) and _is_accepted(key, value):
        return to_write(f"{key}={value}") + ", without quotes"
    is_in_list = "[" in key  # `betas: ['0.9', '0.95']`: no word of a command has only one of them
    is_number = is_in_list and isinstance(value, str) and _UNQUOTED.fullmatch(value)
    return f"write {value} without quotes" if is_number else None


def _instead_of_value(key: str, hint: Any, value: Any, where: str, values: Mapping[str, Any]) -> str | None:
    """Return what to write in place of a value that a key of this type does not accept; None: unknown."""
    got = as_written(value)
    if isinstance(value, bool) and isinstance(where, InFile) and choices(hint):
        return "in YAML a bare on, off, yes or no is true or false: put the word in quotes"
    remedy = advice().find_advice(key, got)
    if remedy:
        return remedy
    if got.lower() in ("none", "nil") and _is_accepted(key, "null"):
        return to_write(f"{key}=null")
    choice = likely_name(got, choices(hint))
    if choice:
        return _with_choice(key, choice, values)
    if get_origin(hint) is list:  # `data.eval=5%` -> data.eval_share=0.05; `data.train=a` -> 'data.train=[a]'
        shares = (got, *_likely_values(got)) if key == "data.eval" else ()
        share = next((text for text in shares if _is_accepted("data.eval_share", text)), None)
        assigned = f"data.eval_share={share}" if share else assignment(key, got)
        return to_write(assigned) if assigned else f"write '{key}=[...]'"
    if key == "model.adapter" and "/" in got:
        return to_write(f"{key}.path={got}")
    inner = nested(hint)
    if inner:
        first = next(iter(schema_fields(inner)))
        return f"write a mapping with {first}" if key.endswith("]") else to_assign(key, got)
    value_text = next((text for text in _likely_values(value) if _is_accepted(key, text)), None)
    return to_write(f"{key}={value_text}") if value_text else _instead_of_phrase(key, got)


def _instead_of_phrase(key: str, value: str) -> str | None:
    """Return what to write for a number with a name, or for a range: `8xH100`, `1..3`; None: neither."""
    section = key.rpartition(".")[0]
    counted = re.fullmatch(r"(?:(\d+) ?[x*] ?)?([A-Za-z][\w -]+)", value)
    if counted and section == "plan":
        number, name = counted.groups()
        gpu = likely_name(name, choices(run_keys()["plan.gpu"]))
        if gpu:
            return to_write(*[f"plan.gpus={number}"] * bool(number), f"plan.gpu={gpu}")
    ends = re.fullmatch(r"([\d.]*\d(?:e-?\d+)?) ?(?:\.\.+|:|-|to) ?([\d.]*\d(?:e-?\d+)?)", value)
    if ends is None or not all(_is_accepted(key, end) for end in ends.groups()):
        return None
    if all(map(str.isdecimal, ends.groups())):
        return f"the verb sweep takes '{key}=range({ends[1]},{int(ends[2]) + 1})', without its end"
    return f"the verb sweep takes a list of values: {key}={ends[1]},{ends[2]}"


def _with_choice(key: str, choice: str, values: Mapping[str, Any]) -> str:
    """Return the remedy that sets a key to `choice` in place of `got`: for an entry, the whole list.

    `optim.kind`, `muon` -> optim.kind=muon; `data.train[0].format`, `auto` ->
    'data.train=[{path: a, format: auto}]'.
    """
    if "[" not in key:
        return _did_you_mean(f"{key}={choice}")
    list_key, _, inside = key.partition("[")
    entries = copy.deepcopy(plain(reduce(lambda at, name: at[name], list_key.split("."), values)))
    *places, last = (int(part) if part.isdecimal() else part for part in re.findall(r"\w+", inside))
    entry = reduce(getitem, places, entries)
    if isinstance(entry, str):  # `loss.terms=[dpo]` names the kind alone
        entries[places[0]] = choice
    else:
        entry[last] = choice
    text = as_written(entries)
    return _did_you_mean(f"{list_key}={text}") if _is_accepted(list_key, text) else f"did you mean {choice}?"
