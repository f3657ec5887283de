"""Hub datasets: read at the commit of the fingerprint; without network after the first start."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from dpo_dist.reference.published import push
from dpo_dist.reference.store import LogpStore
from tests.unit.reference.test_behind import ENTRIES, FEW, KEYS, LOGPS, REFERENCE

# Each step is a source to read or to encode; the hub's address is fixed when its library is imported.
_STEPS = """
import json, sys
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data import DataSource
from dpo_dist.foundation.errors import DataError
results = []
config = DataConfig(cache=sys.argv[1])
for verb, options in json.loads(sys.argv[2]):
    source = SourceConfig(**options)
    try:
        if verb == "read":
            results.append([record.prompt for record in read_records(source)])
        elif verb == "pin":
            results.append(DataSource(source).pinned().config.revision)
        else:
            from dpo_dist.encoded.dataset import open_dataset
            from dpo_dist.encoded.build import Preparation
            from tests.support import tiny
            encoded = Preparation([source], config, tiny.qwen(), "qwen").whole()
            results.append(len(open_dataset(encoded, config)))
    except DataError as error:
        results.append([error.where, error.got])
print(json.dumps(results))
"""
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face Hub that reading needs, on this machine: commits, trees and files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, Files]] = {}
        self.revisions: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.sent: dict[str, bytes] = {}
        self.is_open = True

    def commit(self, repository: str, files: Files, revision: str = "main") -> str:
        """Make `files` what `revision` names; the commit's name."""
        commit = digest(repr((repository, sorted(files.items()))).encode())
        self.commits.setdefault(repository, {})[commit] = files
        self.revisions.setdefault(repository, {})[revision] = commit
        return commit


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        """Take an upload, whose files are all small."""
        path, body = self.path.strip("/"), self.rfile.read(int(self.headers["Content-Length"]))
        self.server.sent[path] = body
        if "/paths-info/" in path:
            commit = path.rpartition("/")[2]
            [files] = (commits[commit] for commits in self.server.commits.values() if commit in commits)
            names = [name for name in parse_qs(body.decode())["paths"] if name in files]
            found = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": digest(files[name])}
                for name in names
            ]
            content, headers = as_json(found)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        if not self.server.is_open:
            self.send_error(401)
            return
        url = f"{self.server.url}/o/model"
        answer: dict[str, Any] = {"url": url, "commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40}
        if path.endswith("preupload/main"):
            named = [file["path"] for file in json.loads(body)["files"]]
            answer["files"] = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named
            ]
        content, headers = as_json(answer)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer(self) -> bytes:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        body, headers = self.found(path)
        status = 404 if body is None else 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if body is not None and wanted:
            body = body[int(wanted[1]) : int(wanted[2]) + 1]
            status = 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        return body or b""

    def found(self, path: str) -> tuple[bytes | None, dict[str, str]]:
        asked = re.fullmatch(r"(?:api/)?(?:datasets/|models/)?(o/\w+)(?:/(\w+)/(\w+)(?:/(.+))?)?", path)
        if asked is None or asked[1] not in self.server.commits:
            return None, {"X-Error-Code": "RepoNotFound"}
        repository, what, revision, name = asked.groups()
        commit = self.server.revisions[repository].get(revision or "main", revision)
        files = self.server.commits[repository][commit]
        if what == "resolve":
            return files[name], {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": commit}
        if what == "tree":
            return as_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                    for name, content in files.items()
                ]
            )
        siblings = [{"rfilename": name} for name in files]
        return as_json({"id": repository, "sha": commit, "siblings": siblings})

    def log_message(self, *_: object) -> None:
        pass


def as_json(value: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


def digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def rows(*prompts: str) -> bytes:
    return "".join(
        json.dumps({"prompt": prompt, "chosen": "a", "rejected": "b"}) + "\n" for prompt in prompts
    ).encode()


def environment_of(folder: Path, url: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def run(folder: Path, url: str, steps: list[tuple[str, dict[str, str]]], **environment: str) -> list[Any]:
    command = [sys.executable, "-c", _STEPS, str(folder / "encoded"), json.dumps(steps)]
    done = subprocess.run(
        command, env=environment_of(folder, url) | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_a_hub_dataset_is_pinned_and_downloaded_once(tmp_path: Path, hub: Hub) -> None:
    first = hub.commit("o/pairs", {"train.jsonl": rows("old"), "test.jsonl": rows("held out")})
    hub.commit("o/pairs", {"train.jsonl": rows("tagged")}, "v1")
    pairs = {"path": "o/pairs"}
    results = run(
        tmp_path,
        hub.url,
        [
            ("read", pairs),
            ("pin", pairs),
            ("read", pairs | {"split": "test"}),
            ("read", pairs | {"revision": "v1"}),
            ("read", {"path": "o/nothing"}),
        ],
    )
    assert results[:4] == [["old"], first, ["held out"], ["tagged"]]
    assert "RepositoryNotFound" in results[4][1]

    second = hub.commit("o/pairs", {"train.jsonl": rows("new", "newer")})
    # What the hub names now is asked at each start; a commit stays what it was.
    results = run(
        tmp_path, hub.url, [("read", pairs | {"revision": first}), ("pin", pairs), ("encode", pairs)]
    )
    assert results == [["old"], second, 2]

    asked = len(hub.asked)
    offline = run(
        tmp_path,
        hub.url,
        [("pin", pairs), ("read", pairs), ("read", {"path": "o/other"})],
        HF_HUB_OFFLINE="1",
    )
    assert offline[:2] == [second, ["new", "newer"]]
    assert "o/other" in offline[2][0]
    assert len(hub.asked) == asked


def test_a_model_stays_at_its_commit_while_a_run_trains(tmp_path: Path, hub: Hub) -> None:
    files = {"config.json": b"{}", "model.safetensors": (8).to_bytes(8, "little") + b"{}      "}
    first = hub.commit("o/model", files)
    find = "from dpo_dist.model.files.folder import *; print(model_folder('o/model', None).name, flush=True)"
    describe = "print(description_folder('o/model', None).name)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{find}; input(); {find}; {describe}"],
        env=environment_of(tmp_path, hub.url),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == first
        assert hub.commit("o/model", files | {"config.json": b'{"changed": 1}'}) != first
        rest, _ = process.communicate("\n")
    assert rest.split() == [first, first]


_FIND = """
import sys
from tests.unit.reference import test_behind
found, behind = test_behind.found_in(sys.argv[1], test_behind.REFERENCE, which=test_behind.FEW)
print(len(found), behind.left_out, behind.bytes_read)
"""


def test_entries_of_a_published_store_are_fetched_from_a_commit(tmp_path: Path, hub: Hub) -> None:
    for start in range(0, ENTRIES, 128):
        rows = slice(start, start + 128)
        LogpStore.open(tmp_path / "store", REFERENCE).write(KEYS[rows], LOGPS[rows])
    push([tmp_path / "store" / REFERENCE.name], str(tmp_path / "public"))
    files = [file for file in (tmp_path / "public").rglob("*") if file.is_file()]
    named = {file.relative_to(tmp_path / "public").as_posix(): file.read_bytes() for file in files}
    commit = hub.commit("o/store", named)
    hub.commit("o/store", {"README.md": b"gone"})
    done = subprocess.run(
        [sys.executable, "-c", _FIND, f"hf://datasets/o/store@{commit}"],
        env=environment_of(tmp_path, hub.url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, left_out, bytes_read = map(int, done.stdout.split())
    assert (found, left_out) == (len(FEW), 0)
    assert bytes_read < sum(map(len, named.values()))
