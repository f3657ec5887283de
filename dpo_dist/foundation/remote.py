"""Files at URLs, by fsspec (`s3://`, `gs://`, `hf://`, `https://`), with plain errors that hide secrets."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError

from dpo_dist.foundation.errors import DISK_IS_FULL, ConfigError, DataError, DpoDistError, in_one_line
from dpo_dist.foundation.installed import install_extra
from dpo_dist.foundation.text import without_secrets

_WEB = ("http", "https")
_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
}
# Without these a server that accepts a connection and sends nothing would be waited for without an end.
_CONNECT_SECONDS = 10
_SILENT_SECONDS = 60
_TRIES = {"s3": 5, "s3a": 5, "gs": 6, "gcs": 6}  # of s3fs and gcsfs, for each request
_QUERY = re.compile(r"(?<=://)([^\s?#]*)[?#][^\s'\")]+")
_PASSWORD = re.compile("[^/@]*:[^@]*@")
_WEB_USER = re.compile("[^/@]*(:[^@]*)?@")
_HUB_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)(?:/(?:tree|blob)/([^/]*).*)?/?"
)
_DENIED = re.compile(r"(?i)credential|forbidden|unauthorized|access.?denied|invalid.?access|signature|40[13]")


def is_url(path: str) -> bool:
    """Return whether a path names files by a URL, not on a disk or by the name of a dataset."""
    return "://" in path


def is_web(path: str) -> bool:
    """Return whether a path is the URL of a web server."""
    return path.partition("://")[0].lower() in _WEB


_ONE_SLASH = re.compile(r"(https?|s3a?|gs|gcs|hf|file):/?(?=[^/])")


def check_place(text: str, info: ValidationInfo) -> str:
    """Return a path, a name on the hub or a URL of a configuration; one from Python is checked later.

    Raises:
        PydanticCustomError: a URL cannot be used, or the text is a page's address; its context has the
            `ConfigError` as `mistake`.
    """
    if info.mode != "json":
        return text
    protocol = _ONE_SLASH.match(text)
    page = _HUB_PAGE.fullmatch(text)
    try:
        if protocol:
            remedy = f"did you mean {protocol[1]}://{text[protocol.end() :]}?"
            raise ConfigError("a URL has two slashes", got=text, remedy=remedy)
        if page:
            name, branch = page.groups()
            remedy = f"did you mean {name}?"
            if branch not in (None, "", "main"):
                remedy += f" Its branch {branch} is the key revision beside it, or a folder to download"
            message = "this is the address of a page for browsers"
            raise ConfigError(message, got=text, expected="the name on the hub, ORG/NAME", remedy=remedy)
        if is_url(text):
            check_url(text, "")
    except ConfigError as error:
        raise PydanticCustomError("place", "no place", {"mistake": error}) from None
    return text


def check_url(url: str, where: str) -> None:
    """Check that a URL holds no secret, which would be stored with the configuration; `where`: the key.

    Also that it names a bucket, a host or a folder. Raises ConfigError, which does not repeat a secret.
    """
    protocol, separator, rest = url.partition("://")
    is_web = protocol.lower() in _WEB
    fault = "a user or password" * bool((_WEB_USER if is_web else _PASSWORD).match(rest))
    fault = fault or "a query or fragment" * (is_web and bool(re.search("[?#]", rest)))
    fault = fault or "several file systems" * ("::" in url)
    if fault:
        raise ConfigError(
            f"a URL with {fault} cannot be used",
            where=where,
            expected="the location alone, for example s3://bucket/folder or https://host/file.jsonl",
            remedy="set credentials in the environment or the files where the file system looks for them "
            "(for https:// ~/.netrc); download what only a signed URL can reach",
        )
    lacks_place = not rest.strip("/") or (protocol.lower() in _PACKAGES and rest.startswith("/"))
    if separator and lacks_place:
        raise ConfigError(
            "the URL names no bucket, host or folder",
            where=where,
            got=url,
            expected="for example s3://bucket/folder or https://host/file.jsonl",
            remedy="write the whole URL",
        )


def open_file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path on it; its lists of files are read anew.

    No request is sent. Raises ConfigError: `check_url`, a protocol that fsspec does not know, or a package
    that is not installed.
    """
    import fsspec  # noqa: PLC0415  # slow to import

    check_url(url, "the URL")
    protocol = url.partition("://")[0].lower()
    try:
        user_settings = fsspec.config.conf.get(protocol, {})  # of the user's files and environment
        options = {name: values | user_settings.get(name, {}) for name, values in _limits(protocol).items()}
        file_system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as fault:
        raise ConfigError(
            f"{protocol}:// needs a package that is not installed",
            where=url,
            got=in_one_line(fault),
            remedy=install_extra("cloud", _PACKAGES[protocol])
            if protocol in _PACKAGES
            else "install the package",
        ) from fault
    except ValueError as fault:
        raise ConfigError(
            "the URL is not understood",
            where=url,
            got=in_one_line(fault),
            remedy="write PROTOCOL://BUCKET_OR_HOST/PATH",
        ) from fault
    file_system.invalidate_cache()
    return file_system, path


def _limits(protocol: str) -> dict[str, dict[str, Any]]:
    """Return options of a file system by which a silent server is waited for as long as for `https://`."""
    silent = _SILENT_SECONDS / _TRIES.get(protocol, 1)
    match protocol:
        case "s3" | "s3a":
            limits: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": silent}
            # botocore would try each of the tries five times.
            return {"config_kwargs": limits | {"retries": {"total_max_attempts": 1}}}
        case "http" | "https" | "gs" | "gcs":
            import aiohttp  # noqa: PLC0415

            timeout = aiohttp.ClientTimeout(None, sock_connect=_CONNECT_SECONDS, sock_read=silent)
            if protocol in _WEB:
                return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
            return {"session_kwargs": {"timeout": timeout}}
        case _:
            return {}


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Raise DataError for what a file system raises, which has no base class; secrets are hidden."""
    try:
        yield
    except DpoDistError:
        raise
    except Exception as fault:
        if isinstance(fault, OSError) and fault.errno in DISK_IS_FULL:  # of the disk of a copy
            raise
        # fsspec's http calls every fault of a request FileNotFoundError.
        cause = (url.startswith(_WEB) and fault.__cause__) or fault
        # Errors repeat URLs that a server has signed.
        got: str = without_secrets(_QUERY.sub(r"\1", in_one_line(cause)))
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            what = "nothing is at the URL"
            remedy = "check the names of the bucket and of the file"
        elif isinstance(cause, PermissionError) or _DENIED.search(got):
            what = "access to the URL is denied"
            remedy = "check the credentials of the environment"
        else:
            what = "the URL cannot be reached, or not read to its end"
            remedy = "check the name of the host or bucket, the network and its proxies; then start again"
        raise DataError(what, where=url, got=got, remedy=remedy) from fault
