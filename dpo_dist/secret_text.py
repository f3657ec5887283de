"""Secrets in texts, replaced by `***` before the texts are printed, logged, written or sent."""

import json
import os
import re
from collections.abc import Iterable, Mapping
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
    re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{12,}"),
)


def without_secrets(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Return plain values with `***` for secrets in texts.

    Secrets are credentials in addresses, tokens of known shapes, and values of environment variables with
    names like `*_KEY`, `*_TOKEN`, `*_PASSWORD`, from 8 characters on.
    """
    secrets = {
        written
        for name, text in environment.items()
        if _SECRET_VARIABLE.search(name.upper()) and len(text) >= _SECRET_LENGTH
        for written in (text, quote(text, safe=""), json.dumps(text)[1:-1])
    }
    return _hidden(value, sorted(secrets, key=len, reverse=True))


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
