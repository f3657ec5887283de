"""Responses by a real server over HTTP: the same tokens, refused prompts, and which faults are caught."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.config.schema import Dtype, ModelConfig, Quantization
from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.reference.model_source import find_files
from dpo_dist.tools.sampling import client as clients
from dpo_dist.tools.sampling import served
from dpo_dist.tools.sampling.client import Client, RefusedError
from dpo_dist.tools.sampling.keys import ServerConfig
from dpo_dist.tools.sampling.respond import Responder, open_responder, respond
from dpo_dist.tools.sampling.served import (
    Server,
    check_served,
    most_difference,
    open_server,
    reload_server,
)
from dpo_dist.tools.sampling.settings import Sampling
from tests.support.completions_server import CompletionsServer, completions_server, to_int8
from tests.support.http_server import http_server
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

SYSTEM, CPU = Message("system", "speak like a captain of the old days"), torch.device("cpu")
RECORDS = [
    PreferenceRecord((SYSTEM, Message("user", f"question number {n}")), (), Origin("a.jsonl", n))
    for n in range(24)
]


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CHECK_TOKENS", 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "model")


def config(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype=Dtype.fp32)


@cache
def responder(folder: Path) -> Responder:
    return open_responder(find_files(str(folder), config(folder), "model.path"), config(folder), DataConfig())


def opened(own: CompletionsServer, folder: Path, **keys: Any) -> Server:
    return open_server(ServerConfig(url=own.url, model="policy", **keys), responder(folder))


def checked(own: CompletionsServer, folder: Path) -> str:
    said: list[str] = []
    with completions_server(own):
        check_served(opened(own, folder), RECORDS, config(folder), CPU, Console(LineScreen(said.append)))
    return "\n".join(said)


@pytest.mark.parametrize("form", ["ids", "text", "plain"])
def test_greedy_responses_are_those_of_transformers(folder: Path, form: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with completions_server(CompletionsServer(folder, form=form)) as own:
        server = opened(own, folder)
        rows = respond(RECORDS[:6], server.responder, server.generate, Sampling(6, temperature=0), range(1))
    for row in rows:
        prompt = torch.tensor([row.prompt_ids])
        wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
        [completion] = row.completions
        if form == "ids":
            assert completion.ids == wanted
        assert completion.content == server.responder.tokenizer.decode(wanted).removesuffix("<|im_end|>")


def test_samples_of_a_prompt_are_one_request_that_no_default_of_the_model_changes(folder: Path) -> None:
    with completions_server(CompletionsServer(folder)) as own:
        server = opened(own, folder)
        del own.bodies[:]
        rows = respond(RECORDS[:2], server.responder, server.generate, Sampling(5, 0.5, 0.9, 7), range(2, 5))
    assert [[each.number for each in row.completions] for row in rows] == [[2, 3, 4]] * 2
    wanted = {
        "n": 3,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "repetition_penalty": 1.0,
    }
    for body in own.bodies:
        assert wanted.items() <= body.items()
    assert sorted(body["prompt"] for body in own.bodies) == sorted(row.prompt_ids for row in rows)


def test_a_refused_prompt_is_dropped_and_an_endpoint_that_refuses_all_is_an_error(folder: Path) -> None:
    with completions_server(CompletionsServer(folder)) as own:
        server = opened(own, folder)
        first = server.responder.encode(RECORDS[0], "r").prompt_ids.tolist()  # type: ignore[union-attr]
        own.refuses = lambda ids: ids == first
        rows = respond(RECORDS, server.responder, server.generate, Sampling(4), range(2))
        assert [row.dropped for row in rows] == ["refused_by_the_server", *[None] * 23]
        own.refuses = lambda ids: len(ids) > 9
        rows = respond(RECORDS, server.responder, server.generate, Sampling(4), range(2))
        assert {row.dropped for row in rows} == {"refused_by_the_server"}, "texts are at fault"
        own.refuses = lambda _: True
        with pytest.raises(ConfigError, match="status 400, filter, also for a harmless request") as caught:
            respond(RECORDS, server.responder, server.generate, Sampling(4), range(2))
    assert "a text of" not in caught.value.block()


def test_a_prompt_that_the_server_is_too_short_for_is_dropped(folder: Path) -> None:
    longest = len(responder(folder).encode(RECORDS[0], "r").prompt_ids) + 19  # type: ignore[union-attr]
    with completions_server(CompletionsServer(folder, longest=longest)) as own:
        server = opened(own, folder)
        rows = respond(RECORDS, server.responder, server.generate, Sampling(20), range(1))
        assert {row.dropped for row in rows} == {"too_long_for_the_model"}
        del own.bodies[:]
        usual = respond(RECORDS, server.responder, server.generate, Sampling(20, is_default=True), range(1))
    assert {row.dropped for row in usual} == {None}
    assert [len(body["prompt"]) + body["max_tokens"] for body in own.bodies] == [longest] * len(RECORDS)


def to_bf16(model: Any) -> None:
    model.to(torch.bfloat16)


def trained_a_little(model: Any) -> None:
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.02 * weight.data.std()


def trained_less_than_bf16_rounds(model: Any) -> None:
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 0.004 * weight.data.std()
    to_bf16(model)


def no_system(ids: list[int]) -> list[int]:
    """As a template that leaves out the first of two turns."""
    return ids[ids.index(ids[0], 1) :] if ids[0] in ids[1:] else ids


OTHER = "the server does not serve the model that should respond"


@pytest.mark.parametrize("changes", [lambda _: None, to_bf16])
def test_rounding_is_not_a_fault(folder: Path, changes: Callable[[Any], None]) -> None:
    said = checked(CompletionsServer(folder, changes=changes), folder)
    assert "bf16 rounding makes" in said
    assert "unchecked" not in said


def test_few_tokens_are_no_fault_and_many_show_a_copy_in_8_bits() -> None:
    random = np.random.default_rng(0)
    for tokens, changes in ((24, 1.0), (1000, 2.4)):
        mine, theirs = (np.abs(random.normal(size=(2000, tokens))) for _ in range(2))
        refused = [
            changes * size.mean() > most_difference(own) for own, size in zip(mine, theirs, strict=True)
        ]
        assert np.mean(refused) < 0.005 if changes == 1.0 else np.mean(refused) > 0.995


def test_training_on_quantised_weights_checks_the_weights_of_the_folder(folder: Path) -> None:
    model = dataclasses.replace(config(folder), quantization=Quantization.nf4)
    with completions_server(CompletionsServer(folder)) as own:
        check_served(opened(own, folder), RECORDS, model, CPU, Console(None))


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"changes": trained_a_little}, "tokens differ from ours by .*it probably serves other weights"),
        ({"changes": trained_less_than_bf16_rounds}, "tokens differ from ours by .*other weights"),
        ({"changes": to_int8}, "tokens differ from ours by .*a quantised copy"),
        ({"reads": no_system, "confesses": False}, "tokens differ from ours by .*other prompts"),
        ({"reads": no_system}, "it reads .* drops a system prompt"),
        ({"reads": lambda ids: [*ids[:-1], ids[0]]}, "tokens differ from ours by .*other prompts"),
    ],
)
def test_another_model_template_or_copy_is_named(folder: Path, faults: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){OTHER}.*{said}.*start it with {folder}"):
        checked(CompletionsServer(folder, **faults), folder)


def test_a_server_without_log_probs_is_said_to_be_unchecked(folder: Path) -> None:
    assert checked(CompletionsServer(folder, form="plain"), folder).startswith("warning: ")


@pytest.mark.parametrize("form", ["ids", "text"])
def test_fields_without_a_value_are_no_fault(
    folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CompletionsServer(folder, form=form)
    complete = own.complete

    def sparse(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, content = complete(body)
        for choice in content.get("choices", ()):
            choice.update({"text": None, "finish_reason": None, "logprobs": {"token_logprobs": [None]}})
            choice.update({"token_ids": []} if form == "ids" else {})
        return status, content | {"usage": {"prompt_tokens": 0}}

    monkeypatch.setattr(own, "complete", sparse)
    assert "unchecked" in checked(own, folder)


def test_a_server_that_is_not_there_or_has_another_name_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with completions_server(CompletionsServer(folder, name="base")) as own:
        with pytest.raises(ConfigError, match=r"(?s)model policy: status 404.*it lists base"):
            opened(own, folder)
        url = own.url
    monkeypatch.setattr(clients, "RETRIES", 0)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="the server does not reply as expected"):
        open_server(ServerConfig(url=url, model="policy"), responder(folder))
    assert time.monotonic() - started < 200


def test_a_page_is_no_server_with_this_api() -> None:
    with http_server(lambda *_: (200, "<html>Welcome</html>")) as url, pytest.raises(ConfigError) as raised:
        Client(url, "sampling.endpoint.url", "policy", 1, 1).listed()
    assert "perhaps a page" in raised.value.got
    assert f"usually {url}/v1" in raised.value.remedy


def test_requests_are_sent_several_at_a_time_and_a_refused_one_has_no_reply() -> None:
    lock = threading.Lock()
    most, running = 0, 0

    def answer(key: str) -> str:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        if key == "7":
            raise RefusedError("status 400")
        return key

    client = Client("http://127.0.0.1:9/v1", "sampling.endpoint.url", "m", 1, 3)
    keys = list(map(str, range(9)))
    assert client.ask(keys, answer, list) == {key: None if key == "7" else key for key in keys}
    assert most == 3


def test_a_command_changes_the_weights_and_the_server_is_waited_for(tmp_path: Path, folder: Path) -> None:
    source = dataclasses.replace(responder(folder).source, name="policy")
    with completions_server(CompletionsServer(folder)) as own:
        written = tmp_path / "a folder"
        keys = ServerConfig(url=own.url, reload=f"cp -r '{{model}}' '{written}'")
        reload_server(keys, source)
        assert (written / "config.json").is_file()
        adapter = dataclasses.replace(source, adapter=tmp_path / "a folder")
        (written / "of_the_adapter").touch()
        reload_server(ServerConfig(url=own.url, reload=f"cp -r '{{model}}' '{tmp_path}/copy'"), adapter)
        assert (tmp_path / "copy" / "of_the_adapter").is_file()
        for token in ("hf_" + "a1B2" * 10, "of-no-known-form"):
            secret = f"false -H 'Authorization: Bearer {token}'"
            with pytest.raises(ConfigError, match=r"Bearer [*]{3}") as raised:
                reload_server(ServerConfig(url=own.url, reload=secret), source)
            assert token[-4:] not in raised.value.block()
        for command in ("false", "absent-program", "cp 'unclosed"):
            with pytest.raises(ConfigError, match="the command that changes the server's weights failed"):
                reload_server(ServerConfig(url=own.url, reload=command), source)


def test_a_server_behind_a_proxy_is_waited_for(folder: Path) -> None:
    statuses = [504, 503, 502, 502, 200]

    def respond(*_: Any) -> tuple[int, str]:
        return statuses.pop(0) if statuses[1:] else statuses[0], json.dumps({"object": "list", "data": []})

    with http_server(respond) as address:
        keys = ServerConfig(url=f"{address}/v1", model="policy", reload="true")
        reload_server(keys, responder(folder).source)
    assert statuses == [200]
