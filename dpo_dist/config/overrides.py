"""Parse and check the overrides of a command line, one by one, before anything is composed."""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dpo_dist.config.aliases import VALUE_ALIASES
from dpo_dist.config.keys import describe_type, run_keys
from dpo_dist.config.messages import assignment, preset_names, unknown_key, unknown_preset
from dpo_dist.config.spelling import likely
from dpo_dist.errors import ConfigError

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
