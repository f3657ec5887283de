"""Numbers and tables as texts for people; secrets in texts replaced by `***`."""

import json
import math
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import quote

import yaml

_KIBI = 1024
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_FEW_WORDS = 3


def pluralize(count: int, noun: str, plural: str = "") -> str:
    """Return "1 pair", "0 pairs", "2,000 pairs"; `plural`: for a noun that takes more than an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def first_few(words: Sequence[str], noun: str = "") -> str:
    """Return the first three words and the number of the rest: "a, b, c and 2 more", or "2 pairs"."""
    first = ", ".join(words[:_FEW_WORDS])
    left = len(words) - _FEW_WORDS
    if left <= 0:
        return first
    return f"{first} and {pluralize(left, noun) if noun else f'{left:,} more'}"


def number(value: float, digits: int = 4) -> str:
    """Return 0.25, 1,234, 2e-6 or 1.2e7; an integer has all digits, a float from 1,000 to 1e6 becomes one.

    The script of the charts writes numbers with four digits in the same way.
    """
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if isinstance(value, int) or 1000 <= size < 1e6:
        return f"{value:,.0f}"
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{float(f'{value:.{digits}g}'):.6g}"


def as_yaml(value: Any) -> str:
    """Return a plain value as YAML writes it on one line: true, null, [1, 2]; a text as it is."""
    if isinstance(value, float | str):
        return value if isinstance(value, str) else f"{value:.12g}"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return str(text).removesuffix("\n").removesuffix("\n...")


def percent(share: float) -> str:
    """Return a share as 41 %, near 0 and 1 with more digits: 0.34 %, 99.6 %; 0 % and 100 % are exact."""
    if 0 < share < 0.1:
        return f"{100 * share:.2g} %" if share >= 1e-4 else "under 0.01 %"
    if 0.99 < share < 1:
        return f"{math.floor(1000 * share) / 10:g} %"
    return f"{100 * share:.0f} %"


_FEW = 10


def percent_of(share: float, number: int) -> str:
    """Return the share of a number of things in percent, of fewer than ten as their number: 1 of 1."""
    return percent(share) if number >= _FEW else f"{round(share * number)} of {number}"


def duration(seconds: float) -> str:
    """Return "0.4 s", "42 s", "5 min 03 s", "3 h 05 min" or "2 d 04 h"."""
    total = max(0, round(seconds))
    if 0 < seconds < 10:
        return f"{seconds:.2g} s"
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600:02d} h"


def size(count: float) -> str:
    """Return a number of bytes as 64 B, 0.5 KiB or 12.3 GiB; GiB up to 10,000, as memory is sold."""
    unit = 0
    while abs(count) >= (10_000 if _UNITS[unit] == "GiB" else _KIBI / 10) and unit < len(_UNITS) - 1:
        count /= _KIBI
        unit += 1
    return f"{count:,.1f} {_UNITS[unit]}" if unit else f"{count:.0f} B"


def aligned(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Return one line per row, with aligned columns; the columns `numbers` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = list[str]()
    for row in rows:
        cells = list[str]()
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.rjust(width) if column in numbers else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def with_interval(value: float | None, ends: Sequence[float] | None, form: str) -> str:
    """Return "0.512 [0.480, 0.544]"; without `ends` the value only, "-" for None."""
    if value is None:
        return "-"
    text = f"{value:z{form}}"  # z: no -0.000
    return f"{text} [{ends[0]:z{form}}, {ends[1]:z{form}}]" if ends else text


HIDDEN = "***"
_SECRET_VARIABLE = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|_PASS|_PAT)S?(_?\d+)?$"
)
_SECRET_LENGTH = 8
_PREFIX = "(?:(?:hf|hub|auth|access|api|admin|bearer|session|refresh|client|private|my|wandb|openai)[-_])?"
_SECRET_TEXTS = (
    re.compile(r"(?<=://)[^/\s]+(?=@)"),  # user:password in a URL
    re.compile(
        r"(?i)(?<=[?&])((?:[\w-]*[_-])?(?:api_?key|key|token|secret|password|sig|signature)=)[^&#\s\"\\]+"
    ),
    # The word after the name of a header, an option or a variable of a command: "Authorization: Bearer abc",
    # "['--api-key', 'abc']", "HF_TOKEN=abc"; not special tokens ("--eos_token x"), nor paths and variables.
    re.compile(
        r"(?i)(\b(?:authorization|(?:x-)?api[-_]?key)[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|token)\s+)?"
        r"|(?-i:\bBearer)\s+"
        rf"|(?<![\w-])--?{_PREFIX}(?:token|secret|password|passwd|passphrase|(?:secret|access|api)[-_]?key)"
        r"[\"']?(?:=|,?\s+)[\"']?(?!\$)"
        r"|(?<![\w-])(?:-u|--user|--proxy-user)[\"']?(?:=|,?\s+)[\"']?[^\s\"':]+:"
        r"|\b(?:x-[\w-]+|private|auth|access|session)-(?:token|key|secret):\s*|\bcookie:\s*[\w-]+="
        rf"|[\"']{_PREFIX}(?:password|secret|(?:access|auth|refresh)_token)[\"']:\s*[\"']"
        r"|\b(?-i:[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY))=[\"']?(?![/$<~]|VALUE\b)"
        r"|(?<![\w-])(?:-d|-F|--data[\w-]*|--form)[\"']?,?\s+[\"']?(?:token|password|secret)=)"
        r"[^\s\"'\\,&#]+"
    ),
    # At least as long as real tokens: names of files and models also begin with `hf_` and `sk-`.
    re.compile(
        r"\b(?:hf_[A-Za-z0-9]{30,}|gh[opsru]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
        r"|xox[abp]-[\w-]{12,}|AKIA[A-Z0-9]{16}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z0-9]{16})[\w-]{20,})"
    ),
)


def without_secrets(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Return plain values with `***` for secrets in texts.

    Secrets are passwords in URLs, words after `Authorization:` or `api-key:`, tokens of known forms, and
    values of at least 8 characters in environment variables named like `*_KEY`, `*_TOKEN`, `*_PASSWORD`.
    Token counts (`MAX_TOKENS=4096`) and existing paths (`SSH_KEY=/data/key`) are no secrets.
    """
    secrets: set[str] = set()
    for name, text in environment.items():
        if not _SECRET_VARIABLE.search(name.upper()) or len(text.strip()) < _SECRET_LENGTH:
            continue
        is_count = name.upper().endswith("TOKENS") and text.isdecimal()
        if is_count or _is_path(text):
            continue
        for secret in (text, text.strip()):  # programs strip the line end of a value from a file
            secrets |= {
                secret,
                quote(secret, safe=""),
                json.dumps(secret)[1:-1],
                shlex.quote(secret).strip("'"),
            }
    return _hidden(value, sorted(secrets, key=len, reverse=True))


@cache
def _is_path(text: str) -> bool:
    """Return whether a text is the path of a file or folder that exists; a bare name may be a password."""
    return "/" in text and os.path.exists(os.path.expanduser(text.strip()))  # noqa: PTH110, PTH111 (no error)


def _hidden(value: Any, secrets: Iterable[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _hidden(inner, secrets) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner, secrets) for inner in value]
    if not isinstance(value, str):
        return value
    text = str(value)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    address, query, header, token = _SECRET_TEXTS
    text = header.sub(rf"\g<1>{HIDDEN}", query.sub(rf"\g<1>{HIDDEN}", address.sub(HIDDEN, text)))
    return token.sub(HIDDEN, text)
