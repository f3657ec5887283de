"""Secrets in texts, replaced by `***` before the texts are printed, logged, written or sent."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
_SECRET_VARIABLE = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|_PASS|_PAT)S?(_?\d+)?$"
)
_SECRET_LENGTH = 8
_SECRET_TEXTS = (
    re.compile(r"(?<=://)[^/\s]+(?=@)"),  # user:password of an address
    re.compile(
        r"(?i)(?<=[?&])((?:[\w-]*[_-])?(?:api_?key|key|token|secret|password|sig|signature)=)[^&#\s]+"
    ),
    # At least as long as those that are issued: `hf_` and `sk-` also begin names of files and models.
    re.compile(
        r"\b(?:hf_[A-Za-z0-9]{30,}|gh[opsru]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
        r"|xox[abp]-[\w-]{12,}|AKIA[A-Z0-9]{16}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Za-z0-9]{16})[\w-]{20,})"
    ),
)


def without_secrets(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Return plain values with `***` for secrets in texts.

    Secrets are credentials in addresses, tokens of known shapes, and values of environment variables with
    names like `*_KEY`, `*_TOKEN`, `*_PASSWORD`, from 8 characters on; numbers of tokens and paths
    of files and folders (`SSH_KEY=/data/key`) are none.
    """
    secrets = {
        written
        for name, text in environment.items()
        if _SECRET_VARIABLE.search(name.upper())
        and not (name.upper().endswith("TOKENS") and text.isdecimal())
        and not _is_path(text)
        for given in (text, text.strip())  # programs strip the line end of a value from a file
        if len(given.strip()) >= _SECRET_LENGTH
        for written in (given, quote(given, safe=""), json.dumps(given)[1:-1], shlex.quote(given).strip("'"))
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
    address, query, token = _SECRET_TEXTS
    text = address.sub(HIDDEN, text)
    return token.sub(HIDDEN, query.sub(rf"\g<1>{HIDDEN}", text))
