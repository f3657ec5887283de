"""`transformers serve` takes texts, one response at a time, and reports no log-probs: it works, unchecked."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.reference.model_source import find_files
from dpo_dist.tools.sampling import served
from dpo_dist.tools.sampling.keys import ServerConfig
from dpo_dist.tools.sampling.respond import open_responder, respond
from dpo_dist.tools.sampling.served import check_served, open_server
from dpo_dist.tools.sampling.settings import Sampling
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs fastapi and uvicorn")
RECORDS = [PreferenceRecord((Message("user", f"question {n}"),), (), Origin("a", n)) for n in range(2)]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a server, and the folder that it serves."""
    folder = str(write_model(tmp_path / "model"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", folder
        finally:
            process.kill()
            process.wait()


def test_transformers_serve_responds(serving: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CHECKED", 2)
    url, folder = serving
    config = ModelConfig(path=folder, dtype=Dtype.fp32)
    responder = open_responder(find_files(folder, config, "model.path"), config, DataConfig())
    server = open_server(ServerConfig(url=url), responder)
    said: list[str] = []
    check_served(server, RECORDS, config, torch.device("cpu"), Console(LineScreen(said.append)))
    assert "unchecked" in said[0]
    rows = respond(RECORDS, responder, server.generate, Sampling(6), range(2))
    assert [len(row.completions) for row in rows] == [2, 2]
    assert all(completion.content for row in rows for completion in row.completions)
