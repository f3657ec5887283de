"""The overrides of a command line, parsed; for those that cannot be, how to write them."""

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dpo_dist.config.keys import run_keys
from dpo_dist.config.suggest import likely
from dpo_dist.errors import ConfigError

_COMMAND_LINE = "command line"
# What Hydra reads without quotes, besides letters and digits of ASCII.
_PLAIN = re.compile(r"[\w\s/\-\\+.$%*@?|:,\[\]{}()\"'=]", re.ASCII)
_OPENING = {"[": "]", "{": "}", "(": ")"}


def parse_overrides(lines: Sequence[str]) -> list[Override]:
    """The overrides of a command line.

    Raises:
        ConfigError: one cannot be read; what has to be quoted is named.
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
    """The error for an override that Hydra cannot parse, with how to write it where that can be told."""
    what, expected = "an override cannot be read", "key=value, for example loss.beta=0.2"
    key, equals, value = line.partition("=")
    spaced = _around_equals(line, before, following)
    if spaced:
        remedy = f"write {shlex.quote(''.join(spaced))}, without spaces around ="
        return ConfigError(what, where=_COMMAND_LINE, got=" ".join(spaced), expected=expected, remedy=remedy)
    whole = _rejoined(line, following)
    if whole is not None:
        return ConfigError(
            "the shell divided an override at a space",
            where=_COMMAND_LINE,
            got=line,
            expected=expected,
            remedy=f"put it in quotes: {shlex.quote(whole)}",
        )
    if not equals:
        return _without_value(line)
    strange = next((character for character in value if not _PLAIN.match(character)), None)
    if strange is None and "=" in value:
        strange = "="
    if key.endswith("+"):
        remedy = f"a list is given whole: write {shlex.quote(f'{key[:-1]}=[FIRST,SECOND]')}"
        return ConfigError(what, where=_COMMAND_LINE, got=line, expected=expected, remedy=remedy)
    if _is_open(value):
        return ConfigError(
            "an override cannot be read: a bracket is not closed",
            where=_COMMAND_LINE,
            got=line,
            expected=expected,
            remedy=f"close it; text with brackets needs quotes: {shlex.quote(f'{key}={_quoted(value)}')}",
        )
    remedy = _corrected(line, key, value)
    if strange is not None:
        what = f"an override cannot be read: {strange!r} needs quotes"
    return ConfigError(what, where=_COMMAND_LINE, got=line, expected=expected, remedy=remedy)


def _corrected(line: str, key: str, value: str) -> str:
    """What to write in place of a `line` that Hydra cannot read."""
    quoted, meant = f"{key}={_quoted(value)}", f"{key}={_without_slips(value)}"
    if _is_readable(meant) and meant != line:
        return f"write {shlex.quote(meant)}"
    if value.startswith(("[", "{")) and not quoted.startswith(f"{key}=["):
        return "a list is [a, b], a mapping {name: value}; other characters in a text need quotes of its own"
    if _is_readable(quoted) and quoted != line:
        return f"write {shlex.quote(quoted)}: the inner quotes are read by Hydra, the outer ones by the shell"
    return "a value with spaces, commas, brackets or = needs quotes of its own: 'key=\"a, b\"'"


def _around_equals(line: str, before: Sequence[str], following: Sequence[str]) -> list[str]:
    """The arguments that one override was divided into by spaces around `=`; empty if it was not."""
    key = [argument for argument in before[-1:] if "=" not in argument]
    if line.startswith("="):
        return [*key, line, *(following[:1] if line == "=" else [])] if key else []
    if "=" not in line and following and following[0].startswith("="):
        return [line, *following[: 1 if len(following[0]) > 1 else 2]]
    if "=" not in line and before and before[-1].endswith("="):
        return [before[-1], line]
    return []


def _without_value(line: str) -> ConfigError:
    key, _, value = line.partition(":")
    example = f"{key}={value}" if value else f"{key}=VALUE"
    remedy = f"write {example}; a value with spaces, commas or brackets needs quotes"
    if line.endswith((".yaml", ".yml", ".json")):
        remedy = "--config-dir DIR +experiment=NAME reads DIR/experiment/NAME.yaml"
    elif key not in run_keys() and not likely(key, run_keys()):
        remedy = "every argument is key=value; one with spaces, commas or brackets needs quotes: 'key=[a, b]'"
    return ConfigError(
        "an argument is not key=value",
        where=_COMMAND_LINE,
        got=line,
        expected="key=value, for example loss.beta=0.2",
        remedy=remedy,
    )


def _rejoined(line: str, following: Sequence[str]) -> str | None:
    """`line` with the arguments that belong to it, where its brackets close only in one of these."""
    if not _is_open(line):
        return None
    whole = line
    for more in following:
        whole += f" {more}"
        if _is_readable(whole):
            return whole
    return None


def _is_open(text: str) -> bool:
    return any(text.count(opening) > text.count(closing) for opening, closing in _OPENING.items())


def _is_readable(line: str) -> bool:
    try:
        OverridesParser.create().parse_override(line)
    except HydraException:
        return False
    return True


def _without_slips(value: str) -> str:
    """`value` with the signs of a list or mapping where Python's or a shell's were written."""
    value = re.sub(r"([{,]\s*\w+)=", r"\1: ", value.rstrip(","))
    if value.startswith("(") and value.endswith(")"):
        value = f"[{value[1:-1].rstrip(',')}]"
    return re.sub(r"""(["'])\s+(["'])""", r"\1,\2", value)


def _quoted(value: str) -> str:
    """`value` with quotes around it, or around those entries of a flat list that need them."""
    if value.startswith("[") and value.endswith("]") and not set(value[1:-1]) & set("[]{}\"'"):
        return f"[{','.join(_quoted_word(entry.strip()) for entry in value[1:-1].split(','))}]"
    return _quoted_word(value, always=True)


def _quoted_word(word: str, *, always: bool = False) -> str:
    if not always and _is_readable(f"key={word}"):
        return word
    escaped = word.replace('"', '\\"')
    return f'"{escaped}"'
