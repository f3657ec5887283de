"""Sources at URLs: files and patterns; changes, damage and secrets; a web server and a bucket."""

import errno
import functools
import gzip
import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpo_dist.config.load import load_run_config
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.read import sources
from dpo_dist.data.read.sources import DataSource, source_labels
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import open_dataset
from dpo_dist.foundation import remote
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import locked
from dpo_dist.foundation.remote import open_file_system, remote_errors
from tests.support import tiny
from tests.support.cache import encoded_folders, prepare_all
from tests.support.records import TEXT


def lines(*texts: str) -> bytes:
    return "".join(
        json.dumps(TEXT | {"prompt": text, "chosen": f"yes {text}"}) + "\n" for text in texts
    ).encode()


FILES = {
    "b/one.jsonl": lines("0", "1"),
    "b/two.jsonl.gz": gzip.compress(lines("2")),
    "b/deep/three.csv": b"prompt,chosen,rejected\n3,a,b\n",
    "b/.hidden.jsonl": lines("4"),
    "other/a.txt": b"x",
    "bad/a.jsonl": b"broken\n",
}


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    system.pipe({f"/{name}": content for name, content in FILES.items()})
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def downloads(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all files that are downloaded."""
    seen: list[str] = []
    get_file = MemoryFileSystem.get_file

    def spy(self: Any, path: str, *rest: Any, **options: Any) -> Any:
        seen.append(path)
        return get_file(self, path, *rest, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", spy)
    return seen


def read(path: str, **options: Any) -> dict[str, str]:
    """Return the origin of each prompt."""
    records = DataSource(SourceConfig(path, **options)).pinned().records()
    return {
        str(record.prompt): str(record.origin) for record in records if isinstance(record, PreferenceRecord)
    }


@pytest.mark.parametrize(
    ("path", "options", "found"),
    [
        ("b/one.jsonl", {}, {"0": "b/one.jsonl:1", "1": "b/one.jsonl:2"}),
        ("b/*.jsonl*", {}, {"0": "b/one.jsonl:1", "1": "b/one.jsonl:2", "2": "b/two.jsonl.gz:1"}),
        ("b/**/t?ree.csv", {}, {"3": "b/deep/three.csv:2"}),
        ("b/o*", {"limit": 1}, {"0": "b/one.jsonl:1"}),
    ],
)
def test_files_and_patterns(
    memory: MemoryFileSystem, path: str, options: dict[str, Any], found: dict[str, str]
) -> None:
    assert read(f"memory://{path}", **options) == {text: f"memory://{name}" for text, name in found.items()}


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("b/none.jsonl", {}, "nothing is at the URL"),
        ("b/none*.jsonl", {}, "none matches the pattern"),
        ("none/*.jsonl", {}, "nothing is at the URL"),
        ("other/a.txt", {}, "this kind of file"),
        ("b", {}, r"b/\*\.parquet or \*\.jsonl"),
        ("b", {"split": "test"}, "split has no effect"),
        ("b/one.jsonl", {"split": "test"}, "split has no effect"),
        ("b/one.jsonl", {"revision": "main"}, "revision has no effect"),
    ],
)
def test_faults_name_the_url(
    memory: MemoryFileSystem, path: str, options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises((DataError, ConfigError), match=words) as raised:
        read(f"memory://{path}", **options)
    assert f"memory://{path}" in raised.value.where
    assert str(tmp_path) not in str(raised.value)


def test_a_second_start_lists_only_and_a_change_is_noticed(downloads: list[str], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    first = prepare_all(tmp_path, "memory://b/*.jsonl*")
    assert len(downloads) == 2
    data = open_dataset(first, DataConfig())
    assert {str(data.origin(index)) for index in range(3)} == {
        f"memory://b/{name}" for name in ("one.jsonl:1", "one.jsonl:2", "two.jsonl.gz:1")
    }
    assert prepare_all(tmp_path, "memory://b/*.jsonl*") == first
    assert len(downloads) == 2
    assert all(name.endswith(".arrow") for name in encoded_folders(tmp_path))
    memory.pipe("/b/one.jsonl", FILES["b/one.jsonl"].replace(b"0", b"9"))  # of the same size
    assert prepare_all(tmp_path, "memory://b/*.jsonl*") != first
    assert len(downloads) == 4


def test_a_change_while_the_records_are_read_is_an_error(memory: MemoryFileSystem, tmp_path: Path) -> None:
    pinned = DataSource(SourceConfig("memory://b/one.jsonl")).pinned()
    memory.pipe("/b/one.jsonl", lines("8", "9"))
    with pytest.raises(DataError, match="changed while"):
        list(pinned.records())


def test_a_change_after_the_download_is_an_error(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file = MemoryFileSystem.get_file

    def change(self: Any, path: str, *rest: Any, **options: Any) -> None:
        get_file(self, path, *rest, **options)
        self.pipe(path, lines("8", "9"))

    monkeypatch.setattr(MemoryFileSystem, "get_file", change)
    with pytest.raises(DataError, match="changed while"):
        prepare_all(tmp_path, "memory://b/one.jsonl")
    assert not [*tmp_path.rglob("*.jsonl")]  # a later start would take it for what was listed


def test_copies_and_leftovers_of_a_kill_go(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "download.tmp-0123456789ab"
    left.mkdir()
    os.utime(left, (1, 1))
    assert len(list(read_records("memory://b/one.jsonl"))) == 2
    assert not [*tmp_path.iterdir()]


def test_encoding_leaves_no_download_also_of_a_start_that_was_killed(
    downloads: list[str], tmp_path: Path
) -> None:
    one = encoding(tmp_path, "memory://b/*.jsonl*")
    left = one.plan()[0].target.copies / "1.gz.tmp-0123456789ab"
    left.parent.mkdir(parents=True)
    left.touch()
    assert one.whole()
    assert len(downloads) == 2
    assert all(name.endswith(".arrow") for name in encoded_folders(tmp_path))


def encoding(folder: Path, url: str) -> Preparation:
    return Preparation([SourceConfig(url)], DataConfig(cache=str(folder / "cache")), tiny.qwen(), "qwen")


def test_jobs_at_once_share_one_download(downloads: list[str], tmp_path: Path) -> None:
    one = encoding(tmp_path, "memory://b/*.jsonl*")
    planned, [source] = one.plan(), [DataSource(SourceConfig("memory://b/*.jsonl*")).pinned()]
    first = source.raw_records(planned[0].target.copies)
    with ThreadPoolExecutor(1) as pool, locked(planned[0].target.copies / "0.lock", "downloads"):
        other = pool.submit(next, first)
        with pytest.raises(TimeoutError):
            other.result(0.5)
    assert other.result()
    [made] = one.whole()
    assert made == planned[0].target
    assert len(downloads) == 2


def test_the_files_are_listed_as_often_for_many_files(memory: MemoryFileSystem) -> None:
    listed, counts = sources.remote_files, list[int]()
    for number in (1, 9):
        for name in range(number):
            memory.pipe(f"/several/{number}/{name}.jsonl", lines(str(name)))
        with mock.patch.object(sources, "remote_files", side_effect=listed) as spy:
            assert len(list(read_records(SourceConfig(f"memory://several/{number}/*.jsonl")))) == number
        counts.append(spy.call_count)
    assert counts[0] == counts[1]


def test_a_job_ends_well_when_another_has_encoded_the_source_meanwhile(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job removes the copies."""
    one = encoding(tmp_path, "memory://b/*.jsonl*")
    get_file = MemoryFileSystem.get_file
    others = list[Any]()

    def encoded_meanwhile(self: Any, path: str, *rest: Any, **options: Any) -> None:
        get_file(self, path, *rest, **options)
        if not others:
            others.append(None)
            with mock.patch("fcntl.flock"):  # this process holds the lock of the download itself
                others.append(one.whole())

    monkeypatch.setattr(MemoryFileSystem, "get_file", encoded_meanwhile)
    assert one.whole() == others[1]


def test_a_full_disk_of_a_copy_is_one_plain_error(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a class that all ranks raise together."""
    fault = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(MemoryFileSystem, "get_file", mock.Mock(side_effect=fault))
    one = encoding(tmp_path, "memory://b/one.jsonl")
    with pytest.raises(ConfigError, match="free disk space") as raised:
        one.whole()
    assert raised.value.where == "data.cache"


def test_faults_of_a_file_name_its_url(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    [bad] = read_records("memory://bad/a.jsonl")
    assert str(bad.origin) == "memory://bad/a.jsonl:1"
    memory.pipe("/bad/b.parquet", b"no parquet")
    with pytest.raises(DataError, match="cannot be read to its end") as raised:
        list(read_records("memory://bad/b.parquet"))
    assert raised.value.where == "memory://bad/b.parquet"
    assert str(tmp_path) not in str(raised.value)


SECRETS = [
    "https://me:SECRET1@host/a.jsonl",
    "https://SECRET1@host/a.jsonl",
    "https://me:SEC/RET1@host/a.jsonl",
    "https://host/a.jsonl?X-Amz-Signature=SECRET1",
    "https://host/a.jsonl#SECRET1",
    "HTTPS://host/a.jsonl?t=SECRET1",
    "s3://SECRET1:SECRET1@bucket/a.jsonl",
    "simplecache::s3://bucket/a.jsonl",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_url_with_a_secret_is_refused_before_it_is_stored(url: str) -> None:
    for use in (
        lambda: load_run_config(["model.path=m", f"data.train=['{url}']"]),
        lambda: load_run_config(["model.path=m", "data.train=[a]", f"data.eval=[{{path: '{url}'}}]"]),
        lambda: DataSource(SourceConfig(url)).check(),
        lambda: DataSource(SourceConfig(url)).pinned(),
        lambda: list(read_records(url)),
    ):
        with pytest.raises(ConfigError, match="cannot be used") as raised:
            use()
        assert "RET1" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "S3:///", "gs://", "https:///a.jsonl", "memory:///", "hf://"]
)
def test_a_url_without_a_bucket_or_host_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="names no bucket, host or folder"):
        load_run_config(["model.path=m", f"data.train=['{url}']"])


@pytest.mark.parametrize(
    "url", ["abfs://box@account.dfs.core.windows.net/a", "s3://b/part-?.jsonl", "hf://datasets/a/b@main/c"]
)
def test_urls_without_secrets_are_accepted(url: str) -> None:
    load_run_config(["model.path=m", f"data.train=['{url}']"])


def test_faults_of_a_file_system_are_plain_and_hide_what_a_server_signed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefghijkl")
    faults = {
        "denied": PermissionError("Forbidden"),
        "credentials of": ValueError("403 for 'https://x/y?Signature=SECRET1&Expires=3'"),
        "cannot be reached": OSError("no route for abcdefghijkl to https://x/y?p=SECRET1"),
        "nothing is at": FileNotFoundError("b"),
    }
    for words, fault in faults.items():
        with pytest.raises(DataError, match=words) as raised, remote_errors("s3://b"):
            raise fault
        assert not {word for word in ("SECRET1", "abcdefghijkl") if word in str(raised.value)}


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, protocol: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install '{package}>=[^' ]*'$"):
        DataSource(SourceConfig(f"{protocol}://host/a.jsonl")).check()
    with pytest.raises(ConfigError, match="not understood"):
        open_file_system("nowhere://a")


def test_a_bucket_is_asked_with_limits_and_with_the_own_settings_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In all a silent server gets the time that s3fs's five tries have."""
    own = {"config_kwargs": {"s3": {"addressing_style": "path"}, "connect_timeout": 3}}
    monkeypatch.setitem(fsspec.config.conf, "s3", own)
    with mock.patch.object(fsspec.core, "url_to_fs", return_value=(mock.Mock(), "")) as opened:
        open_file_system("s3://bucket/a")
    asked = opened.call_args.kwargs["config_kwargs"]
    assert asked.pop("read_timeout") * 5 <= 60
    assert asked == {**own["config_kwargs"], "retries": {"total_max_attempts": 1}}


def test_labels_are_names_of_files() -> None:
    urls = ["s3://bucket/data/*.jsonl", "gs://bucket/good.jsonl.gz", "https://host/train.jsonl"]
    assert source_labels([SourceConfig(url) for url in urls]) == ["bucket-data", "good", "host-train"]


# Servers.


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; some without their end, or without the time of their change."""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def send_header(self, keyword: str, value: str) -> None:
        """Leave out or raise a header for some names."""
        if keyword == "Last-Modified" and "untimed" in self.path:
            return
        if keyword == "Content-Length" and "cut" in self.path:
            value = str(int(value) + 10)
        super().send_header(keyword, value)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="https:// needs aiohttp")
    for name in ("a.jsonl", "untimed.jsonl", "cut.jsonl"):
        (tmp_path / name).write_bytes(lines("0", "1"))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_server(web: str) -> None:
    assert read(f"{web}/a.jsonl") == {"0": f"{web}/a.jsonl:1", "1": f"{web}/a.jsonl:2"}
    faults = {
        "none.jsonl": "nothing is at the URL",
        "untimed.jsonl": "a changed file is noticed",
        "cut.jsonl": "not read to its end",
    }
    for name, words in faults.items():
        with pytest.raises(DataError, match=words):
            read(f"{web}/{name}")
    with pytest.raises(DataError, match="cannot be reached"):
        read("http://127.0.0.1:9/a.jsonl")


def test_a_server_that_accepts_and_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    monkeypatch.setattr(remote, "_SILENT_SECONDS", 1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "0123456789abcdef")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        started = time.monotonic()
        with pytest.raises(DataError, match="cannot be reached"):
            read("s3://bucket/a.jsonl")
        assert time.monotonic() - started < 55
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    if importlib.util.find_spec("nanio") is None:
        pytest.skip("no S3 server: pip install nanio")
    port, key = 9100 + os.getpid() % 800, "0123456789abcdef"
    keys = {"NANIO_ACCESS_KEY": "tester", "NANIO_SECRET_KEY": key}
    command = [sys.executable, "-m", "nanio", "serve", "--data-dir", str(tmp_path / "s3")]
    (tmp_path / "s3").mkdir()
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | keys,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for _ in range(100):
            try:
                s3fs.S3FileSystem().mkdir("bucket")
                break
            except Exception:
                time.sleep(0.1)
        yield s3fs.S3FileSystem()
    finally:
        server.terminate()
        server.wait()
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe({f"bucket/{name}": content for name, content in FILES.items()})
    first = prepare_all(tmp_path, "s3://bucket/b/*.jsonl*", "s3://bucket/split")
    assert [len(source.table() or ()) for source in first] == [3, 2]
    assert prepare_all(tmp_path, "s3://bucket/b/*.jsonl*", "s3://bucket/split") == first
    bucket.pipe("bucket/b/one.jsonl", lines("8", "9"))
    second = prepare_all(tmp_path, "s3://bucket/b/*.jsonl*", "s3://bucket/split")
    assert [new == old for new, old in zip(second, first, strict=True)] == [False, True]
    for path in ("bucket/none.jsonl", "none/a.jsonl", "none/*.jsonl"):
        with pytest.raises(DataError, match="nothing is at the URL"):
            read(f"s3://{path}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    type(bucket).clear_instance_cache()
    for path in ("b/one.jsonl", "b/*.jsonl", "split"):
        with pytest.raises(DataError, match="access to the URL is denied"):
            read(f"s3://bucket/{path}")


def test_lists_that_a_file_system_keeps_are_read_anew() -> None:
    """S3 and web servers' file systems keep them: a file that appears later would not be seen."""
    with mock.patch.object(MemoryFileSystem, "invalidate_cache") as cleared:
        open_file_system("memory://b")
    cleared.assert_called()
